"""Histogram: how often each magnitude is seen, in one pass and in memory that does not grow.

|v| is counted in BINS equal bins over [0, limit]. When a larger value comes, the limit doubles and
neighbouring bins are added. So no count is lost, and the final bin width is at most 2 * max / BINS.
Zeros are not counted, because they are exact at every scale. Limits are powers of two, so that the
histograms of several processes have the same bins and can be added.

Counting every value of a large tensor would cost more than the layer that computed it. So large
tensors are counted in two parts. The body is a sample of RUNS short runs of neighbouring values:
the tensor is cut into that many stretches, and a run starts at a random place in each. A sample
misses the tail, which sets the range. So the tail is counted by the maxima of blocks of values
that lie far apart, which costs about as much as one maximum of the tensor. If the maximum is above
t in a share h of the blocks of n values, then

    P(|v| > t) = 1 - (1 - h) ^ (1 / n)

as long as the values mix well. This is used where h <= TAIL: few blocks have two such values, and
the formula is nearly a count. And it is used only where the sample has at most ENOUGH such values:
with more, the sample is better, as it does not matter to it if large values lie together, in a few
places or images. Tensors of about the same size are counted together, within a factor of two, and
others on their own: what reads one quantizer at another size may hold other values.

Which places are sampled depends on the values of the tensor and not on its turn. So the counts do
not depend on the order of the tensors, or on which process counts which of them."""

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
# The size of a block is the product of a number from FAR and one from NEAR, each the first that
# does not divide the number of values. Blocks of 64 in a batch of 128 images would not do: all
# values of a block would lie at the same place in their images.
FAR, NEAR = (31, 29), (5, 7, 3, 11)
TAIL, ENOUGH = 1 / 4, 256
RUNS, RUN = 512, 16  # the sample: 512 runs of 16 values; one read of memory fetches a run
DRAWS = 16  # there are so many different samples
LARGE = 2**16  # below this size, all values are counted
PENDING = 2**18  # so many values wait to be counted at once: one large count is faster
TINY = 1e-30  # no scale in float32 tells smaller values from 0
_UP = torch.tensor(1 - 2**-24, device="cpu")  # added before truncation, rounds up all but zero


_View = tuple[tuple[int, int], tuple[int, int]]  # sizes and strides


class Counted(NamedTuple):
    """What a histogram has counted, as several processes exchange it.

    `parts`: by the size of blocks n and the number of bits of a tensor's size, the bins of the
    maxima of blocks, of the sampled values and of the values that these stand for, and how many
    blocks and values there are in all."""

    top: float
    limit: float
    parts: dict[tuple[int, int], tuple[Tensor, Tensor]]


