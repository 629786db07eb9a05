"""Preprocessing: how an image becomes the input of a model. It is given once and kept with it.

pixels 0..255 -> resized and cropped -> channels in order -> x = (pixels * peak / 255 - mean) / std
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate

from repfx.data.archive import IMAGENET_MEAN, IMAGENET_STD, Archive, Size, both_sides, by_channel
from repfx.data.letterbox import fitted, in_frame
from repfx.errors import InputError, unknown

FITS = ("crop", "letterbox")
ORDERS = ("RGB", "BGR")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input (C, H, W).

    `size`: (H, W), the side of a square, or None to leave images as they are. `fit`: "crop" resizes
    an image in its proportions to cover the size and cuts off the rest, "letterbox" shows the whole
    image and fills the rest with the mean colour. `crop`: the share of the resized image that stays
    in the centre, such as 0.875 for the usual 224 of 256 pixels. `mean` and `std`: of each channel,
    1 (gray) or 3, in the order and range of the input. `order`: RGB or BGR. `peak`: the largest
    value of a pixel before the mean is taken off, 1 or 255.

    Raises InputError for values out of range and for lists of different lengths."""

    size: Size | None = 224
    fit: str = "crop"
    crop: float = 1.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    order: str = "RGB"
    peak: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (("fit", self.fit, FITS), ("order", self.order, ORDERS)):
            if value not in known:
                raise unknown(name, str(value), known)
        own: dict[str, Any] = {"mean": self.mean, "std": self.std}
        for name, values in own.items():
            if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                raise InputError(f"{name} is a number for each channel, not {values!r}")
            object.__setattr__(self, name, tuple(map(float, values)))
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InputError(
                "mean and std have a value for each channel, 1 (gray) or 3 (RGB), not "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if not all(v > 0 for v in self.std):
            raise InputError(f"std is above 0, not {', '.join(map(str, self.std))}")
        if self.size is not None:
            object.__setattr__(self, "size", both_sides(self.size))
        if self.fit == "letterbox" and self.crop != 1:
            raise InputError("crop is for fit=crop: a letterbox shows the whole image")
        if not 0 < self.crop <= 1:
            raise InputError(f"crop is a share of the image, above 0 and up to 1, not {self.crop}")
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise InputError(f"peak is the largest value, such as 1 or 255, not {self.peak}")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def of(self, archive: Archive, name: str) -> Tensor:
        """One image of an archive as an input (C, H, W)."""
        if self.size is None or self.fit == "crop":
            return self(archive.pixels(name, self.channels, self.size, self.crop))
        whole = torch.from_numpy(archive.pixels(name, self.channels)).permute(2, 0, 1)
        image = self(fitted(whole, both_sides(self.size)).permute(1, 2, 0).numpy())
        return in_frame(image, both_sides(self.size))

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Pixels (H, W, C) in 0..255, RGB -> (C, H, W)."""
        values = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float()
        if self.order == "BGR":
            values = values.flip(0)
        scaled = values / 255 if self.peak == 1 else values * (self.peak / 255)
        return (scaled - by_channel(self.mean)) / by_channel(self.std)

    def json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(given: Mapping[str, Any]) -> Preprocessing:
        """The record that `json` wrote, parsed. Raises InputError or TypeError for another."""
        lists: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return Preprocessing(**lists)


def preprocessing_of(data: Any) -> Preprocessing | None:
    """That of a data set, of a DataLoader of one, or of a subset; None where there is none.

    None, too, where other code may change what the data set gives: a wrapper around it, or a
    `collate_fn` of the caller."""
    while isinstance(data, (DataLoader, Subset)):
        if isinstance(data, DataLoader) and data.collate_fn is not default_collate:
            return None
        data = data.dataset
    found = getattr(data, "preprocessing", None)
    return found if isinstance(found, Preprocessing) else None
