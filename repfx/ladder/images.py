"""Images: those to calibrate on, and those held out to judge by.

Every fourth image is held out, up to 256. The rest calibrates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from repfx.data.batches import Batch, Batches
from repfx.errors import InputError

EVERY, MOST = 4, 256
ROOM = 2**30  # bytes of images that are kept, so that they are not read again


class Split:
    """The batches of one source, split. `held`: the batches to judge by. Iterating gives the rest.

    Raises InputError for fewer than four images, for one with NaN, and where `Batches` does."""

    def __init__(self, given: Any) -> None:
        self.source = Batches(given, "data", finite=True)
        self.held: list[Batch] = []
        self.images = self.out = 0
        kept: list[Batch] = []
        # An iterator can be read only once.
        room = float("inf") if isinstance(given, Iterator) else float(ROOM)
        for rest, out in self._parts():
            self.images += len(rest or ()) + len(out or ())
            if out is not None:
                self.held.append(out)
                self.out += len(out)
            if rest is not None and room >= 0:
                kept.append(rest)
                room -= sum(x.nbytes for x in rest.tensors)
        self.kept = kept if room >= 0 else None
        if not self.out:
            raise InputError(
                f"quantize needs at least {EVERY} images, a few hundred are better, not "
                f"{self.images}"
            )

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.kept) if self.kept is not None else self._again()

    def _again(self) -> Iterator[Batch]:
        """Reads the images again. Raises InputError if others would be held out now."""
        held = iter(self.held)
        for rest, out in self._parts():
            if out is not None and not _same(out, next(held, None)):
                raise InputError(
                    "the data gives other images each time it is read, so images held out would "
                    "calibrate: leave out shuffle=True and augmentation"
                )
            if rest is not None:
                yield rest

    def __length_hint__(self) -> int:
        return len(self.kept) if self.kept is not None else length_hint(self.source)

    def __len__(self) -> int:
        return self.images - self.out

    def first(self, count: int) -> list[Batch]:
        """The first `count` images to calibrate on, or all if there are fewer."""
        found = list[Batch]()
        for batch in self:
            part = _rows(batch, torch.arange(len(batch)) < count)
            assert part is not None
            found.append(part)
            count -= len(part)
            if not count:
                break
        return found

    def _parts(self) -> Iterator[tuple[Batch | None, Batch | None]]:
        """The rows of each batch to calibrate on, and those held out."""
        seen = out = 0
        for batch in self.source:
            count = len(batch)
            held = torch.arange(seen, seen + count) % EVERY == EVERY - 1
            held &= out + held.cumsum(0) <= MOST
            seen, out = seen + count, out + int(held.sum())
            yield _rows(batch, ~held), _rows(batch, held)


def _same(a: Batch, b: Batch | None) -> bool:
    return b is not None and all(map(torch.equal, a.tensors, b.tensors))


def _rows(batch: Batch, wanted: Tensor) -> Batch | None:
    """These rows of a batch, or None if there is no such row."""
    if not wanted.any():
        return None
    count = len(batch)

    def of(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            return value[wanted.to(value.device)]
        if isinstance(value, (list, tuple)) and len(value) == count:
            return [v for v, keep in zip(value, wanted.tolist(), strict=True) if keep]
        return value

    inputs = batch.inputs
    found = {k: of(v) for k, v in inputs.items()} if isinstance(inputs, Mapping) else of(inputs)
    return Batch(found, of(batch.labels))
