"""Images: batches without labels, from a folder or zip of images, or from an array file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repfx.data.archive import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Archive,
    Size,
    both_sides,
    normalised,
    normaliser,
)
from repfx.data.letterbox import fitted, framed
from repfx.errors import InputError, unknown

FITS = ("crop", "letterbox")


class Images(Dataset[Tensor]):
    """Images (C, H, W) of a folder or zip and its subfolders, or the rows of a .npy file.

    Images are resized in their proportions to `size`, (H, W) or the side of a square, scaled to
    0..1 and normalised with `mean` and `std`. `fit`: "crop" fills the size and cuts off the rest,
    "letterbox" shows the whole image and fills the rest with the mean colour. The rows of an array
    (N, ...) are used unchanged. At most `limit` images are used, spread evenly over those found.
    With `skip_broken` all of these are read once at the start, and damaged ones are left out and
    listed in `broken`. `found`: how many there are.

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
        skip_broken: bool = False,
    ) -> None:
        if fit not in FITS:
            raise unknown("fit", fit, FITS)
        self.path, self.size = Path(path), None if size is None else both_sides(size)
        self.letterbox = fit == "letterbox"
        self.mean, self.std = normaliser(mean, std)
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
        name, channels = self.archive.names[row], len(self.mean)
        if self.size is None or not self.letterbox:
            return normalised(self.archive.pixels(name, channels, self.size), self.mean, self.std)
        whole = torch.from_numpy(self.archive.pixels(name, channels)).permute(2, 0, 1)
        return framed(fitted(whole, self.size), self.size, self.mean, self.std)

    def batches(self, batch: int = 32, workers: int = 0) -> DataLoader[Tensor]:
        """Batches of `batch` images, in order, read by `workers` processes."""
        return DataLoader(self, batch, num_workers=workers)
