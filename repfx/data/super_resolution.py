"""Pairs: images and smaller versions of them, for super-resolution.

The small version of hr/a.png is lr_x2/a.png. If there are only large images, the small ones are
made by bicubic resampling. Crops, flips and rotations are a function of (seed, epoch, index), as in
`Pictures`.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from repfx.data.archive import Archive
from repfx.errors import InputError

_LUMA = np.array([65.481, 128.553, 24.966]) / 255


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Samples (low (C, h, w), high (C, scale h, scale w)) in 0..255 of a folder or zip of images.

    `part`: a folder inside, to read instead of the whole. C = 1 is Y of BT.601 (16..235), C = 3 is
    RGB. With `patch`, a sample is a random square of `high` with a side of `patch` pixels, flipped
    and rotated at random, and each image gives `repeat` samples per epoch. Without it, a sample is
    the whole image, cropped to a multiple of `scale`. `cache` keeps decoded images in memory.
    `skip_broken` works as in `Pictures`.

    Raises InputError for a missing or damaged archive, if there is no image, for a patch that is
    not a multiple of the scale or is larger than an image, for a file in `hr` without its small
    version, and for an image that cannot be read. Raises MissingPart without pillow."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        part: str = "",
        *,
        scale: int = 2,
        channels: int = 1,
        patch: int | None = None,
        repeat: int = 1,
        cache: bool = False,
        skip_broken: bool = False,
    ) -> None:
        if channels not in (1, 3):
            raise InputError(f"channels is 1 (Y) or 3 (RGB), not {channels}")
        if patch is not None and (patch < scale or patch % scale):
            raise InputError(f"patch={patch} is not a multiple of the scale {scale}")
        self.archive = Archive(path, cache)
        self.scale, self.channels, self.patch, self.repeat = (
            scale,
            channels,
            patch,
            repeat if patch else 1,
        )
        self.seed = self.epoch = 0
        self._ready: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        names = [n for n in self.archive.names if not part or PurePosixPath(n).is_relative_to(part)]
        small = {n for n in names if f"lr_x{scale}" in PurePosixPath(n).parts}
        self.names: list[tuple[str, str | None]] = []
        for name in names:
            parts = PurePosixPath(name).parts
            if any(p.startswith("lr_x") for p in parts):
                continue
            other = (
                str(PurePosixPath(*(f"lr_x{scale}" if p == "hr" else p for p in parts)))
                if "hr" in parts
                else None
            )
            if other is not None and small and other not in small:
                raise InputError(f"{path} has {name} but no {other}")
            self.names.append((name, other if other in small else None))
        if not self.names:
            raise InputError(f"no image in {path}{f', {part}' if part else ''}")
        self.broken: tuple[str, ...] = ()
        if skip_broken:
            broken = set(self.archive.readable([n for pair in self.names for n in pair if n])[1])
            self.broken = tuple(sorted(broken))
            self.names = [pair for pair in self.names if not broken & set(pair)]

    def __len__(self) -> int:
        return len(self.names) * self.repeat

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        low, high = self._pair(index % len(self.names))
        if self.patch is not None:
            side = self.patch // self.scale
            if min(low.shape[:2]) < side:
                raise InputError(
                    f"{self.names[index % len(self.names)][0]} is smaller than a patch of "
                    f"{self.patch}"
                )
            random = np.random.default_rng((self.seed, self.epoch, index))
            top, left = (int(random.integers(0, n - side + 1)) for n in low.shape[:2])
            turns, flip = int(random.integers(0, 4)), bool(random.integers(0, 2))
            cut = [
                v[top * s : (top + side) * s, left * s : (left + side) * s]
                for v, s in ((low, 1), (high, self.scale))
            ]
            low, high = (np.rot90(v[:, ::-1] if flip else v, turns) for v in cut)
        a, b = (
            torch.from_numpy(np.ascontiguousarray(v.transpose(2, 0, 1), dtype=np.float32))
            for v in (low, high)
        )
        return a, b

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Sets the seed and epoch that the crops follow from."""
        self.seed, self.epoch = seed, epoch

    def _pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One image as (h, w, C) and (scale h, scale w, C)."""
        if index in self._ready:
            return self._ready[index]
        name, other = self.names[index]
        high = self.archive.pixels(name)
        if other is not None:
            low = self.archive.pixels(other)
        else:
            from PIL import Image

            h, w = (n // self.scale for n in high.shape[:2])
            cut = Image.fromarray(high[: h * self.scale, : w * self.scale])
            low = np.asarray(cut.resize((w, h), Image.Resampling.BICUBIC))
        h, w = low.shape[0] * self.scale, low.shape[1] * self.scale
        if h > high.shape[0] or w > high.shape[1]:
            raise InputError(f"{other} times {self.scale} is larger than {name}")
        both = self._channels(low), self._channels(high[:h, :w])
        if self.archive.cache:
            self._ready[index] = both
        return both

    def _channels(self, rgb: np.ndarray) -> np.ndarray:
        return rgb if self.channels == 3 else (rgb @ _LUMA + 16)[..., None].astype(np.float32)
