"""Images as people have them: depths, orientation, names, folders, and their right values."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repfx.data import Boxes, Images, Pictures
from repfx.data.archive import names_in
from repfx.errors import InputError

RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))  # (64, 64), 0 to 252


def as_read(folder: Path, **options: Any) -> np.ndarray:
    """The first image of a folder, (H, W, 3) in 0..255."""
    same: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "size": None}
    return np.asarray(Images(folder, **{**same, **options})[0].permute(1, 2, 0) * 255).round()


DEPTHS: dict[str, tuple[Any, str]] = {
    "8 bits": (RAMP, "png"),
    "16 bits": (RAMP.astype(np.uint16) * 257, "png"),
    "16 bits, tif": (RAMP.astype(np.uint16) * 257, "tif"),
    "16 bits, dark": (np.minimum(RAMP.astype(np.uint16) * 257, 20_000), "png"),
    "32 bits, of 16": (RAMP.astype(np.int32) * 257, "tif"),
    "32 bits, of 8": (RAMP.astype(np.int32), "tif"),
    "float": ((RAMP / 255).astype(np.float32), "tif"),
    "float, overshot": (np.where(RAMP == 252, 1.02, RAMP / 255).astype(np.float32), "tif"),
    "float, a NaN": (np.where(RAMP == 0, np.nan, RAMP / 255).astype(np.float32), "tif"),
    "float, 0 to 255": (RAMP.astype(np.float32), "tif"),
    "one bit": (RAMP > 100, "png"),
}


@pytest.mark.parametrize("depth", list(DEPTHS))
def test_every_depth_is_0_to_255(depth: str, tmp_path: Path) -> None:
    values, ending = DEPTHS[depth]
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    right = {
        "16 bits, dark": np.minimum(RAMP, 20_000 / 257).round(),
        "one bit": 255.0 * (RAMP > 100),
        "float, overshot": np.where(RAMP == 252, 255.0, RAMP),
    }.get(depth, RAMP.astype(float))
    assert np.abs(as_read(tmp_path) - right[..., None]).max() <= 1


def test_colour_modes(tmp_path: Path) -> None:
    rgb = np.stack([RAMP, 255 - RAMP, RAMP // 2], -1)
    picture = Image.fromarray(rgb)
    kinds = {
        "rgba.png": Image.fromarray(np.dstack([rgb, np.full_like(RAMP, 9)])),
        "palette.png": picture.quantize(256),
        "cmyk.tif": picture.convert("CMYK"),
        "gray.png": picture.convert("L"),
        "la.png": picture.convert("LA"),
    }
    for name, kind in kinds.items():
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        (tmp_path / "d").mkdir()
        kind.save(tmp_path / "d" / name)
        right = np.asarray(picture.convert("L").convert("RGB")) if name[:2] in ("gr", "la") else rgb
        assert np.abs(as_read(tmp_path / "d") - right).max() <= (40 if "palette" in name else 1)


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(turn: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turn
    picture.save(tmp_path / "a.png", exif=exif)
    rows = np.asarray(picture)
    turned = [
        *(rows, rows[:, ::-1], rows[::-1, ::-1], rows[::-1]),
        *(rows.swapaxes(0, 1), np.rot90(rows, -1), rows[::-1, ::-1].swapaxes(0, 1), np.rot90(rows)),
    ][turn - 1]
    assert np.array_equal(as_read(tmp_path), turned)


def picture() -> Image.Image:
    return Image.fromarray(np.stack([RAMP, 255 - RAMP, RAMP // 2], -1))


def test_what_macos_leaves_and_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("cats/a.png", "b.JPG", "c.Jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name, "PNG" if name.endswith("png") else "JPEG")
    for name in ("cats/._a.png", "__MACOSX/b.JPG", ".hidden.png", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7" * 9)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    right = ["b.JPG", "c.Jpeg", "cats/a.png"]
    assert names_in(tmp_path) == right
    with zipfile.ZipFile(tmp_path / "z.ZIP", "w") as archive:
        for file in sorted(tmp_path.rglob("*")):
            if file.suffix != ".ZIP":
                archive.write(file, file.relative_to(tmp_path).as_posix())
    assert names_in(tmp_path / "z.ZIP") == right
    assert len(Images(tmp_path / "z.ZIP", size=8)) == 3
    with zipfile.ZipFile(tmp_path / "dots.zip", "w") as archive:
        archive.write(tmp_path / "cats" / "a.png", "x")
        archive.writestr("./cats/a.png", (tmp_path / "cats" / "a.png").read_bytes())
    assert Images(tmp_path / "dots.zip", size=8)[0].shape == (3, 8, 8)
    assert len(Images(tmp_path, size=8)) == 3


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "real" / "cats").mkdir(parents=True)
    picture().save(tmp_path / "real" / "cats" / "a.png")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "real" / "cats", tmp_path / "set" / "cats")
    os.symlink(tmp_path / "set", tmp_path / "set" / "round")  # a circle
    assert names_in(tmp_path / "set") == ["cats/a.png"]
    assert Pictures(tmp_path / "set", size=8).classes == ("cats",)
    os.symlink(tmp_path / "real" / "cats", tmp_path / "set" / "dogs")  # two names of one folder
    assert names_in(tmp_path / "set") == ["cats/a.png", "dogs/a.png"]


def test_an_array_file_with_an_upper_case_ending(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3, 4, 4), np.float32))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    assert len(Images(tmp_path / "A.NPY")) == 2


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.5, 0.5, 0.5), "not 1 and 3"),
        ((0.1,) * 4, (1.0,) * 4, "not 4 and 4"),
        ((), (), "not 0 and 0"),
        ((0.1,) * 3, (1.0, 0.0, 1.0), "std is above 0"),
        ((0.1,) * 3, (1.0, -1.0, 1.0), "std is above 0"),
    ],
)
def test_mean_and_std(mean: Any, std: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    picture().save(tmp_path / "cats" / "a.png")
    for kind in (Images, Pictures):
        with pytest.raises(InputError, match=message):
            kind(tmp_path, mean=mean, std=std)
    with pytest.raises(InputError, match=message):
        Boxes(tmp_path, mean=mean, std=std)
    assert Images(tmp_path, mean=(0.5,), std=(0.5,), size=8)[0].shape == (1, 8, 8)


def test_broken_images_are_left_out_on_request(tmp_path: Path) -> None:
    for i in range(6):
        picture().save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "4.png").write_bytes((tmp_path / "5.png").read_bytes()[:90])
    with pytest.raises(InputError, match=r"3\.png is not a readable image"):
        list(Images(tmp_path, size=8).batches())
    images = Images(tmp_path, size=8, skip_broken=True)
    assert images.broken == ("3.png", "4.png") and len(images) == 4 and images.found == 6
    assert torch.cat(list(images.batches(3))).shape == (4, 3, 8, 8)
    few = Images(tmp_path, size=8, skip_broken=True, limit=2)  # 0 and 3
    assert len(few) == 1 and few.broken == ("3.png",)
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(InputError, match="none of the images can be read"):
        Images(tmp_path, size=8, skip_broken=True)


@pytest.mark.parametrize("size", [(20, 50), (50, 20), 33, (64, 64), (7, 90)])
def test_a_crop_is_the_middle_in_its_proportions(size: Any, tmp_path: Path) -> None:
    """A ramp to the right keeps its slope: the image is scaled alike in both directions."""
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    found = as_read(tmp_path, size=size)[..., 0]
    high, wide = (size, size) if isinstance(size, int) else size
    assert found.shape == (high, wide)
    scale = max(high, wide) / 64
    columns = (np.arange(wide) + 0.5 + (64 * scale - wide) / 2) / scale - 0.5
    assert np.abs(found - 4 * columns.clip(0, 63))[:, 2:-2].max() <= 4
