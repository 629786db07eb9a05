"""Images: those to calibrate on, and those held out to judge by.

Every fourth image is held out. Of these, 256 judge, spread over all; the rest calibrates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from repfx.data.batches import Batch, Batches
from repfx.deadline import check_time
from repfx.errors import InputError

EVERY, MOST = 4, 256
ROOM = 2**30  # bytes of images that are kept, so that they are not read again


class Split:
    """The batches of one source, split. `held`: the batches to judge by. Iterating gives the rest.

    `digest`: of all images, in their order. `least`: the smallest number of each input, by its
    name, or by "" where batches are tensors. Raises InputError for fewer than four images, for one
    with NaN, for a dict of tensors of different lengths, and where `Batches` does. Iterating raises
    it if the source gives other images than the first time."""

    def __init__(self, given: Any) -> None:
        self.source = Batches(given, "data", finite=True)
        self.images, self.least = 0, dict[str, float]()
        self._stride = 1  # of the images held out, every so many judge
        held: list[tuple[int, Batch]] = []  # each one image, with its place among those held out
        kept: list[Batch] = []
        digest = hashlib.blake2b()
        # An iterator can be read only once.
        room = float("inf") if isinstance(given, Iterator) else float(ROOM)
        for rest, out in self._parts():
            for part in (rest, *(one for _, one in out)):
                for name, x in _named(part):
                    digest.update(_bytes(x))
                    least = -math.inf if x.is_complex() else float(x.min())
                    self.least[name] = min(self.least.get(name, math.inf), least)
            held += [(at, one) for at, one in out if at % self._stride == 0]
            while len(held) > MOST:
                self._stride *= 2
                held = [(at, one) for at, one in held if at % self._stride == 0]
            self.images += len(rest or ()) + len(out)
            if rest is not None and room >= 0:
                kept.append(rest)
                room -= sum(x.nbytes for x in rest.tensors)
        self.digest = digest.hexdigest()
        self.kept = kept if room >= 0 else None
        if not held:
            raise InputError(
                f"quantize needs at least {EVERY} images, a few hundred are better, not "
                f"{self.images}"
            )
        self.out = len(held)
        self._judges = dict(held)
        self.held = _joined([one for _, one in held])

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.kept) if self.kept is not None else self._again()

    def _again(self) -> Iterator[Batch]:
        """Reads the images again. Raises InputError if others would be held out now."""
        for rest, out in self._parts():
            for at, one in out:
                before = self._judges.get(at)
                if before is not None and not all(map(_equal, one.tensors, before.tensors)):
                    raise InputError(
                        "the data gives other images each time it is read, so images held out "
                        "would calibrate: leave out shuffle=True and augmentation"
                    )
            if rest is not None:
                yield rest

    def __length_hint__(self) -> int:
        return len(self.kept) if self.kept is not None else length_hint(self.source)

    def __len__(self) -> int:
        """How many images calibrate."""
        return self.images - self.images // EVERY

    def first(self, count: int) -> list[Batch]:
        """The first `count` images to calibrate on, or all if there are fewer."""
        found = list[Batch]()
        for batch in self:
            found.append(_rows(batch, torch.arange(len(batch)) < count))
            count -= len(found[-1])
            if not count:
                break
        return found

    def one(self) -> Batch:
        """A single image."""
        return _rows(self.held[0], torch.arange(len(self.held[0])) < 1)

    def _parts(self) -> Iterator[tuple[Batch | None, list[tuple[int, Batch]]]]:
        """Of each batch, the rows to calibrate on, and each image held out with its number."""
        seen = 0
        for batch in self.source:
            check_time()
            count = len(batch)
            if any(x.dim() < 1 or len(x) != count for x in batch.tensors):
                sizes = ", ".join(str(tuple(x.shape)) for x in batch.tensors)
                raise InputError(
                    f"every tensor of a batch has one row for each image, not {sizes}: quantize "
                    "splits batches into images to calibrate on and images to judge by"
                )
            place = torch.arange(seen, seen + count)
            held = place % EVERY == EVERY - 1
            out = [(int(p) // EVERY, _rows(batch, place == p)) for p in place[held]]
            seen += count
            yield (None if held.all() else _rows(batch, ~held)), out


def _named(batch: Batch | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch that are not empty, each with the name of its input."""
    inputs = {} if batch is None else batch.inputs
    for name, x in inputs.items() if isinstance(inputs, Mapping) else (("", inputs),):
        if isinstance(x, Tensor) and x.numel():
            yield name, x


def _rows(batch: Batch, wanted: Tensor) -> Batch:
    """These rows of a batch, with their labels."""
    count = len(batch)

    def of(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            return value[wanted.to(value.device)]
        if hasattr(value, "__array__") and len(value) == count:
            return value[wanted.numpy()]
        if isinstance(value, (list, tuple)) and len(value) == count:
            return [v for v, keep in zip(value, wanted.tolist(), strict=True) if keep]
        return value

    inputs = batch.inputs
    found = {k: of(v) for k, v in inputs.items()} if isinstance(inputs, Mapping) else of(inputs)
    return Batch(found, of(batch.labels))


def _joined(images: list[Batch], count: int = 32) -> list[Batch]:
    """Batches of up to `count` single images that follow each other and have the same sizes."""
    found: list[list[Batch]] = []
    for one in images:
        last = found[-1] if found else []
        if last and len(last) < count and _like(last[0], one):
            last.append(one)
        else:
            found.append([one])
    return [_stacked(group) for group in found]


def _like(a: Batch, b: Batch) -> bool:
    same = [x.shape for x in a.tensors] == [x.shape for x in b.tensors]
    return same and type(a.labels) is type(b.labels)


def _stacked(images: list[Batch]) -> Batch:
    first = images[0].inputs
    labels: Any = [one.labels for one in images]
    if all(isinstance(v, Tensor) for v in labels):
        same = len({v.shape for v in labels}) == 1
        labels = torch.cat(labels) if same and labels[0].dim() else labels
    elif all(isinstance(v, (list, tuple)) for v in labels):
        labels = [v for part in labels for v in part]
    elif all(v is None for v in labels):
        labels = None
    if isinstance(first, Tensor):
        return Batch(torch.cat([one.tensor for one in images]), labels)
    inputs = {
        k: torch.cat([one.inputs[k] for one in images]) if isinstance(v, Tensor) else v  # type: ignore[index]
        for k, v in first.items()
    }
    return Batch(inputs, labels)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
