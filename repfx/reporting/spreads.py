"""How values are distributed: those of one tensor, or of many batches that are seen one by one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repfx.reporting.numbers import Spread

SHOWN = 101  # the number of quantiles that a distribution is drawn from
KEPT = 4096  # the number of values of each batch that quantiles are taken from


class Tally:
    """Sums over batches. All numbers are exact but the quantiles, which come from a sample."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.square = 0.0
        self.low, self.high = math.inf, -math.inf
        self.sample: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Adds a batch of any shape."""
        flat = x.detach().flatten()
        if not len(flat):
            return
        wide = flat.double()
        self.count += len(flat)
        self.total += float(wide.sum())
        self.square += float(wide.square().sum())
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        self.sample.append(evenly(flat, KEPT).float())

    def spread(self) -> Spread | None:
        """The distribution of all the values, None where there were none."""
        if not self.count:
            return None
        mean = self.total / self.count
        std = math.sqrt(max(0.0, self.square / self.count - mean**2))
        inner = quantiles(torch.cat(self.sample))[1:-1]  # a sample misses the ends
        return Spread(self.low, self.high, mean, std, (self.low, *inner, self.high))


def evenly(values: Tensor, most: int) -> Tensor:
    """At most this many of the values (N,), evenly spaced from the first to the last."""
    n = len(values)
    at = torch.linspace(0, n - 1, min(n, most), dtype=torch.float64, device=values.device)
    return values[at.round().long()]


def quantiles(values: Tensor) -> tuple[float, ...]:
    return tuple(evenly(values.detach().flatten().float().sort().values, SHOWN).tolist())


def spread(values: Tensor) -> Spread:
    v = values.detach().float()
    return Spread(
        float(v.min()), float(v.max()), float(v.mean()), float(v.std(correction=0)), quantiles(v)
    )


def reach(top: Tensor | None) -> tuple[int, float]:
    """From each channel's largest magnitude: how many exceed half the largest, the median share."""
    if top is None or not len(top) or float(top.max()) == 0:
        return 0, 0.0
    share = top / top.max()
    return int((share > 0.5).sum()), float(share.median())
