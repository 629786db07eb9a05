"""Pictures: labelled pictures from class folders, on disk or in a zip. A label is the place of its folder in order.

    cats/a.jpg, dogs/b.jpg -> classes ("cats", "dogs"), samples (picture (3, H, W), label)

Augmentation is a function of (seed, epoch, index), so it does not depend on what was read before or by which worker.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from repfx.errors import InputError, MissingPart
from repfx.tune.data import IMAGENET_MEAN, IMAGENET_STD, PICTURES


class Pictures(Dataset[tuple[Tensor, int]]):
    """(picture (3, H, W), label) of a folder or zip of class folders; `part` is a folder in it, such as "train".

    Pictures are scaled to 0..1 and normalised with `mean` and `std`. With `size`, the shorter side is resized to it and
    the centre cropped; without, all must have one size. `augment` pads by `pad` pixels (an eighth of the side where it
    is None), crops at a random place and flips half of them. `classes` fixes the labels' order.

    Raises InputError for a missing or damaged archive, for no class folder, and, when it is read, for a picture that
    cannot be read, naming it. With `skip_broken` all are read once at the start and such ones are left out; `broken`
    names them. Raises MissingPart without pillow.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        part: str = "",
        *,
        augment: bool = False,
        pad: int | None = None,
        size: int | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        classes: tuple[str, ...] | None = None,
        skip_broken: bool = False,
        limit: int | None = None,
    ) -> None:
        self.path, self.part, self.augment, self.pad, self.size = Path(path), part, augment, pad, size
        self.mean, self.std = torch.tensor(mean).reshape(-1, 1, 1), torch.tensor(std).reshape(-1, 1, 1)
        self.seed = self.epoch = 0
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        _pillow()
        inside = [PurePosixPath(n) for n in names_in(self.path)]
        under = [n.relative_to(part) for n in inside if n.is_relative_to(part)] if part else inside
        labelled = sorted(n for n in under if len(n.parts) > 1)
        self.classes = classes or tuple(sorted({n.parts[0] for n in labelled}))
        strange = sorted({n.parts[0] for n in labelled} - set(self.classes))
        if strange:
            raise InputError(f"{self.path} has the class {strange[0]!r}, which is none of: {', '.join(self.classes)}")
        if not labelled:
            where = f"{path}, {part}" if part else f"{path}"
            raise InputError(f"no picture in a class folder in {where}: labels come from folders, such as cats/a.jpg")
        if limit is not None and limit < len(labelled):  # evenly over the classes, which stand one after another
            labelled = [labelled[i * len(labelled) // limit] for i in range(limit)]
        self.names = [str(PurePosixPath(part) / n) for n in labelled]
        self.labels = [self.classes.index(n.parts[0]) for n in labelled]
        self.broken: tuple[str, ...] = ()
        if skip_broken:
            self._leave_out_broken()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.from_numpy(self._pixels(self.names[index])).permute(2, 0, 1).float() / 255
        if self.augment:
            x = self._moved(x, np.random.default_rng((self.seed, self.epoch, index)))
        return (x - self.mean) / self.std, self.labels[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def set_epoch(self, seed: int, epoch: int) -> None:
        """The augmentation from here on."""
        self.seed, self.epoch = seed, epoch

    def _moved(self, x: Tensor, random: np.random.Generator) -> Tensor:
        pad = max(1, min(x.shape[1:]) // 8) if self.pad is None else self.pad
        top, left = (int(v) for v in random.integers(0, 2 * pad + 1, 2))
        flip = bool(random.integers(0, 2))
        x = torch.nn.functional.pad(x, (pad,) * 4)[:, top : top + x.shape[1], left : left + x.shape[2]]
        return x.flip(2) if flip else x

    def _pixels(self, name: str) -> np.ndarray:
        """(H, W, 3 or 1), 0..255."""
        image = _pillow()
        try:
            with image.open(io.BytesIO(self._bytes(name))) as file:
                picture = file.convert("RGB" if len(self.mean) == 3 else "L")
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: {name} is not a readable picture; skip_broken=True leaves such out") from error
        if self.size is not None:
            scale = self.size / min(picture.size)
            wide, high = (max(self.size, round(v * scale)) for v in picture.size)
            left, top = (wide - self.size) // 2, (high - self.size) // 2
            picture = picture.resize((wide, high)).crop((left, top, left + self.size, top + self.size))
        return np.array(picture).reshape(picture.height, picture.width, -1)

    def _bytes(self, name: str) -> bytes:
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        if self._archive is None or self._archive[0] != os.getpid():  # a forked reader must not share the file position
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1].read(name)

    def _leave_out_broken(self) -> None:
        good, broken = [], []
        for i, name in enumerate(self.names):
            try:
                self._pixels(name)
                good.append(i)
            except InputError:
                broken.append(name)
        if not good:
            raise InputError(f"{self.path}: no picture can be read, such as {broken[0]}")
        self.names, self.labels = [self.names[i] for i in good], [self.labels[i] for i in good]
        self.broken = tuple(broken)


def names_in(path: Path) -> list[str]:
    """The pictures under a folder or in a zip, as paths with slashes. Raises InputError where it is neither."""
    if path.is_dir():
        found = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    elif not path.exists():
        raise InputError(f"no such file or folder: {path}")
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                found = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path} is neither a folder nor a readable zip of class folders") from error
    return sorted(n for n in found if PurePosixPath(n).suffix.lower() in PICTURES)


def train_and_valid(path: str | os.PathLike[str], **options: Any) -> tuple[Pictures, Pictures | None]:
    """What to train on (augmented) and to validate on: `train/` and `test/`, `val/` or `valid/` in it, or all and None."""
    tops = {PurePosixPath(n).parts[0] for n in names_in(Path(path))}
    if "train" not in tops:
        return Pictures(path, augment=True, **options), None
    train = Pictures(path, "train", augment=True, **options)
    other = next((t for t in ("val", "valid", "test") if t in tops), None)
    return train, None if other is None else Pictures(path, other, classes=train.classes, **options)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPart("reading pictures needs pillow: pip install repfx[train]") from error
    return Image
