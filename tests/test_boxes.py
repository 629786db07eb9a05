"""Boxes in COCO's form: found, checked, resized and augmented with their images."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from repfx.data import coco
from repfx.data.archive import Archive
from repfx.data.boxes import Augmentation, Boxes, train_and_valid
from repfx.data.folders import Images
from repfx.data.packaged import digit_scenes
from repfx.errors import InputError

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
BOX = {"id": 1, "image_id": 5, "category_id": 7, "bbox": [10, 4, 20, 8]}


def form(file: str = "a.png", **changed: Any) -> dict[str, Any]:
    """Annotations of one image of 40 x 20 pixels with one box."""
    image = {"id": 5, "file_name": file, "width": 40, "height": 20}
    return {"images": [image], "annotations": [BOX], "categories": CATEGORIES, **changed}


def photo(
    box: tuple[int, int, int, int] = (10, 4, 30, 12), size: tuple[int, int] = (20, 40)
) -> Any:
    """An image that is white inside of the box and black outside."""
    pixels = np.zeros((*size, 3), np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


def folder(path: Path, files: dict[str, Any]) -> Path:
    """A folder of these files: a dict is written as JSON, an image as a PNG."""
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict | list):
            file.write_text(json.dumps(content))
        elif isinstance(content, str):
            file.write_text(content)
        else:
            content.save(file)
    return path


LAYOUTS: dict[
    str, tuple[str, str, str, str, str]
] = {  # train, its image, file_name, valid, its image
    "this": ("train.json", "train/a.png", "a.png", "test.json", "test/a.png"),
    "coco": (
        *("annotations/instances_train2017.json", "train2017/a.png", "a.png"),
        *("annotations/instances_val2017.json", "val2017/a.png"),
    ),
    "roboflow": (
        *("train/_annotations.coco.json", "train/a.png", "a.png"),
        *("valid/_annotations.coco.json", "valid/a.png"),
    ),
    "paths": ("train.json", "images/train/a.png", "images/train/a.png", "val.json", "b/test/a.png"),
    "deep": ("x/train.json", "x/data/pics/a.png", "pics/a.png", "x/valid.json", "x/data/v/a.png"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_layouts_that_people_have(tmp_path: Path, layout: str, zipped: bool) -> None:
    train, image, name, valid, other = LAYOUTS[layout]
    second = {"coco": "a.png", "paths": "test/a.png", "deep": "v/a.png"}.get(layout, "a.png")
    root = folder(
        tmp_path / "set",
        {
            train: form(name),
            valid: form(second, categories=CATEGORIES[::-1]),
            image: photo(),
            other: photo(),
            "notes.json": {"images": []},  # not of this form
        },
    )
    if zipped:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for file in root.rglob("*"):
                archive.write(file, file.relative_to(root).as_posix())
        root = tmp_path / "set.zip"
    a, b = train_and_valid(root, size=(20, 40))
    assert b is not None and a.names == [image] and b.names == [other]
    assert a.classes == b.classes == ("cat", "dog")  # by their id
    for data in (b, Boxes(root, train, size=(20, 40))):
        x, y = data[0]
        assert x.shape == (3, 20, 40) and y.tolist() == [[1, 10, 4, 30, 12, 0]]


def test_one_file_is_for_training(tmp_path: Path) -> None:
    root = folder(tmp_path, {"boxes.json": form(), "a.png": photo()})
    a, b = train_and_valid(root)
    assert len(a) == 1 and b is None


def bounds(x: Tensor) -> list[int]:
    """Left, top, right, bottom of what is brighter than the middle between black and white."""
    bright = x[0] > (x[0].max() + x[0].min()) / 2
    rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
    return [int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


@pytest.mark.parametrize("size", [(20, 40), (80, 80), (64, 96), (10, 64), (96, 33), 48])
def test_the_box_stays_on_its_object(tmp_path: Path, size: Any) -> None:
    """The image is whole, in its proportions, in the middle; the rest has the mean colour."""
    root = folder(tmp_path, {"train.json": form(), "train/a.png": photo()})
    x, y = Boxes(root, size=size)[0]
    high, wide = (size, size) if isinstance(size, int) else size
    assert x.shape == (3, high, wide)
    for seen, said in zip(bounds(x), y[0, 1:5].tolist(), strict=True):
        assert abs(seen - said) <= 1
    scale = min(high / 20, wide / 40)
    assert (y[0, 3] - y[0, 1]) == pytest.approx(20 * scale, abs=1)
    assert (y[0, 4] - y[0, 2]) == pytest.approx(8 * scale, abs=1)
    blank = (x == 0).all(0)
    assert abs(int(blank.sum()) - (high * wide - 800 * scale**2)) <= high + wide


def test_rounded_sides_scale_each_by_itself(tmp_path: Path) -> None:
    image = {"id": 5, "file_name": "a.png"}
    root = folder(tmp_path, {"train.json": form(images=[image]), "a.png": photo(size=(20, 41))})
    _, y = Boxes(root, size=(50, 20))[0]  # 20 x 41 becomes 10 x 20
    x, z = 20 / 41, 10 / 20
    assert y[0, 1:5].tolist() == pytest.approx([10 * x, 4 * z + 20, 30 * x, 12 * z + 20], abs=1e-4)


def test_calibration_sees_what_the_detector_sees(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train.json": form(), "train/a.png": photo()})
    for size in ((64, 96), (33, 20)):
        x, _ = Boxes(root, size=size)[0]
        assert torch.equal(Images(root, size=size, fit="letterbox")[0], x)
        crop = Images(root, size=size)[0]
        assert crop.shape == x.shape and not torch.equal(crop, x)
    with pytest.raises(InputError, match="fit"):
        Images(root, fit="stretch")
    with pytest.raises(InputError, match="size is"):
        Images(root, size=(3, 4, 5))  # type: ignore[arg-type]


def test_augmentation_follows_from_seed_epoch_and_index(tmp_path: Path) -> None:
    """It moves the boxes with the image, and draws nothing from the global generators."""
    root = folder(tmp_path, {"train.json": form(), "train/a.png": photo((10, 4, 30, 12))})
    data = Boxes(root, size=(40, 80), augment=True)
    before = torch.get_rng_state()
    seen = []
    for epoch in range(40):
        data.set_epoch(0, epoch)
        (x, y), (again, boxes) = data[0], data[0]
        assert torch.equal(x, again) and torch.equal(y, boxes)
        assert y[0, 0] == 1 and y.shape == (1, 6)
        left, top, right, bottom = y[0, 1:5].tolist()
        inside = x[0, round(top) + 2 : round(bottom) - 2, round(left) + 2 : round(right) - 2]
        around = x[0].clone()
        around[
            max(0, round(top) - 2) : round(bottom) + 2, max(0, round(left) - 2) : round(right) + 2
        ] = 0
        assert inside.numel() == 0 or inside.min() > 0.5, epoch
        assert around.max() < 0.5, epoch
        seen.append(tuple(y[0].tolist()))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(seen)) > 10
    data.set_epoch(1, 0)
    assert tuple(data[0][1][0].tolist()) != seen[0] or not torch.equal(data[0][0], x)
    flips = [
        sum("Flip" in type(step).__name__ for step in Augmentation(flip).change.transforms)
        for flip in (True, False)
    ]
    assert flips == [1, 0]


def test_images_without_boxes_and_crowds_are_kept(tmp_path: Path) -> None:
    crowd = {**BOX, "id": 2, "iscrowd": 1}
    images = [*form()["images"], {"id": 6, "file_name": "b.png"}]
    root = folder(
        tmp_path,
        {
            "train.json": form(images=images, annotations=[BOX, crowd]),
            "train/a.png": photo(),
            "train/b.png": photo(),
        },
    )
    data = Boxes(root, size=(20, 40), augment=False)
    assert data[0][1].tolist() == [[1, 10, 4, 30, 12, 0], [1, 10, 4, 30, 12, 1]]
    assert data[1][1][:, 0].tolist() == [-1, -1]
    augmented = Boxes(root, size=(20, 40), augment=True)
    assert augmented[1][1][:, 0].tolist() == [-1, -1]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"annotations": [{**BOX, "bbox": [10, 4, 0, 8]}]}, r"box 1 of train.json, \[10, 4, 0, 8\]"),
    ({"annotations": [{**BOX, "bbox": [10, 4, -3, 8]}]}, "box 1 of train.json"),
    ({"annotations": [{**BOX, "bbox": [50, 4, 5, 8]}]}, "box 1 of train.json"),
    ({"annotations": [{**BOX, "bbox": [1e400, 4, 5, 8]}]}, "box 1 of train.json"),
    ({"annotations": [{**BOX, "bbox": [10, 4, 5]}]}, "box 1 of train.json"),
    ({"annotations": [{**BOX, "bbox": "10 4"}]}, "box 1 of train.json"),
    ({"annotations": [{**BOX, "bbox": []}]}, "box 1 of train.json"),
    ({"annotations": [{**BOX, "bbox": [0, 0, "wide", 2]}]}, "is not in COCO's form: ValueError"),
    (
        {"annotations": [{**BOX, "bbox": [0, 0, 10**400, 2]}]},
        "is not in COCO's form: OverflowError",
    ),
    ({"images": [{"id": 5, "file_name": ""}]}, "which is not there|not in COCO's form"),
    ({"categories": [*CATEGORIES, {"id": 8, "name": "cat"}]}, "two categories of one name or id"),
    ({"categories": [*CATEGORIES, {"id": 7, "name": "cow"}]}, "two categories of one name or id"),
    ({"annotations": [{**BOX, "category_id": 9}]}, "box 1 of train.json has the class 9"),
    ({"annotations": [{**BOX, "image_id": 9}]}, "belongs to the image 9"),
    ({"annotations": [{"id": 1}]}, "train.json is not in COCO's form: KeyError"),
    ({"annotations": []}, "train.json has no box"),
    ({"images": [{"id": 5, "file_name": "c.png"}]}, "c.png, which is not there"),
    ({"images": [*form()["images"]] * 2}, "two entries for a.png"),
    ({"images": [{"id": 5}]}, "is not in COCO's form: KeyError"),
    ({"categories": [{"id": 7}]}, "is not in COCO's form"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_is_wrong_is_said(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    root = folder(tmp_path, {"train.json": form(**changed), "train/a.png": photo()})
    with pytest.raises(InputError, match=message):
        Boxes(root)


def test_what_cannot_be_used_is_left_out_on_request(tmp_path: Path) -> None:
    images = [*form()["images"], *({"id": i, "file_name": f"{i}.png"} for i in (6, 7))]
    boxes = [BOX, {**BOX, "id": 2, "bbox": [1, 1, 0, 0]}, {**BOX, "id": 3, "image_id": 6}]
    root = folder(
        tmp_path,
        {
            "train.json": form(images=images, annotations=boxes),
            "train/a.png": photo(),
            "train/7.png": "no image",
        },
    )
    with pytest.raises(InputError, match=r"skip_broken=True leaves out it and 1 more"):
        Boxes(root)
    data = Boxes(root, skip_broken=True)
    assert data.names == ["train/a.png"] and len(data.boxes[0]) == 1
    assert data.broken == (
        "6.png, which is not there",
        "box 2 of train.json, [1, 1, 0, 0] in train/a.png",
        "train/7.png is not a readable image",
    )


def test_boxes_of_another_image_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train.json": form(), "train/a.png": photo(size=(21, 40))})
    with pytest.raises(
        InputError, match=r"train/a.png has 40 x 21 pixels, its boxes are for 40 x 20"
    ):
        Boxes(root)[0]


def test_which_file_is_meant(tmp_path: Path) -> None:
    two = folder(tmp_path / "2", {"train.json": form(), "train_b.json": form(), "a.png": photo()})
    with pytest.raises(InputError, match="one annotation file with train"):
        coco.find(two)
    none = folder(tmp_path / "0", {"a.png": photo(), "x.json": [1, 2]})
    with pytest.raises(InputError, match="no boxes in COCO's form"):
        coco.find(none)
    bad = folder(tmp_path / "b", {"a.png": photo(), "train.json": "{", "boxes.json": form()})
    assert coco.find(bad) == ("boxes.json", None)
    with pytest.raises(InputError, match=r"train.json is not JSON"):
        Boxes(bad, "train.json")
    twice = folder(tmp_path / "t", {"boxes.json": form(), "x/a.png": photo(), "y/a.png": photo()})
    with pytest.raises(InputError, match=r"a.png could be x/a.png or y/a.png"):
        Boxes(twice)
    named = folder(tmp_path / "n", {"trainer.json": form(), "a.png": photo()})
    assert coco.find(named) == ("trainer.json", None)


def test_validation_has_the_classes_of_training(tmp_path: Path) -> None:
    other = form(categories=[{"id": 7, "name": "bird"}])
    root = folder(
        tmp_path,
        {
            "train.json": form(),
            "val.json": other,
            "train/a.png": photo(),
            "val/a.png": photo(),
        },
    )
    with pytest.raises(InputError, match=r"has the class 'bird'; valid are cat, dog"):
        train_and_valid(root)


def test_an_archive_reads_any_file_and_keeps_its_images(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train.json": form(), "train/a.png": photo()})
    archive = Archive(root)
    assert archive.names == ["train/a.png"] and json.loads(archive.read("train.json")) == form()


def test_digits_on_textures() -> None:
    (x, y), (a, b) = digit_scenes(images=(20, 10), size=(48, 80))
    assert x.shape == (20, 3, 48, 80) and a.shape == (10, 3, 48, 80) and y.shape == (20, 6, 5)
    again = digit_scenes(images=(20, 10), size=(48, 80))
    assert torch.equal(again[0][0], x) and torch.equal(again[1][1], b)
    other = digit_scenes(1, images=(20, 10), size=(48, 80))
    assert not torch.equal(other[0][0], x)
    real = y[y[..., 0] >= 0]
    assert len(real) >= 20 and real[:, 0].max() <= 9
    assert bool((real[:, 3:] > real[:, 1:3]).all()) and real[:, 1:].min() >= 0
    assert real[:, 3].max() <= 80 and real[:, 4].max() <= 48
    with pytest.raises(InputError, match="at least 32 x 32"):
        digit_scenes(size=16)


def test_coco_as_it_is_published(tmp_path: Path) -> None:
    """Keypoints and captions lie beside the instances."""
    files: dict[str, Any] = {"train2017/a.png": photo(), "val2017/a.png": photo()}
    for part in ("train", "val"):
        for kind in ("instances", "person_keypoints"):
            files[f"annotations/{kind}_{part}2017.json"] = form()
        files[f"annotations/captions_{part}2017.json"] = {"images": [], "annotations": []}
    assert coco.find(folder(tmp_path, files)) == (
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
    )


def test_validation_by_its_whole_name(tmp_path: Path) -> None:
    names = ("train.json", "validation.json")
    root = folder(tmp_path, {**{n: form() for n in names}, "train/a.png": photo()})
    assert coco.find(root) == names


def test_an_image_of_another_part_is_not_taken(tmp_path: Path) -> None:
    root = folder(
        tmp_path,
        {"train.json": form(), "val.json": form(), "train/a.png": photo(), "val/b.png": photo()},
    )
    with pytest.raises(InputError, match=r"a\.png, which is not there"):
        train_and_valid(root)


@pytest.mark.parametrize("name", ["images\\a.png", "./a.png", "../images/a.png"])
def test_paths_of_other_systems(name: str, tmp_path: Path) -> None:
    root = folder(tmp_path, {"train.json": form(name), "images/a.png": photo()})
    assert Boxes(root).names == ["images/a.png"]


def test_boxes_are_cut_off_at_the_sides_of_the_image(tmp_path: Path) -> None:
    """Also where the file does not say how large the image is."""
    image = {"id": 5, "file_name": "a.png"}
    over = {**BOX, "bbox": [30, 10, 50, 50]}
    root = folder(
        tmp_path, {"train.json": form(images=[image], annotations=[over]), "a.png": photo()}
    )
    assert Boxes(root, size=(20, 40))[0][1][0].tolist() == [1, 30, 10, 40, 20, 0]
    outside = {**BOX, "bbox": [50, 10, 5, 5]}
    images = [image, {"id": 6, "file_name": "b.png"}]
    annotations = [outside, {**BOX, "id": 2, "image_id": 6}]
    files = {"train.json": form(images=images, annotations=annotations)}
    files |= {"a.png": photo(), "b.png": photo()}
    root = folder(tmp_path / "2", files)
    with pytest.raises(InputError, match=r"a box of a\.png is outside of the image"):
        Boxes(root)[0]
    left = Boxes(root, skip_broken=True)
    assert left.names == ["b.png"] and left.broken == ("a box of a.png is outside of the image",)


def test_an_image_that_is_a_line_can_be_augmented(tmp_path: Path) -> None:
    image = {"id": 5, "file_name": "a.png"}
    box = {**BOX, "bbox": [0, 4, 2, 300]}
    files = {"train.json": form(images=[image], annotations=[box])}
    root = folder(tmp_path, {**files, "a.png": photo((0, 4, 2, 304), (900, 2))})
    data = Boxes(root, size=(40, 40), augment=True)
    for epoch in range(20):
        data.set_epoch(0, epoch)
        assert data[0][0].shape == (3, 40, 40)
