"""Observers: the scale of a quantizer from the values it sees, by one of five methods.

    max         s = max|v| / high
    percentile  s = the 99.99th percentile of |v| / high
    mse, mae    s = argmin over clip of  sum_v (Q(v) - v)^2,  sum_v |Q(v) - v|
    entropy     s = argmin over clip of  KL(histogram || quantized histogram)

All methods except `max` use a histogram of |v|. On an unsigned grid, negative values count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.errors import InputError, unknown
from repfx.processes import agreed, gathered
from repfx.quant.grid import Grid
from repfx.quant.histogram import BINS, Counted, Histogram, raised

CANDIDATES = 256
COARSE = 8  # every eighth candidate is tried first, then those near the best


class Observer:
    """Sees batches of values for one quantizer and computes its scale.

    The method `max` needs no `histogram`. With `non_negative` the caller promises that no value is
    below zero, so minima need not be computed. `checked`: a value below zero is an error.
    """

    def __init__(
        self,
        grid: Grid,
        histogram: bool = True,
        non_negative: bool = False,
        checked: bool = False,
    ) -> None:
        self.grid, self.checked = grid, checked
        self.two_sided = grid.signed and not non_negative
        self.histogram = Histogram(self.two_sided) if histogram or grid.is_sign else None
        self.amax = 0.0
        self.seen = 0

    def see(self, x: Tensor) -> None:
        """Adds a batch of any shape. Raises InputError if it holds NaN or infinity.

        Minus infinity is an error only if negative values count. If `checked`, raises it for a
        value below zero, too."""
        x = x.detach() if x.is_floating_point() else x.detach().float()
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        size = x.numel()
        if not size:
            return
        self.seen += size
        values = x.as_strided((size,), (1,))  # in memory order
        if self.checked:
            _check_unsigned(values)
        if self.histogram is not None:
            self.histogram.add(x)
            return
        if self.two_sided:
            low, high = torch.aminmax(values)
            self.amax = raised(self.amax, -low, high)
        else:
            self.amax = raised(self.amax, values.amax())

    def counted(self) -> tuple[float, int, Counted | None]:
        """What was seen so far, as several processes exchange it."""
        histogram = None if self.histogram is None else self.histogram.counted()
        return self.amax, self.seen, histogram

    def take(self, parts: Sequence[tuple[float, int, Counted | None]]) -> None:
        """Replaces what was seen by the sum of these parts."""
        self.amax, self.seen = max(p[0] for p in parts), sum(p[1] for p in parts)
        if self.histogram is not None:
            self.histogram.take([p[2] for p in parts if p[2] is not None])

    def scale(self, method: str) -> Tensor:
        """The scale by `method`, a scalar. It is 0 if only zeros were seen.

        The scale of a sign is the mean of |v|, whatever the method.

        Without a histogram it is the scale of `max`. Raises InputError for an unknown method, and
        if NaN or infinity was seen.
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
            if self.grid.is_sign and self.amax:
                return (middles * counts).sum().div(self.seen).float()
            return torch.tensor(METHODS[method](middles, counts, self) if self.amax else 0.0)


def _check_unsigned(values: Tensor) -> None:
    least = float(values.amin())
    if least < 0:
        raise InputError(
            f"an input was said to be never negative, with `unsigned`, but has {least:g}: leave "
            "that out, or give images from 0 on"
        )


def together(observers: Iterable[Observer]) -> None:
    """Shows each observer what its counterparts in the other processes have seen."""
    ours = list(observers)
    with agreed():  # counting raises for NaN
        seen = [observer.counted() for observer in ours]
    every = gathered(seen)
    if len(every) > 1:
        for observer, parts in zip(ours, zip(*every, strict=True), strict=True):
            observer.take(parts)


def search_scale(v: Tensor, grid: Grid, power: float) -> Tensor:
    """argmin over s of sum |Q(v) - v|^power, for s = a * max|v| / high, a in {.01 ... 1.00}.

    A scalar, or one scale per index of the grid's axis. For a sign it is the mean of |v|."""
    if grid.is_sign:
        return grid.mean(v).clamp(min=torch.finfo(v.dtype).tiny)
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
    """The search for the smallest error, by the excess over t, R(t) = sum_v max(|v| - t, 0).

    As a function of v, the error has corners only at the levels and halfway between them, so

        sum_v (Q(v) - v)^2 = sum_v v^2 - 2 s sum_l R((l - 1/2) s)
        sum_v |Q(v) - v|   = sum_v |v| - 2 sum_l (R((l - 1/2) s) - R(l s)),    l = 1 ... high

    Values are taken to be spread evenly within their bins, except in the first bin. That one may
    hold most values, close to zero. There they are taken to fall off at the rate seen from the
    first bin to the second, n_2 = n_1 e^-f, so their mean is 1 / f of a bin and not 1 / 2."""

    def search(middles: Tensor, counts: Tensor, of: Observer) -> float:
        first, second = counts[:2].tolist()
        fall = math.log(max(first, 1.0) / second) if second else math.inf
        # The other values of the first bin are next to zero and cost nothing.
        counts = torch.cat([counts[:1] * (2 / max(fall, 2.0)), counts[1:]])
        # In units of bins, R(t) = R(end) + u above + u^2 own / 2. t lies in a bin that ends at
        # `end`, u is the rest of that bin, `own` is its count and `above` the count beyond it.
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
    """How much lies above each bin, and 0 for the end of the last: (BINS + 1,)."""
    return F.pad(counts.flip(0).cumsum(0).flip(0)[1:], (0, 2))


def _entropy(middles: Tensor, counts: Tensor, of: Observer) -> float:
    """KL divergence of the clipped histogram p from its quantization q, as TensorRT calibrates.

    q has one value per level. So sum p log(p / q) splits into sums over bins, which come from
    running sums, and sums over levels, and all clipping points are tried at once."""
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
    mean = mass / held.clamp_(min=1)  # over a level's bins that are not empty: inside times q
    last, inside = counts[stops - 1], sums[stops]
    clipped, log_inside = sums[-1] - inside, inside.clamp(min=1e-300).log()
    whole = last + clipped  # clipped values count in the last bin
    own = logs[stops] - torch.xlogy(last, last) + torch.xlogy(whole, whole)
    cross = mass.mul_(mean.clamp_(min=1e-300).log_()).sum(1) - inside * log_inside
    cross += clipped * torch.where(last > 0, mean[:, -1] - log_inside, math.log(1e-12))
    divergence = own - cross
    # Several clipping points tie if there are few values. Take the widest.
    stop = int(stops[(divergence <= divergence.min() + 1e-9 * sums[-1]).nonzero()[-1]])
    return min(float(middles[stop - 1] + middles[0]), of.amax) / of.grid.high


METHODS: dict[str, Callable[[Tensor, Tensor, Observer], float]] = {
    "max": lambda middles, counts, of: of.amax / of.grid.high,
    "percentile": _percentile,
    "mse": _error(2),
    "mae": _error(1),
    "entropy": _entropy,
}
