"""Annotations: boxes in COCO's form, read and checked.

    {"images": [{"id": 1, "file_name": "a.jpg"}, ...],
     "annotations": [{"image_id": 1, "category_id": 3, "bbox": [x, y, width, height]}, ...],
     "categories": [{"id": 3, "name": "dog"}, ...]}

`bbox` is in pixels of the image, from its upper left corner. `iscrowd` marks a box around many
objects, which a detector neither learns nor is blamed for."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from repfx.data.archive import Archive, names_in
from repfx.errors import InputError

VALID = ("val", "valid", "validation", "test")
PARTS = ("train", *VALID)
Box = tuple[int, float, float, float, float, bool]  # class, left, top, right, bottom, crowd


@dataclass(frozen=True)
class Annotations:
    """The boxes of each image, by the path of the image in the archive.

    `sizes`: (width, height) of an image, where the file gives them. `broken`: boxes and images that
    were left out, in words."""

    classes: tuple[str, ...]
    boxes: dict[str, list[Box]]
    sizes: dict[str, tuple[int, int]]
    broken: tuple[str, ...] = ()


def find(path: Path) -> tuple[str, str | None]:
    """The annotation files for training and for validation; None where there is only one.

    A file belongs to a part by its name or by that of its folder: `train.json`,
    `annotations/instances_val2017.json`, `valid/_annotations.coco.json`. Validation is the first of
    VALID that is there. Of COCO's own files of a part, `instances` is taken.
    Raises InputError if there is no file in COCO's form, or if it is not clear which one to take.
    """
    archive = Archive(path)
    names = [n for n in names_in(path, {".json"}) if _is_coco(archive, n)]
    if not names:
        raise InputError(
            f"{path} has no boxes in COCO's form: a .json file with images, annotations and "
            "categories, such as train.json"
        )
    train = _instances([n for n in names if _is_part(n, "train")])
    if not train and len(names) == 1:
        return names[0], None
    rest = [n for n in names if not _is_part(n, "train")]
    others = [_instances([n for n in rest if _is_part(n, part)]) for part in VALID]
    valid = next((found for found in others if found), [None])
    if len(train) != 1 or len(valid) != 1:
        raise InputError(
            f"{path} needs one annotation file with train in its name or folder, and at most one "
            f"with {', '.join(VALID)}; it has {', '.join(names)}"
        )
    return train[0], valid[0]


def read(
    archive: Archive,
    name: str,
    classes: tuple[str, ...] | None = None,
    skip_broken: bool = False,
) -> Annotations:
    """Reads one annotation file. `classes`: the labels in their order, else by `id`.

    Raises InputError for a file that is damaged, a class or an image that is not there, an image
    with two entries, and a box without an area or outside of its image. With `skip_broken`, such
    boxes and missing images are left out, and listed."""
    found = _parsed(archive, name)
    try:
        reading = _Reading(archive, name, found, classes)
        for image in found["images"]:
            reading.add_image(image)
        for entry in found["annotations"]:
            reading.add_box(entry)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{archive.path}: {name} is not in COCO's form: {error!r}") from error
    broken = tuple(reading.broken)
    if broken and not skip_broken:
        others = "" if len(broken) == 1 else f" and {len(broken) - 1} more"
        raise InputError(f"{archive.path} has {broken[0]}; skip_broken=True leaves out it{others}")
    if not any(reading.boxes.values()):
        raise InputError(f"{archive.path}: {name} has no box")
    return Annotations(reading.classes, reading.boxes, reading.sizes, broken)


class _Reading:
    """What has been read of a file so far. `paths`: of each image by its id, None if missing."""

    def __init__(
        self, archive: Archive, name: str, found: Any, classes: tuple[str, ...] | None
    ) -> None:
        self.name, self.places = name, Paths(archive, name)
        categories = sorted(found["categories"], key=lambda c: c["id"])
        self.labels = {c["id"]: str(c["name"]) for c in categories}
        if len(set(self.labels.values())) < len(categories):
            raise InputError(f"{name} has two categories of one name or id")
        self.classes = tuple(self.labels.values()) if classes is None else classes
        self.paths: dict[Any, str | None] = {}
        self.boxes: dict[str, list[Box]] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.broken: list[str] = []

    def add_image(self, image: Any) -> None:
        path = self.places.of(str(image["file_name"]))
        if image["id"] in self.paths or path in self.boxes:
            raise InputError(f"{self.name} has two entries for {image['file_name']}")
        self.paths[image["id"]] = path
        if path is None:
            self.broken.append(f"{image['file_name']}, which is not there")
            return
        self.boxes[path] = []
        if image.get("width") and image.get("height"):
            self.sizes[path] = (int(image["width"]), int(image["height"]))

    def add_box(self, entry: Any) -> None:
        where = f"box {entry['id']} of {self.name}" if "id" in entry else f"a box of {self.name}"
        if entry["image_id"] not in self.paths:
            raise InputError(f"{where} belongs to the image {entry['image_id']}, not listed")
        label = self.labels.get(entry["category_id"])
        if label is None:
            raise InputError(f"{where} has the class {entry['category_id']}, not listed")
        if label not in self.classes:
            valid = ", ".join(self.classes)
            raise InputError(f"{where} has the class {label!r}; valid are {valid}")
        path = self.paths[entry["image_id"]]
        if path is None:
            return
        box = _corners(entry["bbox"], self.sizes.get(path))
        if box is None:
            self.broken.append(f"{where}, {entry['bbox']} in {path}")
            return
        crowd = bool(int(entry.get("iscrowd") or 0))
        self.boxes[path].append((self.classes.index(label), *box, crowd))


class Paths:
    """Finds the image of a `file_name`, which is relative to a folder that the form leaves open."""

    def __init__(self, archive: Archive, annotations: str) -> None:
        self.path, self.names = archive.path, set(archive.names)
        self.ends: defaultdict[str, list[str]] = defaultdict(list)
        for name in archive.names:
            self.ends[PurePosixPath(name).name].append(name)
        at = PurePosixPath(annotations)
        # The folder of the file itself; one of its name; the part it speaks of; the whole.
        words = at.stem.replace("instances_", "")
        self.folders = (at.parent, at.parent / words, PurePosixPath(words), PurePosixPath())
        self.part = next((part for part in PARTS if _is_part(annotations, part)), "")

    def of(self, file: str) -> str | None:
        """The path in the archive, or None. Raises InputError if it could be several images.

        A name without a folder does not mean an image in the folder of another part."""
        file = normpath(file.replace("\\", "/")).lstrip("./")
        for folder in self.folders:
            if str(folder / file) in self.names:
                return str(folder / file)
        wanted = PurePosixPath(file).parts
        found = [
            n
            for n in self.ends[wanted[-1]]
            if PurePosixPath(n).parts[-len(wanted) :] == wanted
            and (len(wanted) > 1 or self._may_be(n))
        ]
        if len(found) > 1:
            raise InputError(f"{self.path}: {file} could be {' or '.join(found[:3])}")
        return found[0] if found else None

    def _may_be(self, name: str) -> bool:
        folders = [part for word in PurePosixPath(name).parts[:-1] for part in _parts(word)]
        return not self.part or not folders or self.part in folders


def _corners(bbox: Any, size: tuple[int, int] | None) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom within the image, or None if nothing of it is there."""
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4:
        return None
    left, top, width, height = (float(v) for v in bbox)
    right, bottom = left + width, top + height
    if not all(map(math.isfinite, (left, top, right, bottom))) or width <= 0 or height <= 0:
        return None
    wide, high = size or (math.inf, math.inf)
    left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, wide), min(bottom, high)
    return (left, top, right, bottom) if right > left and bottom > top else None


def _parsed(archive: Archive, name: str) -> Any:
    try:
        return json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{archive.path}: {name} is not JSON: {error}") from error


def _is_coco(archive: Archive, name: str) -> bool:
    try:
        found = _parsed(archive, name)
    except InputError:  # a file of something else
        return False
    return isinstance(found, dict) and {"images", "annotations", "categories"} <= set(found)


def _is_part(name: str, part: str) -> bool:
    """Whether a word of the file's name or of its folder begins with the part: val, val2017."""
    at = PurePosixPath(name)
    return part in _parts(f"{at.parent.name}_{at.stem}")


def _parts(text: str) -> list[str]:
    """The parts that a name speaks of, each with or without a number behind it."""
    words = text.lower().replace("-", "_").replace(".", "_").split("_")
    return [part for part in PARTS if any(re.fullmatch(rf"{part}\d*", word) for word in words)]


def _instances(names: list[str]) -> list[str]:
    return [n for n in names if "instances" in n] or names
