"""How often values of each size are seen: one pass, memory flat in the number of batches.

|v| is kept in BINS equal bins over [0, limit]. When a larger value comes, limit doubles and neighbouring bins add up, so
nothing seen is lost and the final bin width is at most 2 * max / BINS. Zeros have no bin: they are zero at every scale.

Counting each value of a large tensor would cost more than the layer that made it, so its values are counted in two parts.
The body is a sample, RUNS short runs of neighbours, one at a random place of each stretch. The tail, which sets the range
and which a sample misses, is counted by the maxima of blocks of values that lie far apart, at the cost of one maximum of
the tensor. Where a share h of blocks of n values has its maximum above t,

    P(|v| > t) = 1 - (1 - h) ^ (1 / n)

if they mix well. It is used where h <= TAIL, so that few blocks hold two such values and it is nearly a count. Tensors of
one size are counted together, of several sizes each for itself.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.errors import InputError

BINS = 4096
# How many values a block has, the first that does not divide their number: the values of a block of 64, of 128 pictures,
# would all lie at one place of theirs.
BLOCKS = (67, 71)
TAIL = 1 / 8
RUNS, RUN = 1024, 16  # the sample of a tensor; one read of memory brings a run
LARGE = 2**16  # fewer values are all counted
PENDING = 2**18  # values that wait to be counted together: many small counts cost more than one
TINY = 1e-30  # no scale in float32 tells smaller values from 0
_UP = torch.tensor(1 - 2**-24)  # rounds up what is cut off after it, all but zero


class Histogram:
    """Counts |v| of what is added, or max(v, 0) if not `two_sided`."""

    def __init__(self, two_sided: bool = True) -> None:
        self.two_sided = two_sided
        self.top = self.limit = 0.0
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        # Of large tensors of this size: how many values they had, the bins of maxima and samples, how many with the zeros.
        self._size = self._seen = 0
        self._bins = torch.zeros(2, BINS, dtype=torch.float64)
        self._numbers = [0, 0]
        # What waits to be counted, as those two and one by one, lies in places of fixed size: a heap with many small holes
        # slows a forward pass.
        self._waiting = [torch.empty(0)] * 3
        self._used = [0, 0, 0]

    def add(self, values: Tensor) -> None:
        """Adds values (N,) of any size. Raises InputError where there is NaN or infinity, -inf only if two-sided."""
        count = values.numel()
        if count < LARGE:
            self._room(2, count, values).copy_(values)
            return
        if count != self._size:
            self._settle()
            self._size = count
        block, width, starts = _places(count)
        tops = self._room(0, count - (block - 1) * width, values)
        tops[width:] = values[block * width :]
        blocks, tops = values[: block * width].view(block, width), tops[:width]
        torch.amax(blocks, 0, out=tops)
        if self.two_sided:
            torch.maximum(tops, blocks.amin(0).neg_(), out=tops)
        runs = values.unfold(0, RUN, 1)
        torch.index_select(runs, 0, starts.to(values.device), out=self._room(1, RUNS * RUN, values).view(RUNS, RUN))
        self._seen += count

    def _room(self, row: int, count: int, like: Tensor) -> Tensor:
        """Where so many values can wait."""
        start = self._used[row]
        if start + count > self._waiting[row].numel():
            self._count()
            if count > self._waiting[row].numel():
                self._waiting[row] = like.new_empty(max(count, PENDING))
            start = 0
        self._used[row] = start + count
        return self._waiting[row][start : start + count]

    def _count(self) -> None:
        """Counts what waits to be counted. Raises InputError where there is NaN or infinity."""
        rows = [waiting[:used] for waiting, used in zip(self._waiting, self._used, strict=True)]
        self._used = [0, 0, 0]
        for values in rows:
            if values.numel():
                values.abs_() if self.two_sided else values.clamp_(min=0)
                self.top = raised(self.top, values.amax())
        while self.top > self.limit:
            self._counts, self._bins = _halved(self._counts), _halved(self._bins)
            self.limit = 2 * self.limit or self.top
        for values, bins in zip(rows, (*self._bins, self._counts), strict=True):
            if self.limit and values.numel():
                # Bin n holds (n - 1, n] of the limit's parts, bin 0 the zeros. int16 is half the time of int32.
                at = torch.add(_UP, values, alpha=BINS / self.limit, out=values).to(torch.int16)
                found = torch.bincount(at, minlength=BINS + 1).cpu()
                bins += found[1 : BINS + 1]
                bins[-1] += int(found[BINS + 1 :].sum())  # what the division rounded past the limit
        self._numbers = [n + row.numel() for n, row in zip(self._numbers, rows, strict=False)]

    def counts(self) -> Tensor:
        """How many values seen lie in each bin, (BINS,) in float64."""
        self._settle()
        return self._counts

    def _settle(self) -> None:
        """Turns what was counted of large tensors of one size into counts of their values."""
        self._count()
        if self._seen:
            (tops, sample), (blocks, sampled), block = self._bins, self._numbers, _places(self._size)[0]
            hit = tops.flip(0).cumsum(0).flip(0) / blocks  # the share of blocks with a value in a bin or above it
            start = int((hit > TAIL).sum())  # the tail's first bin
            tail = F.pad(block * blocks * (1 - (1 - hit[start:]) ** (1 / block)), (0, 1))
            body = (self._seen - tail[0]) / max(sampled - float(sample[start:].sum()), 1.0)
            self._counts += torch.cat([sample[:start] * body, tail[:-1] - tail[1:]])
            self._bins = torch.zeros_like(self._bins)
            self._numbers, self._seen = [0, 0], 0


def _halved(bins: Tensor) -> Tensor:
    pairs = bins[..., ::2] + bins[..., 1::2]
    return torch.cat([pairs, torch.zeros_like(pairs)], -1)


@functools.lru_cache(64)
def _places(count: int) -> tuple[int, int, Tensor]:
    """Of so many values: how many a block has, how far apart they lie, and where runs begin, (RUNS,)."""
    block = next((b for b in BLOCKS if count % b), BLOCKS[0])
    width = count // block
    # Coprime with every dimension, so that a block has values of all channels and columns.
    while math.gcd(width, count) > 1:
        width -= 1
    stretch = count // RUNS
    random = torch.randint(stretch - RUN + 1, (RUNS,), generator=torch.Generator().manual_seed(count))
    return block, width, torch.arange(RUNS) * stretch + random


def raised(top: float, *to: Tensor) -> float:
    """The largest of top and these scalars, those below TINY left out. Raises InputError for NaN or infinity."""
    for value in map(float, to):
        if not value < math.inf:
            raise InputError("a value to be quantized is NaN or infinite; check the calibration batches and the model")
        top = max(top, value if value >= TINY else 0.0)
    return top
