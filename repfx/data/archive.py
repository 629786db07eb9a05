"""Archive: the images of a folder or a zip, read by name, by any number of processes."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Container, Iterator
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

    def pixels(
        self, name: str, channels: int = 3, size: Size | None = None, crop: float = 1.0
    ) -> np.ndarray:
        """One image as (H, W, channels), 0..255.

        With `size`, it is resized in its proportions to cover it, or more where `crop` is the share
        that is to stay, and the centre is cropped."""
        key = (name, channels, size, crop)
        if key not in self._decoded:
            found = self._decode(*key)
            if not self.cache:
                return found
            self._decoded[key] = found
        return self._decoded[key]

    def _decode(self, name: str, channels: int, size: Size | None, crop: float) -> np.ndarray:
        image = _pillow()
        try:
            with image.open(io.BytesIO(self.read(name))) as file:
                picture = upright(file).convert("RGB" if channels == 3 else "L")
        except Exception as error:  # decoders raise all kinds of errors on strange bytes
            raise InputError(
                f"{self.path}: {name} is not a readable image; skip_broken=True skips such images"
            ) from error
        if size is not None:
            rows, columns = both_sides(size)
            scale = max(columns / picture.width, rows / picture.height) / crop
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

    `endings`: those of other files to look for. Links to folders are followed. Hidden files and
    what macOS leaves beside files (`._a.jpg`, `__MACOSX/`) are no images. Raises InputError if the
    path is neither."""
    if path.is_dir():
        found = [p.relative_to(path).as_posix() for p in _under(path, ())]
    elif not path.exists():
        raise InputError(f"no such file or folder: {path}")
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                found = [n for n in archive.namelist() if not n.endswith("/")]
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path} is neither a folder nor a readable zip of images") from error
    return sorted(n for n in found if _wanted(PurePosixPath(n), endings))


def _wanted(name: PurePosixPath, endings: Container[str]) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
    return name.suffix.lower() in endings and not hidden


def _under(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files under a folder, also behind links, unless they lead back to a folder above."""
    real = folder.resolve()
    if real in above:
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _under(entry, (*above, real))
        elif entry.is_file():
            yield entry


def upright(picture: Any) -> Any:
    """An opened image, turned as its EXIF says, in 8 bits.

    Pillow cuts 16-bit gray off at 255 and rounds floats to 0 and 1. Here 0..65535 becomes 0..255,
    and so do floats in 0..1. Floats above that (and above what resampling adds) are in 0..255."""
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        most = float(values.max(initial=0))
        if picture.mode == "F":
            scale = 255.0 if most <= 1.5 else 1.0
        else:  # Pillow also opens some images of 16 bits with 32
            scale = 1 / 257 if picture.mode != "I" or most > 255 else 1.0
        eight = (values * scale).round().clip(0, 255).astype(np.uint8)
        return _pillow().fromarray(eight)
    return picture


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
