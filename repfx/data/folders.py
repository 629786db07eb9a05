"""Images: batches without labels, from a folder or zip of images, or from an array file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repfx.data.archive import IMAGENET_MEAN, IMAGENET_STD, Archive, Size
from repfx.data.preprocessing import Preprocessing
from repfx.errors import InputError


class Images(Dataset[Tensor]):
    """Images (C, H, W) of a folder or zip and its subfolders, or the rows of a .npy file.

    `size`, `fit`, `crop`, `mean`, `std`, `order` and `peak`: see `Preprocessing`. The rows of an
    array (N, ...) are used unchanged. At most `limit` images are used, spread evenly over those
    found. With `skip_broken` all of these are read once at the start, and damaged ones are left out
    and listed in `broken`. `found`: how many there are.

    Raises InputError if there is nothing to read and for an image that cannot be read. Raises
    MissingPart if images are read without pillow."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: Size | None = 224,
        fit: str = "crop",
        limit: int | None = 1024,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        crop: float = 1.0,
        order: str = "RGB",
        peak: float = 1.0,
        skip_broken: bool = False,
    ) -> None:
        how = Preprocessing(size, fit, crop, mean, std, order, peak)
        self.path = Path(path)
        self.archive: Archive | None = None
        self.array: np.ndarray | None = None
        if not self.path.exists():
            raise InputError(f"no such file or folder: {path}")
        if self.path.is_dir() or self.path.suffix.lower() == ".zip":
            self.archive = Archive(self.path)
            count = len(self.archive.names)
        elif self.path.suffix.lower() == ".npy":
            try:
                self.array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise InputError(f"{path} is not an array file: {error}") from error
            if self.array.ndim == 0 or not np.issubdtype(self.array.dtype, np.number):
                raise InputError(f"{path} is not an array of numbers with a batch axis")
            count = len(self.array)
        else:
            raise InputError(
                f"{path}: data is a folder or zip of images, or a .npy file (N, C, H, W)"
            )
        if not count:
            raise InputError(f"the calibration set is empty: no image in {path}")
        self.found = count
        self.how = how
        kept = count if limit is None else min(limit, count)
        self.rows = [i * count // kept for i in range(kept)]
        self.broken: tuple[str, ...] = ()
        if skip_broken and self.archive is not None:
            names = self.archive.names
            bad = self.archive.readable([names[row] for row in self.rows], len(mean))[1]
            self.rows = [row for row in self.rows if names[row] not in bad]
            self.broken = tuple(bad)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        row = self.rows[index]
        if self.archive is None:
            assert self.array is not None
            return torch.from_numpy(np.array(self.array[row], dtype=np.float32))
        return self.how.of(self.archive, self.archive.names[row])

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images become inputs; None for an array, whose rows are inputs already."""
        return None if self.archive is None else self.how

    def batches(self, batch: int = 32, workers: int = 0) -> DataLoader[Tensor]:
        """Batches of `batch` images, in order, read by `workers` processes."""
        return DataLoader(self, batch, num_workers=workers)
