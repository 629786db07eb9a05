"""Letterboxing: an image in its own proportions, in the middle of a frame of another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (C, h, w) in 0..255, resized in its proportions to fit into `size`, (H, W)."""
    h, w = image.shape[-2:]
    scale = min(size[0] / h, size[1] / w)
    rows, columns = max(1, round(h * scale)), max(1, round(w * scale))
    if (rows, columns) == (h, w):
        return image
    return F.interpolate(image[None], (rows, columns), mode="bilinear", antialias=True)[0]


def corner(image: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """The top and the left of an image (C, h, w) in the middle of a frame (H, W)."""
    return (size[0] - image.shape[-2]) // 2, (size[1] - image.shape[-1]) // 2


def in_frame(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A normalised image (C, h, w) in the middle of (C, H, W).

    What is around it is 0, as a pixel of the mean colour is."""
    top, left = corner(image, size)
    made = torch.zeros(len(image), *size, device="cpu")
    h, w = image.shape[-2:]
    made[:, top : top + h, left : left + w] = image
    return made
