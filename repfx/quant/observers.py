"""Ranges from data:

    max         s = max|v| / high
    percentile  s = the 99.99th percentile of |v| / high
    mse, mae    s = argmin over clip of  sum_v (Q(v) - v)^2,  sum_v |Q(v) - v|
    entropy     s = argmin over clip of  KL(histogram || quantized histogram)

all but the first from a histogram of |v|. For an unsigned grid negative values count as 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.errors import unknown
from repfx.quant.grid import Grid
from repfx.quant.histogram import BINS, Histogram, raised

CANDIDATES = 256
COARSE = 8  # one candidate in so many is tried first
FINE = 4  # bins


class Observer:
    """Sees batches of values for one quantizer and gives its scale by a method; `max` needs no `histogram`.

    `non_negative` says that no value is below zero, which saves looking.
    """

    def __init__(self, grid: Grid, histogram: bool = True, non_negative: bool = False) -> None:
        self.grid = grid
        self.two_sided = grid.signed and not non_negative
        self.histogram = Histogram(self.two_sided) if histogram else None
        self.amax = 0.0
        self.seen = 0

    def see(self, x: Tensor) -> None:
        """Adds a batch. Raises InputError where it holds NaN or infinity, -inf only if negative values count."""
        whole = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        x = x.detach() if x.is_floating_point() else x.detach().float()
        values = x.as_strided((x.numel(),), (1,)) if whole else x.reshape(-1)  # in the order of memory
        if not values.numel():
            return
        self.seen += values.numel()
        if self.histogram is not None:
            self.histogram.add(values)
        elif self.two_sided:
            low, high = torch.aminmax(values)
            self.amax = raised(self.amax, -low, high)
        else:
            self.amax = raised(self.amax, values.amax())

    def scale(self, method: str) -> Tensor:
        """The scale by `method`, a scalar, 0 for nothing but zeros; without a histogram that of `max`.

        Raises InputError for an unknown method and where NaN or infinity was seen.
        """
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        if self.histogram is None:
            return torch.tensor(self.amax / self.grid.high, device="cpu")
        counts, self.amax = self.histogram.counts(), self.histogram.top
        with torch.device("cpu"):
            middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.histogram.limit / BINS)
            return torch.tensor(METHODS[method](middles, counts, self) if self.amax else 0.0)


def search_scale(v: Tensor, grid: Grid, power: float) -> Tensor:
    """argmin over s = a * max|v| / high, a in {.01 ... 1.00}, of sum |Q(v) - v|^power; per index of the grid's axis."""
    if grid.axis is None:
        rows = v.detach().reshape(1, -1)
    else:
        rows = v.detach().movedim(grid.axis, 0).flatten(1)
    top = rows.abs().amax(1).clamp(min=torch.finfo(v.dtype).tiny)
    best, best_error = top / grid.high, torch.full_like(top, float("inf"))
    for a in range(1, 101):
        scale = (top * (a / 100 / grid.high)).unsqueeze(1)
        error = (torch.clamp(torch.round(rows / scale), grid.low, grid.high) * scale - rows).abs().pow(power).sum(1)
        better = error < best_error
        best, best_error = torch.where(better, scale[:, 0], best), torch.where(better, error, best_error)
    return best.reshape(()) if grid.axis is None else best


def _percentile(middles: Tensor, counts: Tensor, of: Observer, q: float = 0.9999) -> float:
    share = 1 - (counts.sum() - counts.cumsum(0)) / of.seen
    at = int(torch.searchsorted(share, torch.tensor(q, dtype=share.dtype)).clamp(max=len(share) - 1))
    return min(float(middles[at] + middles[0]), of.amax) / of.grid.high


def _error(power: float) -> Callable[[Tensor, Tensor, Observer], float]:
    def search(middles: Tensor, counts: Tensor, of: Observer) -> float:
        seen = counts > 0
        v, w = (middles[seen] / of.amax).float(), counts[seen].float()
        fine = FINE * float(2 * middles[0]) / of.amax

        def best(shares: Tensor) -> int:
            steps = (shares / (of.grid.high * CANDIDATES)).to(v.dtype).unsqueeze(1)
            off = torch.div(v, steps).round_().clamp_(max=of.grid.high).mul_(steps).sub_(v).abs_().pow_(power)
            # Where a step has few bins, their middles tell nothing of how values lie between its ends: then as if evenly.
            narrow = steps[: int((steps < fine).sum())]
            even = (narrow / 2) ** power / (power + 1)
            inside = (v > narrow / 2) & (v < of.grid.high * narrow)
            off[: len(narrow)] = torch.where(inside, even, off[: len(narrow)])
            return int(shares[int(torch.argmin(off @ w))])

        near = best(torch.tensor([1, 2, 4, *range(COARSE, CANDIDATES + 1, COARSE)]))
        shares = torch.arange(max(1, near - COARSE + 1), min(CANDIDATES, near + COARSE - 1) + 1)
        return of.amax / of.grid.high / CANDIDATES * best(shares)

    return search


def _entropy(middles: Tensor, counts: Tensor, of: Observer) -> float:
    """KL divergence of the clipped histogram p from its own quantization q, as TensorRT's entropy calibrator.

    q is one number a level, so that sum p log(p / q) is of sums over bins, which running sums give, and over levels: all
    clips are tried at once.
    """
    levels = of.grid.high + 1
    if levels >= BINS:
        return of.amax / of.grid.high
    used = max(levels, int((counts > 0).nonzero()[-1]) + 1)
    stops = torch.tensor(sorted({*range(levels, used, max(1, (used - levels) // CANDIDATES)), used}))
    running = (counts, (counts > 0).double(), torch.xlogy(counts, counts))
    sums, filled, logs = (F.pad(c.cumsum(0), (1, 0)) for c in running)
    edges = (stops.unsqueeze(1) * torch.linspace(0, 1, levels + 1, dtype=torch.float64)).round().long()
    mass, inside = sums[edges].diff(), sums[stops]
    # The mean of a level's bins that hold something.
    q = (mass / filled[edges].diff().clamp(min=1) / inside.clamp(min=1e-300).unsqueeze(1)).clamp(min=1e-12)
    last, clipped = counts[stops - 1], sums[-1] - inside  # what is clipped adds to the last bin
    own = logs[stops] - torch.xlogy(last, last) + torch.xlogy(last + clipped, last + clipped)
    cross = torch.xlogy(mass, q).sum(1) + clipped * torch.where(last > 0, q[:, -1], 1e-12).log()
    stop = int(stops[torch.argmin(own - cross)])
    return min(float(middles[stop - 1] + middles[0]), of.amax) / of.grid.high


METHODS: dict[str, Callable[[Tensor, Tensor, Observer], float]] = {
    "max": lambda middles, counts, of: of.amax / of.grid.high,
    "percentile": _percentile,
    "mse": _error(2.0),
    "mae": _error(1.0),
    "entropy": _entropy,
}
