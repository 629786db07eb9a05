"""Ranges from data: one pass, memory flat in the number of batches.

Values are kept as a histogram of |v| in BINS equal bins over [0, limit]. When a larger value comes, limit doubles and
neighbouring bins add up, so nothing seen is lost and the final bin width is at most 2 * max / BINS. Zeros (and, for an
unsigned grid, negative values) are the same for every scale: they are counted but have no bin. Of a tensor larger than
SAMPLE every k-th value stands for k, so that counting stays cheap beside the forward pass; the largest is always exact.

    max         s = max|v| / high
    percentile  s = the 99.99th percentile of |v| / high
    mse, mae    s = argmin over clip of  sum_v (Q(v) - v)^2,  sum_v |Q(v) - v|
    entropy     s = argmin over clip of  KL(histogram || quantized histogram)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.errors import InputError, unknown
from repfx.quant.grid import Grid

BINS = 4096
CANDIDATES = 256
COARSE = 4  # one candidate in so many is tried first
SAMPLE = 2**18
TINY = 1e-30
_UP = torch.tensor(1 - 2**-24)  # rounds up what is cut off after it, all but zero


class Observer:
    """Sees batches of values for one quantizer and gives its scale by a method; `max` needs no `histogram`."""

    def __init__(self, grid: Grid, histogram: bool = True) -> None:
        self.grid, self.histogram = grid, histogram
        self.amax = 0.0
        self.limit = 0.0
        self.seen = 0
        self.counts: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """Adds a batch. Raises InputError where it holds NaN or infinity."""
        x = x.detach()
        # In the order of memory, so that no layout is copied.
        values = x.permute(sorted(range(x.dim()), key=lambda d: -x.stride()[d])).reshape(-1).float()
        low, high = (float(v) for v in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
        if not (high < float("inf") and low > -float("inf")):
            raise InputError("a value to be quantized is NaN or infinite; check the calibration batches and the model")
        top = max(high, -low if self.grid.signed else 0.0)
        top = 0.0 if top < TINY else top  # no scale in float32 tells such values from 0
        self.seen += values.numel()
        self.amax = max(self.amax, top)
        if top == 0.0 or not self.histogram:
            return
        if self.counts is None:
            self.limit, self.counts = top, torch.zeros(BINS, dtype=torch.float64)
        while top > self.limit:
            self.counts = torch.cat([self.counts.reshape(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)])
            self.limit *= 2
        count, step = values.numel(), -(-values.numel() // SAMPLE)
        # Coprime with every dimension, so that no layout hides a channel or a column.
        while math.gcd(step, count) > 1:
            step += 1
        values = values[::step]
        if low < 0:
            values = values.abs() if self.grid.signed else values.clamp(min=0)
        # Bin n holds (n - 1, n] of the limit's parts, bin 0 the zeros. int16 is half the time of int32.
        bins = torch.add(_UP, values, alpha=BINS / self.limit).to(torch.int16)
        found = torch.bincount(bins, minlength=BINS + 1).cpu()
        found[BINS] += found[BINS + 1 :].sum()  # what the division rounded past the limit
        self.counts += found[1 : BINS + 1] * (count / len(values))
        at = min(math.ceil(top / self.limit * BINS), BINS) - 1
        self.counts[at] = max(float(self.counts[at]), 1.0)  # a lone peak that no k-th value is

    def scale(self, method: str) -> Tensor:
        """The scale by `method`, a scalar. Raises InputError for an unknown one or where nothing was seen."""
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        if self.counts is None:
            return torch.tensor(self.amax / self.grid.high)  # nothing but zeros, or no histogram
        edges = torch.arange(BINS, dtype=torch.float64)
        middles = (edges + 0.5) * (self.limit / BINS)
        return torch.tensor(METHODS[method](middles, self.counts, self))


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
        v, w = middles[seen], counts[seen]

        def best(shares: Tensor) -> int:
            steps = (of.amax / of.grid.high / CANDIDATES * shares.to(v.dtype)).unsqueeze(1)
            off = torch.clamp(torch.round(v / steps), 0, of.grid.high).mul_(steps).sub_(v).abs_()
            return int(shares[int(torch.argmin(off.pow_(power) @ w))])

        near = best(torch.arange(COARSE, CANDIDATES + 1, COARSE))
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
