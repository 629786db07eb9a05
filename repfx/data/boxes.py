"""Boxes: images with boxes, for detection.

    sample = (image (3, H, W), boxes (K, 6))     a row: class, left, top, right, bottom, crowd

Boxes are in pixels of that image. All samples have the same K, the most boxes an image has; rows
with the class -1 fill up. An image is resized to fit into (H, W), its sides in proportion, and
centred; the rest has the mean colour. Augmentation is a function of (seed, epoch, index), as in
`Pictures`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from repfx.data import coco
from repfx.data.archive import IMAGENET_MEAN, IMAGENET_STD, Archive, Size, both_sides
from repfx.data.letterbox import corner, fitted, in_frame
from repfx.data.preprocessing import Preprocessing
from repfx.data.vision import torchvision
from repfx.errors import InputError


class Boxes(Dataset[tuple[Tensor, Tensor]]):
    """Images of a folder or zip, and their boxes in COCO's form from the file `annotations` in it.

    `size`: (height, width) in pixels, or the side of a square. Images are scaled to 0..1 and
    normalised with `mean` and `std`. `augment` cuts out a random part that has a box in it, flips
    half of the images unless `flip` is off, and changes brightness, contrast, saturation, hue and
    the order of the channels.
    `classes` sets the order of the labels. `cache` keeps decoded images in memory.

    Raises InputError for files and boxes that cannot be used (see `coco.read`). With `skip_broken`
    all images are read once at the start; what cannot be used is left out and listed in `broken`.
    Raises MissingPart without pillow or torchvision."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        annotations: str | None = None,
        *,
        size: Size = 640,
        augment: bool = False,
        flip: bool = True,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        classes: tuple[str, ...] | None = None,
        skip_broken: bool = False,
        cache: bool = False,
    ) -> None:
        self.archive = Archive(path, cache)
        self.size = both_sides(size)
        self.preprocessing = Preprocessing(size, "letterbox", mean=mean, std=std)
        self.seed = self.epoch = 0
        name = annotations or coco.find(Path(path))[0]
        found = coco.read(self.archive, name, classes, skip_broken)
        self.classes, self.sizes = found.classes, found.sizes
        self.names = list(found.boxes)
        self.broken = found.broken
        self.boxes = [torch.tensor(found.boxes[n], device="cpu").view(-1, 6) for n in self.names]
        if skip_broken:
            self._leave_out_broken()
        self.rows = max(1, *map(len, self.boxes))
        self.change = Augmentation(flip) if augment else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, boxes = self._read(index)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        if self.change is None:
            image, boxes = self._fitted(image, boxes)
        else:
            drawn = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(drawn[0]))
                image, boxes = self._fitted(*self.change.part(image, boxes))
                image = self.change.colours(image)
        top, left = corner(image, self.size)
        rows = torch.zeros(self.rows, 6, device="cpu")
        rows[:, 0] = -1
        rows[: len(boxes)] = boxes + torch.tensor([0, left, top, left, top, 0], device="cpu")
        normalised = self.preprocessing(image.permute(1, 2, 0).numpy())
        return in_frame(normalised, self.size), rows

    def _read(self, index: int) -> tuple[np.ndarray, Tensor]:
        """The pixels of an image, and its boxes within it. Raises InputError if they do not fit."""
        name = self.names[index]
        pixels = self.archive.pixels(name)
        high, wide = pixels.shape[:2]
        if self.sizes.get(name, (wide, high)) != (wide, high):
            raise InputError(
                f"{self.archive.path}: {name} has {wide} x {high} pixels, its boxes are for "
                f"{self.sizes[name][0]} x {self.sizes[name][1]}"
            )
        boxes = self.boxes[index].clone()
        boxes[:, [1, 3]] = boxes[:, [1, 3]].clamp(0, wide)
        boxes[:, [2, 4]] = boxes[:, [2, 4]].clamp(0, high)
        if not bool((boxes[:, 3:5] > boxes[:, 1:3]).all()):
            raise InputError(f"{self.archive.path}: a box of {name} is outside of the image")
        return pixels, boxes

    def _leave_out_broken(self) -> None:
        """Keeps the images that can be read and whose boxes fit."""
        kept = []
        for index in range(len(self.names)):
            try:
                self._read(index)
                kept.append(index)
            except InputError as error:
                self.broken += (
                    str(error).partition(f"{self.archive.path}: ")[2].partition("; ")[0],
                )
        if not kept:
            raise InputError(f"{self.archive.path}: no image can be used, such as {self.broken[0]}")
        self.names = [self.names[i] for i in kept]
        self.boxes = [self.boxes[i] for i in kept]

    def _fitted(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        small = fitted(image, self.size)
        y, x = (a / b for a, b in zip(small.shape[-2:], image.shape[-2:], strict=True))
        return small, boxes * torch.tensor([1, x, y, x, y, 1], device="cpu")

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Sets the seed and epoch that the augmentation follows from."""
        self.seed, self.epoch = seed, epoch


class Augmentation:
    """The transforms that SSD is trained with. They draw from the global generator."""

    def __init__(self, flip: bool) -> None:
        v2 = torchvision("transforms.v2")
        steps: list[Any] = [v2.RandomIoUCrop(), *([v2.RandomHorizontalFlip()] if flip else [])]
        self.change = v2.Compose([*steps, v2.SanitizeBoundingBoxes(labels_getter=_others)])
        self.colours = v2.RandomPhotometricDistort()

    def part(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """A random part of the image (3, h, w), and those of its boxes (K, 6) that are in it."""
        if not len(boxes):
            return image, boxes
        places = torchvision("tv_tensors").BoundingBoxes(
            boxes[:, 1:5], format="XYXY", canvas_size=image.shape[-2:]
        )
        made = self.change({"image": image, "boxes": places, "others": boxes[:, [0, 5]]})
        if min(made["image"].shape[-2:]) < 1:  # a part of an image that is a line
            return image, boxes
        label, crowd = made["others"].split(1, 1)
        corners = made["boxes"].as_subclass(Tensor)
        return made["image"], torch.cat((label, corners, crowd), 1)


def _others(sample: Any) -> Tensor:
    """What belongs to a box, and goes when the box does."""
    found: Tensor = sample["others"]
    return found


def train_and_valid(path: str | os.PathLike[str], **options: Any) -> tuple[Boxes, Boxes | None]:
    """The training set, augmented, and the validation set, or None if there is none.

    `options` are those of Boxes."""
    first, second = coco.find(Path(path))
    train = Boxes(path, first, augment=True, **options)
    return train, None if second is None else Boxes(path, second, classes=train.classes, **options)
