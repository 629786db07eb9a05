"""Activations of many pictures as one tensor, in memory or in a file that the system pages in and out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_numbers = itertools.count()


class Rows:
    """A tensor (N, ...) that is written a batch at a time; with `folder`, in a file there, which `close` removes."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.path: Path | None = None
        self.data: Tensor | None = None

    def fill(self, batches: Iterable[Tensor]) -> Rows:
        """Writes the rows that come in batches; of a folder, one batch is in memory at a time."""
        if self.folder is None:
            self.data = torch.cat(list(batches))
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"rows-{os.getpid()}-{next(_numbers)}"
        shape: tuple[int, ...] = ()
        dtype, count = torch.float32, 0
        with self.path.open("wb") as file:
            for part in batches:
                file.write(part.contiguous().numpy().tobytes())
                shape, dtype, count = tuple(part.shape[1:]), part.dtype, count + len(part)
        flat = torch.from_file(str(self.path), shared=True, size=count * prod(shape), dtype=dtype)
        self.data = flat.reshape(count, *shape)
        return self

    def map(self, f: Callable[[Tensor], Tensor], batch: int) -> Rows:
        """f of the rows, `batch` at a time."""
        return Rows(self.folder).fill(f(x) for x in self.batches(batch))

    def batches(self, batch: int) -> Iterable[Tensor]:
        assert self.data is not None
        return self.data.split(batch)

    def __getitem__(self, index: Tensor) -> Tensor:
        assert self.data is not None
        return self.data[index]

    def __len__(self) -> int:
        return 0 if self.data is None else len(self.data)

    def close(self) -> None:
        self.data = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)
