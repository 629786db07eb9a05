"""How often values of each size are seen: one pass, memory flat in the number of batches.

|v| is kept in BINS equal bins over [0, limit]. When a larger value comes, limit doubles and neighbouring bins add up, so
nothing seen is lost and the final bin width is at most 2 * max / BINS. Zeros have no bin: they are zero at every scale.

Counting each value of a large tensor would cost more than the layer that made it, so its values are counted in two parts.
The body is a sample, a few neighbours at every k-th place. The tail, which sets the range and which a sample misses, is
counted by the maxima of blocks of BLOCK values that lie far apart, at the cost of one maximum of the tensor. Where a share
h of the blocks has its maximum above t,

    P(|v| > t) = 1 - (1 - h) ^ (1 / BLOCK)

if they mix well. It is used where h <= TAIL, so that few blocks hold two such values and it is nearly a count.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.errors import InputError

BINS = 4096
BLOCK = 67  # a prime: were it a divisor of the number of pictures, a block would lie at one place of all of them
TAIL = 1 / 8
SAMPLE = 2**14  # values of the body of one tensor
RUN = 16  # of neighbours in the sample: one read of memory brings them all
PENDING = 2**18  # values that wait to be counted together: many small counts cost more than one
TINY = 1e-30  # no scale in float32 tells smaller values from 0
_UP = torch.tensor(1 - 2**-24)  # rounds up what is cut off after it, all but zero


class Histogram:
    """Counts |v| of what is added, or max(v, 0) if not `two_sided`."""

    def __init__(self, two_sided: bool = True) -> None:
        self.two_sided = two_sided
        self.top = self.limit = 0.0
        self.blocked = 0  # values in blocks
        # Of values counted one by one, of maxima of blocks and of samples: the bins, and how many with the zeros.
        self._bins = torch.zeros(3, BINS, dtype=torch.int64)
        self._numbers = [0, 0, 0]
        # What waits to be counted lies in three places of fixed size: a heap with many small holes slows a forward pass.
        self._waiting = [torch.empty(0)] * 3
        self._used = [0, 0, 0]

    def add(self, values: Tensor) -> None:
        """Adds values (N,) of any size. Raises InputError where there is NaN or infinity."""
        count = values.numel()
        if count < 4 * SAMPLE:
            self._room(0, count, values).copy_(values)
            return
        width, step = _apart(count)
        tops = self._room(1, count - (BLOCK - 1) * width, values)
        tops[width:] = values[BLOCK * width :]
        blocks, tops = values[: BLOCK * width].view(BLOCK, width), tops[:width]
        torch.amax(blocks, 0, out=tops)
        if self.two_sided:
            torch.maximum(tops, blocks.amin(0).neg_(), out=tops)
        sample = values.unfold(0, RUN, step)
        self._room(2, sample.numel(), values).view_as(sample).copy_(sample)
        self.blocked += count

    def _room(self, row: int, count: int, like: Tensor) -> Tensor:
        """Where so many values can wait."""
        start = self._used[row]
        if start + count > self._waiting[row].numel():
            self.count()
            if count > self._waiting[row].numel():
                self._waiting[row] = like.new_empty(max(count, PENDING))
            start = 0
        self._used[row] = start + count
        return self._waiting[row][start : start + count]

    def count(self) -> None:
        """Counts what waits to be counted. Raises InputError where there is NaN or infinity."""
        rows = [waiting[:used] for waiting, used in zip(self._waiting, self._used, strict=True)]
        self._used = [0, 0, 0]
        for values in rows:
            if values.numel():
                values.abs_() if self.two_sided else values.clamp_(min=0)
                self.top = raised(self.top, values.amax())
        while self.top > self.limit:
            halved = self._bins[:, ::2] + self._bins[:, 1::2]
            self._bins = torch.cat([halved, torch.zeros_like(halved)], 1)
            self.limit = 2 * self.limit or self.top
        for row, values in enumerate(rows):
            self._numbers[row] += values.numel()
            if self.limit and values.numel():
                # Bin n holds (n - 1, n] of the limit's parts, bin 0 the zeros. int16 is half the time of int32.
                bins = torch.add(_UP, values, alpha=BINS / self.limit, out=values).to(torch.int16)
                found = torch.bincount(bins, minlength=BINS + 1).cpu()
                self._bins[row] += found[1 : BINS + 1]
                self._bins[row, -1] += int(found[BINS + 1 :].sum())  # what the division rounded past the limit

    def counts(self) -> Tensor:
        """How many values seen lie in each bin, (BINS,) in float64."""
        self.count()
        ones, tops, sample = self._bins.double()
        if not self.blocked:
            return ones
        _, blocks, sampled = self._numbers
        hit = tops.flip(0).cumsum(0).flip(0) / blocks  # the share of blocks with a value in a bin or above it
        start = int((hit > TAIL).sum())  # the tail's first bin
        tail = F.pad(BLOCK * blocks * (1 - (1 - hit[start:]) ** (1 / BLOCK)), (0, 1))
        body = (self.blocked - tail[0]) / max(sampled - float(sample[start:].sum()), 1.0)
        return ones + torch.cat([sample[:start] * body, tail[:-1] - tail[1:]])


@functools.cache
def _apart(count: int) -> tuple[int, int]:
    """How far apart the values of a block lie, and the runs of a sample, of so many values.

    Coprime with their number and so with every dimension: each block, and the sample, has all channels and columns.
    """
    width, step = count // BLOCK, count * RUN // SAMPLE
    while math.gcd(width, count) > 1:
        width -= 1
    while math.gcd(step, count) > 1:
        step += 1
    return width, step


def raised(top: float, *to: Tensor) -> float:
    """The largest of top and these scalars, those below TINY left out. Raises InputError for NaN or infinity."""
    for value in map(float, to):
        if not value < math.inf:
            raise InputError("a value to be quantized is NaN or infinite; check the calibration batches and the model")
        top = max(top, value if value >= TINY else 0.0)
    return top
