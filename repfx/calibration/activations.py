"""Activations of many pictures, in memory or in files that the system pages in and out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from repfx.calibration.segments import Segment

_numbers = itertools.count()
Values = tuple[Tensor, ...]


class Rows:
    """Tensors (N, ...), one for each value at a place, written a batch at a time and read on
    `device`.

    They stay on a GPU while they fit there, and are else kept in the machine's memory; with
    `folder`, each is a file there that is gone when it is."""

    def __init__(self, folder: str | os.PathLike[str] | None, device: torch.device) -> None:
        self.folder, self.device = None if folder is None else Path(folder), device
        self.data: Values = ()

    def fill(self, batches: Iterable[Values]) -> Rows:
        """Writes the rows that come in batches; of a folder, one batch is in memory at a time."""
        columns: list[_InMemory | _InFile] = []
        try:
            for values in batches:
                columns = columns or [self._column(len(values)) for _ in values]
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
        """The rows after a block of these before it, run `batch` at a time; what it only passes on
        is not copied.
        """
        found = Rows(self.folder, self.device).fill(
            block.made(block(*values)) for values in self.batches(batch)
        )
        found.data = (*found.data, *(self.data[i] for i in block.passed))
        return found

    def batches(self, batch: int) -> Iterator[Values]:
        for parts in zip(*(column.split(batch) for column in self.data), strict=True):
            yield tuple(part.to(self.device) for part in parts)

    def __getitem__(self, index: Tensor) -> Values:
        return tuple(column[index].to(self.device) for column in self.data)

    def __len__(self) -> int:
        return len(self.data[0]) if self.data else 0


def _room(device: torch.device) -> int:
    """Bytes of a GPU that activations may take: a quarter of what is free, which leaves as much for
    those after a block.
    """
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + kept) // 4


class _InMemory:
    """On `device` while there is `room` for it, in bytes."""

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
        self.file.write(
            part.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )  # numpy knows no bfloat16
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
        # What is mapped lives on without its name, so an interruption leaves no file behind.
        self.file.close()
        self.path.unlink(missing_ok=True)
