"""Ranges from data:

    max         s = max|v| / high
    percentile  s = the 99.99th percentile of |v| / high
    mse, mae    s = argmin over clip of  sum_v (Q(v) - v)^2,  sum_v |Q(v) - v|
    entropy     s = argmin over clip of  KL(histogram || quantized histogram)

all but the first from a histogram of |v|. For an unsigned grid negative values count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.errors import unknown
from repfx.quant.grid import Grid
from repfx.quant.histogram import BINS, Histogram, raised

CANDIDATES = 256
COARSE = 8  # one candidate in so many is tried first


class Observer:
    """Sees batches of values for one quantizer and gives its scale by a method; `max` needs no
    `histogram`.

    `non_negative` says that no value is below zero, which saves looking.
    """

    def __init__(self, grid: Grid, histogram: bool = True, non_negative: bool = False) -> None:
        self.grid = grid
        self.two_sided = grid.signed and not non_negative
        self.histogram = Histogram(self.two_sided) if histogram else None
        self.amax = 0.0
        self.seen = 0

    def see(self, x: Tensor) -> None:
        """Adds a batch. Raises InputError where it holds NaN or infinity, -inf only if negative
        values count.
        """
        x = x.detach() if x.is_floating_point() else x.detach().float()
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        size = x.numel()
        if not size:
            return
        self.seen += size
        if self.histogram is not None:
            self.histogram.add(x)
            return
        values = x.as_strided((size,), (1,))  # in the order of memory
        if self.two_sided:
            low, high = torch.aminmax(values)
            self.amax = raised(self.amax, -low, high)
        else:
            self.amax = raised(self.amax, values.amax())

    def scale(self, method: str) -> Tensor:
        """The scale by `method`, a scalar, 0 for nothing but zeros; without a histogram that of
        `max`.

        Raises InputError for an unknown method and where NaN or infinity was seen.
        """
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        if self.histogram is None:
            return torch.tensor(self.amax / self.grid.high, device="cpu")
        counts, self.amax = self.histogram.counts(), self.histogram.top
        with torch.device("cpu"):
            middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (
                self.histogram.limit / BINS
            )
            return torch.tensor(METHODS[method](middles, counts, self) if self.amax else 0.0)


def search_scale(v: Tensor, grid: Grid, power: float) -> Tensor:
    """argmin over s = a * max|v| / high, a in {.01 ... 1.00}, of sum |Q(v) - v|^power; per index of
    the grid's axis.
    """
    if grid.axis is None:
        rows = v.detach().reshape(1, -1)
    else:
        rows = v.detach().movedim(grid.axis, 0).flatten(1)
    top = rows.abs().amax(1).clamp(min=torch.finfo(v.dtype).tiny)
    best, best_error = top / grid.high, torch.full_like(top, float("inf"))
    for a in range(1, 101):
        scale = (top * (a / 100 / grid.high)).unsqueeze(1)
        error = (
            (torch.clamp(torch.round(rows / scale), grid.low, grid.high) * scale - rows)
            .abs()
            .pow(power)
            .sum(1)
        )
        better = error < best_error
        best, best_error = (
            torch.where(better, scale[:, 0], best),
            torch.where(better, error, best_error),
        )
    return best.reshape(()) if grid.axis is None else best


def _percentile(middles: Tensor, counts: Tensor, of: Observer, q: float = 0.9999) -> float:
    share = 1 - (counts.sum() - counts.cumsum(0)) / of.seen
    at = int(
        torch.searchsorted(share, torch.tensor(q, dtype=share.dtype)).clamp(max=len(share) - 1)
    )
    return min(float(middles[at] + middles[0]), of.amax) / of.grid.high


def _error(power: int) -> Callable[[Tensor, Tensor, Observer], float]:
    """By the excess over t, R(t) = sum_v max(|v| - t, 0), as an error bends only at levels and
    halfway between them:

        sum_v (Q(v) - v)^2 = sum_v v^2 - 2 s sum_l R((l - 1/2) s)
        sum_v |Q(v) - v|   = sum_v |v| - 2 sum_l (R((l - 1/2) s) - R(l s)),    l = 1 ... high

    with values spread evenly in their bins, but in the first, which may hold most of them, of which
    they fill little: there they fall off as they do from it to the second, n_2 = n_1 e^-f, so that
    their mean is 1 / f bins and not 1 / 2."""

    def search(middles: Tensor, counts: Tensor, of: Observer) -> float:
        first, second = counts[:2].tolist()
        fall = math.log(max(first, 1.0) / second) if second else math.inf
        counts = torch.cat(
            [counts[:1] * (2 / max(fall, 2.0)), counts[1:]]
        )  # the rest of them is next to zero
        # In units of bins R(t) = R(end) + u above + u^2 own / 2, where u is what is left of the bin
        # that t is in.
        above = _above(counts)
        parts = _above(above[:-1] + counts / 2), above, F.pad(counts / 2, (0, 1))
        levels = (
            torch.arange(1, 2 * of.grid.high + 1) / 2
            if power == 1
            else torch.arange(of.grid.high) + 0.5
        )

        def gain(steps: Tensor) -> Tensor:
            at = torch.outer(steps, levels.double()).clamp_(max=BINS)
            bins = at.long()
            at_end, beyond, half = (part.take(bins) for part in parts)
            left = at.sub_(bins).neg_().add_(1)
            r = half.mul_(left).add_(beyond).mul_(left).add_(at_end)
            return (r[:, ::2] - r[:, 1::2]).sum(1) if power == 1 else steps * r.sum(1)

        unit = of.amax / of.grid.high / CANDIDATES

        def best(shares: Tensor) -> int:
            steps = (shares * (unit / (2 * float(middles[0])))).split(max(1, 2**18 // len(levels)))
            return int(shares[torch.cat([gain(some) for some in steps]).argmax()])

        near = best(
            torch.tensor([1, 2, 4, *range(COARSE, CANDIDATES + 1, COARSE)], dtype=torch.float64)
        )
        first, last = max(1, near - COARSE + 1), min(CANDIDATES, near + COARSE - 1)
        return unit * best(torch.arange(first, last + 1, dtype=torch.float64))

    return search


def _above(counts: Tensor) -> Tensor:
    """What lies above each bin, and above the end, (BINS + 1,)."""
    return F.pad(counts.flip(0).cumsum(0).flip(0)[1:], (0, 2))


def _entropy(middles: Tensor, counts: Tensor, of: Observer) -> float:
    """KL divergence of the clipped histogram p from its own quantization q, as TensorRT's entropy
    calibrator.

    q is one number a level, so that sum p log(p / q) is of sums over bins, which running sums give,
    and over levels: all clips are tried at once."""
    levels = of.grid.high + 1
    if levels >= BINS:
        return of.amax / of.grid.high
    used = max(levels, int((counts > 0).nonzero()[-1]) + 1)
    stops = torch.tensor(
        sorted({*range(levels, used, max(1, (used - levels) // CANDIDATES)), used})
    )
    running = (counts, (counts > 0).double(), torch.xlogy(counts, counts))
    sums, filled, logs = (F.pad(c.cumsum(0), (1, 0)) for c in running)
    edges = (
        (stops.unsqueeze(1) * torch.linspace(0, 1, levels + 1, dtype=torch.float64)).round().long()
    )
    mass, held = (total.take(edges).diff() for total in (sums, filled))
    mean = mass / held.clamp_(min=1)  # of a level's bins that hold something: inside times q
    last, inside = counts[stops - 1], sums[stops]
    clipped, log_inside = sums[-1] - inside, inside.clamp(min=1e-300).log()
    whole = last + clipped  # what is clipped adds to the last bin
    own = logs[stops] - torch.xlogy(last, last) + torch.xlogy(whole, whole)
    cross = mass.mul_(mean.clamp_(min=1e-300).log_()).sum(1) - inside * log_inside
    cross += clipped * torch.where(last > 0, mean[:, -1] - log_inside, math.log(1e-12))
    divergence = own - cross
    # Of equals, as few values have, the widest.
    stop = int(stops[(divergence <= divergence.min() + 1e-9 * sums[-1]).nonzero()[-1]])
    return min(float(middles[stop - 1] + middles[0]), of.amax) / of.grid.high


METHODS: dict[str, Callable[[Tensor, Tensor, Observer], float]] = {
    "max": lambda middles, counts, of: of.amax / of.grid.high,
    "percentile": _percentile,
    "mse": _error(2),
    "mae": _error(1),
    "entropy": _entropy,
}
