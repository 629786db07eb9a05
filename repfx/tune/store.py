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

    def fill(self, count: int, batches: Iterable[Tensor]) -> Rows:
        """Writes `count` rows that come in batches."""
        at = 0
        for part in batches:
            if self.data is None:
                self.data = self._empty((count, *part.shape[1:]), part.dtype)
            self.data[at : at + len(part)] = part
            at += len(part)
        return self

    def map(self, f: Callable[[Tensor], Tensor], batch: int) -> Rows:
        """f of the rows, `batch` at a time."""
        return Rows(self.folder).fill(len(self), (f(x) for x in self.batches(batch)))

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

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.folder is None:
            return torch.empty(shape, dtype=dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"rows-{os.getpid()}-{next(_numbers)}"
        return torch.from_file(str(self.path), shared=True, size=prod(shape), dtype=dtype).reshape(shape)
