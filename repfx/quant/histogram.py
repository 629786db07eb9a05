"""How often values of each size are seen: one pass, memory flat in the number of batches.

|v| is kept in BINS equal bins over [0, limit]. When a larger value comes, limit doubles and
neighbouring bins add up, so nothing seen is lost and the final bin width is at most
2 * max / BINS. Zeros have no bin: they are zero at every scale.

Counting each value of a large tensor would cost more than the layer that made it, so its values are
counted in two parts. The body is a sample, RUNS short runs of neighbours, one at a random place of
each stretch. The tail, which sets the range and which a sample misses, is counted by the maxima of
blocks of values that lie far apart, at the cost of one maximum of the tensor. Where a share h of
blocks of n values has its maximum above t,

    P(|v| > t) = 1 - (1 - h) ^ (1 / n)

if they mix well. It is used where h <= TAIL, so that few blocks hold two such values and it is
nearly a count, and where the sample has at most ENOUGH of them: that one does not mind large values
that lie together, in a few places or pictures. Tensors of one size are counted together, of several
sizes each for itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.errors import InputError

BINS = 4096
# The size of a block is the product of two, each the first that does not divide the number of
# values: the values of a block of 64, of 128 pictures, would all lie at one place of theirs.
FAR, NEAR = (31, 29), (5, 7, 3, 11)
TAIL, ENOUGH = 1 / 4, 256
RUNS, RUN = 512, 16  # the sample of a tensor; one read of memory brings a run
DRAWS = 16  # samples lie at other places from tensor to tensor
LARGE = 2**16  # fewer values are all counted
PENDING = 2**18  # values that wait to be counted together: many small counts cost more than one
TINY = 1e-30  # no scale in float32 tells smaller values from 0
_UP = torch.tensor(1 - 2**-24, device="cpu")  # rounds up what is cut off after it, all but zero


_View = tuple[tuple[int, int], tuple[int, int]]  # sizes and strides


class Histogram:
    """Counts |v| of what is added, or max(v, 0) if not `two_sided`."""

    def __init__(self, two_sided: bool = True) -> None:
        self.two_sided = two_sided
        self.top = self.limit = 0.0
        self._counts = torch.zeros(BINS, dtype=torch.float64, device="cpu")
        # Of tensors of the size at hand: where they are read, what waits to be counted, a row each,
        # how many were counted, and the bins of their maxima and samples.
        self._places = _places(0, torch.device("cpu"))
        self._rows = self._once = self._twice = torch.empty(0, 0, device="cpu")
        self._slots: list[tuple[Tensor, Tensor]] = []  # of each row, its maxima and its sample
        self._used = self._tensors = 0
        self._bins = torch.zeros(2, BINS, dtype=torch.float64, device="cpu")

    def add(self, values: Tensor) -> None:
        """Adds values of any shape and dense in memory, in whatever order.

        Raises InputError where there is NaN or infinity, -inf only if two-sided.
        """
        if (values.numel(), values.dtype) != (self._places.size, self._rows.dtype):
            self._settle()
            at = self._places = _places(values.numel(), values.device)
            width = at.tops + RUN * len(at.starts[0])
            self._rows = values.new_empty(
                min(64, max(4, PENDING // max(width, 1))), width
            )  # to count makes a GPU wait
            tops, samples = self._rows.split((at.tops, width - at.tops), 1)
            self._slots = list(
                zip(tops.unbind(), samples.unflatten(1, (-1, RUN)).unbind(), strict=True)
            )
            # Kept, as what is allocated between two layers takes the place of what the next one
            # gives.
            self._once = values.new_empty(at.far[0][1])
            self._twice = self._once.as_strided(*at.near)
        elif self._used == len(self._rows):
            self._count()
        at = self._places
        tops, sample = self._slots[self._used]
        self._used += 1
        if at.block == 1:
            tops.copy_(values.as_strided((at.size,), (1,)))
            return
        blocks = values.as_strided(*at.far)
        torch.amax(blocks, 0, out=self._once)
        if self.two_sided:
            torch.maximum(self._once, blocks.amin(0).neg_(), out=self._once)
        torch.amax(self._twice, 0, out=tops)
        torch.index_select(
            values.as_strided(*at.runs),
            0,
            at.starts[(self._tensors + self._used) % DRAWS],
            out=sample,
        )

    def counts(self) -> Tensor:
        """How many values seen lie in each bin, (BINS,) in float64."""
        self._settle()
        return self._counts

    def _count(self) -> None:
        """Counts what waits to be counted. Raises InputError where there is NaN or infinity."""
        rows, width = self._rows[: self._used].float(), self._places.tops
        self._tensors += self._used
        self._used = 0
        if not rows.numel():
            return
        rows.abs_() if self.two_sided else rows.clamp_(min=0)
        self.top = raised(self.top, rows.amax())
        while self.top > self.limit:
            self._counts, self._bins = _halved(self._counts), _halved(self._bins)
            self.limit = 2 * self.limit or 1.25 * self.top  # so that batches a little larger fit
        if self.limit:
            # Bin n holds (n - 1, n] of the limit's parts, bin 0 the zeros, the last also what
            # rounds past the limit. int16 takes half the time of int32.
            at = (
                torch.add(_UP, rows, alpha=BINS / self.limit, out=rows)
                .to(torch.int16)
                .clamp_(max=BINS)
            )
            at[:, width:] += BINS + 1
            self._bins += (
                torch.bincount(at.view(-1), minlength=2 * BINS + 2).view(2, -1)[:, 1:].cpu()
            )

    def _settle(self) -> None:
        """Turns what was counted of tensors of one size into counts of their values."""
        self._count()
        (tops, sample), at = self._bins, self._places
        if at.block == 1:
            self._counts += tops
        elif self._tensors:
            hit = tops.flip(0).cumsum(0).flip(0) / (
                self._tensors * at.tops
            )  # the share of blocks that reach a bin
            above = sample.flip(0).cumsum(0).flip(0)
            start = int(((hit > TAIL) | (above > ENOUGH)).sum())  # the tail's first bin
            seen = self._tensors * at.size
            tail = F.pad(-seen * torch.expm1(torch.log1p(-hit[start:]) / at.block), (0, 1))
            sampled = self._tensors * RUN * len(at.starts[0]) - float(sample[start:].sum())
            self._counts += torch.cat(
                [sample[:start] * ((seen - tail[0]) / max(sampled, 1.0)), tail[:-1] - tail[1:]]
            )
        self._bins = torch.zeros_like(self._bins)
        self._tensors = 0


def _halved(bins: Tensor) -> Tensor:
    pairs = bins[..., ::2] + bins[..., 1::2]
    return torch.cat([pairs, torch.zeros_like(pairs)], -1)


class _Places(NamedTuple):
    """Where tensors of `size` values are read: as `tops` blocks of `block` values, and in runs of a
    row of `starts`.

    Blocks come of folding twice, `far` and then `near`, each the sizes and strides of a view whose
    columns become their maxima. If that does not come out even, a few values are in two blocks. Few
    long strides at a time are read as fast as memory in its order, many not. `runs` is the view of
    all runs there are."""

    size: int
    block: int = 1
    tops: int = 0
    far: _View = ((0, 0), (0, 0))
    near: _View = ((0, 0), (0, 0))
    runs: _View = ((0, 0), (0, 0))
    starts: Sequence[Tensor] = (torch.empty(0, device="cpu"),)


@functools.lru_cache(64)
def _places(size: int, device: torch.device) -> _Places:
    if size < LARGE:
        return _Places(size, tops=size)
    far, near = (next((n for n in several if size % n), several[0]) for several in (FAR, NEAR))
    folds, width = list[_View](), size
    for parts in (far, near):
        step = width // parts
        # Coprime with every dimension, so that a block has values of all channels and columns.
        while math.gcd(step, size) > 1:
            step -= 1
        width -= step * (parts - 1)
        folds.append(((parts, width), (step, 1)))
    stretch = size // RUNS
    random = torch.randint(
        stretch - RUN + 1,
        (DRAWS, RUNS),
        generator=torch.Generator().manual_seed(size),
        device="cpu",
    )
    starts = torch.arange(0, RUNS * stretch, stretch, device="cpu") + random
    all_runs = (size - RUN + 1, RUN), (1, 1)
    return _Places(
        size, far * near, width, folds[0], folds[1], all_runs, starts.to(device).unbind()
    )


def raised(top: float, *to: Tensor) -> float:
    """The largest of top and these scalars, those below TINY left out. Raises InputError for NaN or
    infinity.
    """
    for value in map(float, to):
        if not value < math.inf:
            raise InputError(
                "a value to be quantized is NaN or infinite; check the calibration batches "
                "and the model"
            )
        top = max(top, value if value >= TINY else 0.0)
    return top
