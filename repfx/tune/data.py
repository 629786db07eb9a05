"""Batches from what people have: a folder of pictures, or an array file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repfx.errors import InputError, MissingPart

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Batches:
    """Batches (n, C, H, W) of a folder of pictures (searched in depth) or of a .npy file (N, ...), in a fixed order.

    Pictures are resized so that the shorter side is `size`, cropped in the centre, scaled to 0..1 and normalised with
    `mean` and `std`. An array is taken as it is. `limit` is the number of pictures at most.

    Raises InputError where there is nothing to read, MissingPart where pictures need pillow and it is not there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int = 224,
        batch: int = 32,
        limit: int = 1024,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        self.path, self.size, self.batch, self.limit = Path(path), size, batch, limit
        self.mean, self.std = mean, std
        if not self.path.exists():
            raise InputError(f"no such file or folder: {path}")
        if self.path.is_dir():
            self.files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in PICTURES)[:limit]
            count = len(self.files)
        elif self.path.suffix == ".npy":
            try:
                self.array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise InputError(f"{path} is not an array: {error}") from error
            if self.array.ndim == 0 or not np.issubdtype(self.array.dtype, np.number):
                raise InputError(f"{path} holds no batch of numbers")
            count = min(limit, len(self.array))
        else:
            raise InputError(f"{path}: data is a folder of pictures or a .npy file (N, C, H, W)")
        if not count:
            raise InputError(f"the calibration set is empty: no picture in {path}")
        self.count = count

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.count, self.batch):
            stop = min(start + self.batch, self.count)
            if self.path.is_dir():
                yield torch.stack([self._picture(p) for p in self.files[start:stop]])
            else:
                yield torch.from_numpy(np.array(self.array[start:stop], dtype=np.float32))

    def _picture(self, path: Path) -> Tensor:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise MissingPart("reading pictures needs pillow: pip install repfx[data]") from error
        try:
            with Image.open(path) as file:
                image = file.convert("RGB" if len(self.mean) == 3 else "L")
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{path} is not a readable picture: {error}") from error
        scale = self.size / min(image.size)
        image = image.resize((max(self.size, round(image.width * scale)), max(self.size, round(image.height * scale))))
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0).reshape(self.size, self.size, -1).permute(2, 0, 1)
        return (x - torch.tensor(self.mean).reshape(-1, 1, 1)) / torch.tensor(self.std).reshape(-1, 1, 1)
