"""Pictures: labelled images from class folders, on disk or in a zip.

    cats/a.jpg, dogs/b.jpg -> classes ("cats", "dogs"), samples (image (3, H, W), label)

A label is the index of the class. Augmentation is a function of (seed, epoch, index), so it does
not depend on what was read before, or on which worker reads."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from repfx.data.archive import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Archive,
    Size,
    names_in,
)
from repfx.data.preprocessing import Preprocessing
from repfx.errors import InputError


class Pictures(Dataset[tuple[Tensor, int]]):
    """Samples (image (3, H, W), label) of a folder or zip of class folders.

    `part`: a folder inside, such as "train", to read instead of the whole. Images are scaled to
    0..1 and normalised with `mean` and `std`. With `size`, (H, W) or the side of a square, they are
    resized to cover it and the centre is cropped; without it, all must have the same size.
    `augment` pads an image by `pad` pixels (by default an eighth of the shorter side), crops it at
    a random place and flips half of the images. `classes` sets the order of the labels. `limit`
    takes that many images, evenly over the classes. `cache` keeps decoded images in memory.
    `preprocessing`: in place of size, mean and std.

    Raises InputError for a missing or damaged archive and if there is no class folder. Reading an
    image that is damaged raises InputError and names it. With `skip_broken` all images are read
    once at the start; damaged ones are skipped and listed in `broken`. Raises MissingPart without
    pillow."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        part: str = "",
        *,
        augment: bool = False,
        pad: int | None = None,
        size: Size | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        classes: tuple[str, ...] | None = None,
        skip_broken: bool = False,
        limit: int | None = None,
        cache: bool = False,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.archive, self.part, self.augment, self.pad = Archive(path, cache), part, augment, pad
        self.preprocessing = preprocessing or Preprocessing(size, mean=mean, std=std)
        if augment and self.preprocessing.fit != "crop":
            raise InputError("augment crops images, so it needs a preprocessing of fit=crop")
        self.seed = self.epoch = 0
        inside = [PurePosixPath(n) for n in self.archive.names]
        under = [n.relative_to(part) for n in inside if n.is_relative_to(part)] if part else inside
        labelled = sorted(n for n in under if len(n.parts) > 1)
        self.classes = classes or tuple(sorted({n.parts[0] for n in labelled}))
        strange = sorted({n.parts[0] for n in labelled} - set(self.classes))
        if strange:
            raise InputError(
                f"{path} has the class {strange[0]!r}; it must be one of: {', '.join(self.classes)}"
            )
        if not labelled:
            where = f"{path}, {part}" if part else f"{path}"
            raise InputError(
                f"no image in a class folder in {where}: labels come from folders, such "
                "as cats/a.jpg"
            )
        # Equal steps, because the list is sorted by class.
        if limit is not None and limit < len(labelled):
            labelled = [labelled[i * len(labelled) // limit] for i in range(limit)]
        self.names = [str(PurePosixPath(part) / n) for n in labelled]
        self.broken: tuple[str, ...] = ()
        if skip_broken:
            how = self.preprocessing
            self.names, broken = self.archive.readable(self.names, how.channels, how.size)
            self.broken = tuple(broken)
        depth = len(PurePosixPath(part).parts) if part else 0
        self.labels = [self.classes.index(PurePosixPath(n).parts[depth]) for n in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        how, name = self.preprocessing, self.names[index]
        if not self.augment:
            return how.of(self.archive, name), self.labels[index]
        pixels = self.archive.pixels(name, how.channels, how.size, how.crop)
        pixels = self._moved(pixels, np.random.default_rng((self.seed, self.epoch, index)))
        return how(pixels), self.labels[index]

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Sets the seed and epoch that the augmentation follows from."""
        self.seed, self.epoch = seed, epoch

    def _moved(self, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
        h, w, _ = v.shape
        pad = max(1, min(h, w) // 8) if self.pad is None else self.pad
        top, left = (int(n) for n in random.integers(0, 2 * pad + 1, 2))
        v = np.pad(v, ((pad, pad), (pad, pad), (0, 0)))[top : top + h, left : left + w]
        return np.ascontiguousarray(v[:, ::-1]) if random.integers(0, 2) else v


def train_and_valid(
    path: str | os.PathLike[str], **options: Any
) -> tuple[Pictures, Pictures | None]:
    """The training set, augmented, and the validation set, or None if there is none.

    They are the folders `train/` and `val/`, `valid/` or `test/`. Without `train/`, everything is
    the training set. `options` are those of Pictures."""
    found = validation_part(path)
    if found is None:
        return Pictures(path, augment=True, **options), None
    train = Pictures(path, "train", augment=True, **options)
    return train, None if not found else Pictures(path, found, classes=train.classes, **options)


def validation_part(path: str | os.PathLike[str]) -> str | None:
    """The name of the validation folder next to `train`: the first of `val`, `valid` and `test`.

    It is "" if `train` has no such neighbour, and None if there is no `train`."""
    tops = {PurePosixPath(n).parts[0] for n in names_in(Path(path))}
    if "train" not in tops:
        return None
    return next((t for t in ("val", "valid", "test") if t in tops), "")
