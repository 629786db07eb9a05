"""Images of two coloured squares on noise, with their boxes: data to try a trainer on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZE = 64
Box = tuple[int, float, float, float, float]  # class, centre and size, as parts of the image
COLORS = {"green": (40, 250, 40), "red": (250, 40, 40)}


def squares(count: int, seed: int, size: int = SIZE) -> list[tuple[NDArray[np.uint8], list[Box]]]:
    """Images (size, size, 3) and for each its boxes."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        image = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
        boxes = []
        for _ in range(2):
            side = int(rng.integers(size * 3 // 16, size * 3 // 8))
            kind = int(rng.integers(0, len(COLORS)))
            x, y = map(int, rng.integers(0, size - side, 2))
            image[y : y + side, x : x + side] = list(COLORS.values())[kind]
            box = (x + side / 2, y + side / 2, side, side)
            cx, cy, width, height = (v / size for v in box)
            boxes.append((kind, cx, cy, width, height))
        found.append((image, boxes))
    return found
