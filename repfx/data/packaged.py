"""Data sets that come with a Python package, by name. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from repfx.data.archive import IMAGENET_MEAN, IMAGENET_STD, both_sides, by_channel
from repfx.errors import InputError, MissingPart

Labelled = tuple[Tensor, Tensor]


def digits(seed: int = 0) -> tuple[Labelled, Labelled]:
    """scikit-learn's 1 797 handwritten digits: (training set, test set), a quarter for the test.

    Each is (images (N, 1, 8, 8) in -1..1, labels (N,))."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingPart(
            "the handwritten digits come with scikit-learn: pip install repfx[demo]"
        ) from error
    data = load_digits()
    x = (data.images / 8.0 - 1.0).astype(np.float32)[:, None]
    a, b, of_a, of_b = train_test_split(
        x, data.target, test_size=0.25, random_state=seed, stratify=data.target
    )
    return (torch.from_numpy(a), torch.tensor(of_a, device="cpu")), (
        torch.from_numpy(b),
        torch.tensor(of_b, device="cpu"),
    )


def digit_scenes(
    seed: int = 0, size: int | tuple[int, int] = 64, images: tuple[int, int] = (4000, 1000)
) -> tuple[Labelled, Labelled]:
    """Handwritten digits of all sizes on textures, to detect: (training set, test set).

    Each is (images (N, 3, H, W), normalised like photographs, boxes (N, 6, 5)): class, left, top,
    right, bottom in pixels; the class -1 is no box. An image has one to six digits, from a seventh
    of the shorter side to half of it. No handwritten digit is in both sets. `size`: (height,
    width) or the side of a square, from 32."""
    high, wide = both_sides(size)
    if min(high, wide) < 32:
        raise InputError(f"images of digits have at least 32 x 32 pixels, not {high} x {wide}")
    made = []
    for part, ((x, y), count) in enumerate(zip(digits(seed), images, strict=True)):
        random = np.random.default_rng((seed, part))
        scenes = [_scene(random, x.numpy()[:, 0], y.numpy(), high, wide) for _ in range(count)]
        pixels, boxes = (np.stack(v) for v in zip(*scenes, strict=True))
        mean, std = by_channel(IMAGENET_MEAN), by_channel(IMAGENET_STD)
        made.append(((torch.from_numpy(pixels) - mean) / std, torch.from_numpy(boxes)))
    return made[0], made[1]


def _scene(
    random: np.random.Generator, digit: np.ndarray, label: np.ndarray, high: int, wide: int
) -> tuple[np.ndarray, np.ndarray]:
    """One image (3, H, W) in 0..1 and its boxes (6, 5)."""
    image = _texture(random, high, wide)
    boxes = np.zeros((6, 5), np.float32)
    boxes[:, 0] = -1
    placed: list[tuple[int, int, int]] = []
    for _ in range(int(random.integers(1, 7))):
        side = int(random.integers(min(high, wide) // 7, min(high, wide) // 2 + 1))
        top, left = (
            int(random.integers(0, high - side + 1)),
            int(random.integers(0, wide - side + 1)),
        )
        if any(
            abs(2 * (top - t) + side - s) < side + s and abs(2 * (left - e) + side - s) < side + s
            for t, e, s in placed
        ):
            continue  # no digit covers another
        at = int(random.integers(len(digit)))
        ink = _larger(digit[at] / 2 + 0.5, side)[None]
        colour = random.random((3, 1, 1), dtype=np.float32)
        under = image[:, top : top + side, left : left + side]
        if abs(float((colour - under.mean((1, 2), keepdims=True)).mean())) < 0.2:
            colour = 1 - np.round(under.mean((1, 2), keepdims=True))  # it must be seen
        image[:, top : top + side, left : left + side] = under * (1 - ink) + colour * ink
        rows, columns = (np.flatnonzero(ink[0].max(axis) > 0.3) for axis in (1, 0))
        boxes[len(placed)] = (
            label[at],
            left + columns[0],
            top + rows[0],
            left + columns[-1] + 1,
            top + rows[-1] + 1,
        )
        placed.append((top, left, side))
    return image, boxes


def _texture(random: np.random.Generator, high: int, wide: int) -> np.ndarray:
    """Three waves of random direction and colour, and noise: (3, H, W) in 0..1."""
    y, x = np.mgrid[:high, :wide] / 64
    image = np.full((3, high, wide), 0.5) + random.normal(0, 0.03, (3, high, wide))
    for _ in range(3):
        a, b, phase = random.normal(0, 12), random.normal(0, 12), random.uniform(0, 6)
        image += 0.15 * random.normal(size=(3, 1, 1)) * np.sin(a * x + b * y + phase)
    return image.clip(0, 1).astype(np.float32)


def _larger(image: np.ndarray, side: int) -> np.ndarray:
    """An image (8, 8) in 0..1, resized to (side, side)."""
    given = torch.from_numpy(image)[None, None]
    shape = (side, side)
    found = torch.nn.functional.interpolate(given, shape, mode="bicubic", align_corners=False)
    return np.asarray(found.clamp(0, 1)[0, 0])


DETECTION: dict[str, Callable[..., tuple[Labelled, Labelled]]] = {"digits": digit_scenes}
PACKAGED: dict[str, Callable[[], tuple[Labelled, Labelled]]] = {"digits": digits}
