"""Archive: the images of a folder or a zip, read by name, by any number of processes."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Container
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repfx.errors import InputError, MissingPart

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
Size = int | tuple[int, int]  # height and width, or the side of a square
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Archive:
    """The images of a folder or a zip; `names` are their paths, sorted, with slashes.

    With `cache`, decoded images stay in memory. Raises InputError if the path is neither a folder
    nor a zip. Reading an image that is damaged raises InputError too, and names the image."""

    def __init__(self, path: str | os.PathLike[str], cache: bool = False) -> None:
        self.path = Path(path)
        self.names = names_in(self.path)
        self.cache = cache
        self._decoded: dict[Any, np.ndarray] = {}
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        _pillow()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def pixels(self, name: str, channels: int = 3, size: Size | None = None) -> np.ndarray:
        """One image as (H, W, channels), 0..255.

        With `size`, it is resized in its proportions to cover it, and the centre is cropped."""
        key = (name, channels, size)
        if key not in self._decoded:
            found = self._decode(*key)
            if not self.cache:
                return found
            self._decoded[key] = found
        return self._decoded[key]

    def _decode(self, name: str, channels: int, size: Size | None) -> np.ndarray:
        image = _pillow()
        try:
            with image.open(io.BytesIO(self.read(name))) as file:
                picture = file.convert("RGB" if channels == 3 else "L")
        except (
            OSError,
            ValueError,
            SyntaxError,
            zipfile.BadZipFile,
            image.DecompressionBombError,
        ) as error:
            raise InputError(
                f"{self.path}: {name} is not a readable image; skip_broken=True skips such images"
            ) from error
        if size is not None:
            rows, columns = both_sides(size)
            scale = max(columns / picture.width, rows / picture.height)
            wide = max(columns, round(picture.width * scale))
            high = max(rows, round(picture.height * scale))
            left, top = (wide - columns) // 2, (high - rows) // 2
            picture = picture.resize((wide, high)).crop((left, top, left + columns, top + rows))
        return np.array(picture).reshape(picture.height, picture.width, channels)

    def read(self, name: str) -> bytes:
        """The content of one file, which need not be an image."""
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        # A forked process must not share the file position with its parent.
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        return self._zip[1].read(name)

    def readable(
        self, names: list[str], channels: int = 3, size: Size | None = None
    ) -> tuple[list[str], list[str]]:
        """The names that can be read, and those that cannot. Raises InputError if none can."""
        good: list[str] = []
        broken: list[str] = []
        for name in names:
            try:
                self.pixels(name, channels, size)
                good.append(name)
            except InputError:
                broken.append(name)
        if not good:
            raise InputError(f"{self.path}: none of the images can be read, such as {broken[0]}")
        return good, broken


def names_in(path: Path, endings: Container[str] = PICTURES) -> list[str]:
    """The paths of the images under a folder or in a zip, sorted, with slashes.

    `endings`: those of other files to look for. Raises InputError if the path is neither."""
    if path.is_dir():
        found = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    elif not path.exists():
        raise InputError(f"no such file or folder: {path}")
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                found = [
                    n
                    for n in archive.namelist()
                    if not n.endswith("/") and not n.startswith("__MACOSX/")
                ]
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path} is neither a folder nor a readable zip of images") from error
    return sorted(n for n in found if PurePosixPath(n).suffix.lower() in endings)


def normalised(pixels: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels (H, W, C) in 0..255 -> (C, H, W): (pixels / 255 - mean) / std, these (C, 1, 1)."""
    return (
        torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255 - mean
    ) / std


def both_sides(size: Size) -> tuple[int, int]:
    """Height and width. Raises InputError for something else."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(v, int) and v > 0 for v in sides):
        raise InputError(f"size is (height, width) or the side of a square, not {size!r}")
    return sides


def by_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, device="cpu").reshape(-1, 1, 1)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPart("reading images needs pillow: pip install repfx[data]") from error
    return Image