class Histogram:
    """Counts |v| of what is added, or max(v, 0) if not `two_sided`."""

    def __init__(self, two_sided: bool = True) -> None:
        self.two_sided = two_sided
        self.top = self.limit = 0.0
        self._parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # For tensors of the current size: where they are read, and the values that wait to be
        # counted (one row per tensor).
        self._places = _places(0, torch.device("cpu"))
        self._rows = self._once = self._twice = torch.empty(0, 0, device="cpu")
        self._slots: list[tuple[Tensor, Tensor]] = []  # the maxima and the sample of each row
        self._used = 0

    def add(self, values: Tensor) -> None:
        """Adds values of any shape. They must be dense in memory, in any order of dimensions.

        Raises InputError for NaN and infinity; minus infinity counts only if two-sided.
        """
        if (values.numel(), values.dtype) != (self._places.size, self._rows.dtype):
            self._count()
            at = self._places = _places(values.numel(), values.device)
            width = at.tops + RUN * at.starts.shape[1]
            # Several rows, because each count makes a GPU wait.
            self._rows = values.new_empty(min(64, max(4, PENDING // max(width, 1))), width)
            tops, samples = self._rows.split((at.tops, width - at.tops), 1)
            self._slots = list(
                zip(tops.unbind(), samples.unflatten(1, (-1, RUN)).unbind(), strict=True)
            )
            # Kept for reuse: memory allocated between two layers would be memory that the next
            # layer's output could have taken.
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
        draw = _roughly(tops).sum().remainder(DRAWS)
        starts = at.starts.index_select(0, draw.view(1)).view(-1)
        torch.index_select(values.as_strided(*at.runs), 0, starts, out=sample)

    def counts(self) -> Tensor:
        """How many of the values seen lie in each bin: (BINS,) in float64."""
        self._count()
        found = torch.zeros(BINS, dtype=torch.float64, device="cpu")
        for kind in sorted(self._parts):
            found += _settled(kind[0], *self._parts[kind])
        return found

    def counted(self) -> Counted:
        """What this histogram has counted so far."""
        self._count()
        return Counted(self.top, self.limit, self._parts)

    def take(self, every: Sequence[Counted]) -> None:
        """Replaces what was counted by the sum of these."""
        self._used = 0
        self.top, self.limit = (max(each) for each in zip(*(c[:2] for c in every), strict=True))
        self._parts = {}
        for one in every:
            times = round(math.log2(self.limit / one.limit)) if one.limit else 0
            for kind, (bins, sizes) in one.parts.items():
                self._add(kind, _halved(bins, times), sizes)

    def _count(self) -> None:
        """Counts the rows that wait. Raises InputError for NaN and infinity."""
        rows, at, tensors = self._rows[: self._used].float(), self._places, self._used
        self._used = 0
        if not rows.numel():
            return
        rows.abs_() if self.two_sided else rows.clamp_(min=0)
        self.top = raised(self.top, rows.amax())
        if self.top > self.limit:
            limit = 2.0 ** math.ceil(math.log2(self.top))
            times = round(math.log2(limit / self.limit)) if self.limit else 0
            self.limit = limit
            self._parts = {k: (_halved(bins, times), n) for k, (bins, n) in self._parts.items()}
        bins = torch.zeros(3, BINS, dtype=torch.float64, device="cpu")
        if self.limit:
            # Bin n holds the values in (n - 1, n] bin widths, and bin 0 the zeros. The last bin
            # also takes what rounds past the limit. int16 takes half the time of int32.
            places = (
                torch.add(_UP, rows, alpha=BINS / self.limit, out=rows)
                .to(torch.int16)
                .clamp_(max=BINS)
            )
            places[:, at.tops :] += BINS + 1
            found = torch.bincount(places.view(-1), minlength=2 * BINS + 2)
            bins[:2] += found.view(2, -1)[:, 1:].cpu()
            bins[2] = bins[1] * (at.size / max(RUN * at.starts.shape[1], 1))
        sizes = torch.tensor(
            [tensors * at.tops, tensors * at.size], dtype=torch.float64, device="cpu"
        )
        # Small tensors are counted whole, so their sizes need not be told apart.
        kind = at.block, at.size.bit_length() if at.block > 1 else 0
        self._add(kind, bins, sizes)

    def _add(self, kind: tuple[int, int], bins: Tensor, sizes: Tensor) -> None:
        before = self._parts.get(kind, (0.0, 0.0))
        self._parts[kind] = before[0] + bins, before[1] + sizes


def _roughly(values: Tensor) -> Tensor:
    """The exponent and three more bits of each value, as integers.

    Their sum does not depend on the number of threads, and hardly on rounding errors."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    digits = round(-math.log2(torch.finfo(values.dtype).eps))
    return values.view(whole) >> (digits - 3)


def _settled(block: int, bins: Tensor, sizes: Tensor) -> Tensor:
    """Turns maxima of blocks of `block` values, and samples, into counts of the values."""
    tops, sample, stands_for = bins.unbind()
    if block == 1:
        return tops
    blocks, seen = sizes.tolist()
    # The share of blocks whose maximum lies in a bin or above it.
    hit = tops.flip(0).cumsum(0).flip(0) / blocks
    above = sample.flip(0).cumsum(0).flip(0)
    start = int(((hit > TAIL) | (above > ENOUGH)).sum())  # the first bin of the tail
    tail = F.pad(-seen * torch.expm1(torch.log1p(-hit[start:]) / block), (0, 1))
    # Zeros are in no bin.
    body = stands_for[:start] * (
        (seen - tail[0]) / max(seen - float(stands_for[start:].sum()), 1.0)
    )
    return torch.cat([body, tail[:-1] - tail[1:]])


def _halved(bins: Tensor, times: int) -> Tensor:
    """The bins over a limit that is 2^times as large."""
    for _ in range(times):
        pairs = bins[..., ::2] + bins[..., 1::2]
        bins = torch.cat([pairs, torch.zeros_like(pairs)], -1)
    return bins


class _Places(NamedTuple):
    """Where tensors of `size` values are read: `tops` blocks of `block` values, and runs.

    Blocks come from folding the tensor twice, with `far` and then with `near`. Each is the sizes
    and strides of a view, and each column of the view is reduced to its maximum. If the sizes do
    not come out even, a few values are in two blocks. Folding twice keeps each view to few rows:
    memory is read at full speed along a few long strides at a time, but not along many. `runs` is
    the view of all possible runs, and a row of `starts` picks those of one sample."""

    size: int
    block: int = 1
    tops: int = 0
    far: _View = ((0, 0), (0, 0))
    near: _View = ((0, 0), (0, 0))
    runs: _View = ((0, 0), (0, 0))
    starts: Tensor = torch.empty(DRAWS, 0, dtype=torch.int64, device="cpu")


@functools.lru_cache(64)
def _places(size: int, device: torch.device) -> _Places:
    if size < LARGE:
        return _Places(size, tops=size)
    far, near = (next((n for n in several if size % n), several[0]) for several in (FAR, NEAR))
    folds, width = list[_View](), size
    for parts in (far, near):
        step = width // parts
        # Coprime with every dimension, so that a block takes values from all channels and columns.
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
    return _Places(size, far * near, width, folds[0], folds[1], all_runs, starts.to(device))


def raised(top: float, *to: Tensor) -> float:
    """The largest of `top` and these scalars, ignoring those below TINY.

    Raises InputError for NaN and infinity."""
    for value in map(float, to):
        if not value < math.inf:
            raise InputError(
                "a value to be quantized is NaN or infinite; check the calibration batches "
                "and the model"
            )
        top = max(top, value if value >= TINY else 0.0)
    return top
