"""Activations of many images, in memory or in files that the system pages in and out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from repfx.calibration.segments import Segment
from repfx.deadline import check_time

_numbers = itertools.count()
Values = tuple[Tensor, ...]


class Rows:
    """Tensors (N, ...), one for each value at a cut, written batch by batch and read on `device`.

    They stay on a GPU while they fit, and are otherwise kept in main memory. With `folder`, each
    one is a file in that folder, which disappears together with the tensor."""

    def __init__(self, folder: str | os.PathLike[str] | None, device: torch.device) -> None:
        self.folder, self.device = None if folder is None else Path(folder), device
        self.data: Values = ()
        self.sizes: list[int] = []  # of the batches that were written

    def fill(self, batches: Iterable[Values]) -> Rows:
        """Writes the rows of all batches; with a folder, only one batch is in memory at a time."""
        columns: list[_InMemory | _InFile] = []
        try:
            for values in batches:
                check_time()
                columns = columns or [self._column(len(values)) for _ in values]
                self.sizes.append(len(values[0]))
                for column, part in zip(columns, values, strict=True):
                    column.add(part.detach())
            self.data = tuple(c.whole() for c in columns)
        finally:
            for c in columns:
                c.close()
        return self

    def _column(self, of: int) -> _InMemory | _InFile:
        return (
            _InMemory(self.device, _room(self.device) // of)
            if self.folder is None
            else _InFile(self.folder)
        )

    def after(self, block: Segment, batch: int) -> Rows:
        """The rows after a block, run `batch` images at a time; passed values are not copied."""
        found = Rows(self.folder, self.device).fill(
            block.made(block(*values)) for values in self.batches(batch)
        )
        passed = block.passed if self.data else ()  # this process may have no image
        found.data = (*found.data, *(self.data[i] for i in passed))
        return found

    def batches(self, batch: int) -> Iterator[Values]:
        """The batches as they were written, cut into parts of at most `batch` rows.

        So what is measured on them does not depend on how processes share them."""
        sizes = [min(batch, n - at) for n in self.sizes for at in range(0, n, batch)]
        for parts in zip(*(column.split(sizes) for column in self.data), strict=True):
            yield tuple(part.to(self.device) for part in parts)

    def __getitem__(self, index: Tensor) -> Values:
        return tuple(column[index].to(self.device) for column in self.data)

    def __len__(self) -> int:
        return len(self.data[0]) if self.data else 0


def _room(device: torch.device) -> int:
    """The bytes that activations may take on a GPU: a quarter of the free memory.

    The activations after a block may take as much again."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + kept) // 4


class _InMemory:
    """A tensor that stays on `device` while it fits into `room` bytes, and else in main memory."""

    def __init__(self, device: torch.device, room: int) -> None:
        self.parts: list[Tensor] = []
        self.device, self.room = device, room

    def add(self, part: Tensor) -> None:
        self.room -= part.nbytes
        if self.room < 0 and self.device.type != "cpu":
            self.device = torch.device("cpu")
            self.parts = [p.cpu() for p in self.parts]
        self.parts.append(part.to(self.device))

    def whole(self) -> Tensor:
        return torch.cat(self.parts)

    def close(self) -> None:
        self.parts = []


class _InFile:
    def __init__(self, folder: Path) -> None:
        self.path = folder / f"rows-{os.getpid()}-{next(_numbers)}"
        self.file = self.path.open("wb")
        self.shape: tuple[int, ...] = ()
        self.dtype, self.count = torch.float32, 0

    def add(self, part: Tensor) -> None:
        # As bytes, because numpy has no bfloat16.
        self.file.write(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.shape, self.dtype, self.count = (
            tuple(part.shape[1:]),
            part.dtype,
            self.count + len(part),
        )

    def whole(self) -> Tensor:
        self.file.flush()
        size = self.count * prod(self.shape)
        flat = torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype)
        return flat.reshape(self.count, *self.shape)

    def close(self) -> None:
        # A mapped file stays readable after it is unlinked, so an interruption leaves no file.
        self.file.close()
        self.path.unlink(missing_ok=True)
