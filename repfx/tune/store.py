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
    """A tensor (N, ...) that is written a batch at a time; with `folder`, in a file there that is gone when it is."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.data: Tensor | None = None

    def fill(self, batches: Iterable[Tensor]) -> Rows:
        """Writes the rows that come in batches; of a folder, one batch is in memory at a time."""
        if self.folder is None:
            self.data = torch.cat(list(batches))
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rows-{os.getpid()}-{next(_numbers)}"
        shape: tuple[int, ...] = ()
        dtype, count = torch.float32, 0
        try:
            with path.open("wb") as file:
                for part in batches:
                    file.write(part.contiguous().numpy().tobytes())
                    shape, dtype, count = tuple(part.shape[1:]), part.dtype, count + len(part)
            flat = torch.from_file(str(path), shared=True, size=count * prod(shape), dtype=dtype)
        finally:  # what is mapped lives on without its name, so that no interruption leaves a file
            path.unlink(missing_ok=True)
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
