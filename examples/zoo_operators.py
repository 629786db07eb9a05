"""torchvision with a CPU build of torch: its operators, written in Python.

torchvision's wheels on PyPI are built for CUDA, so with a CPU build of torch its library does not
load and no detector of it runs. `provide()` gives the operators that models call a kernel in plain
torch. Where the library loads nothing is changed."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repfx.data.vision import torchvision

_KEPT: list[torch.library.Library] = []


def provide() -> None:
    extension: Any = importlib.import_module(f"{torchvision().__name__}.extension")
    if extension._has_ops() or _KEPT:
        return
    _KEPT.append(torch.library.Library("torchvision", "IMPL"))
    for kernel in (nms, roi_align, deform_conv2d):
        _KEPT[0].impl(kernel.__name__, kernel, "CPU")
    extension._has_ops = lambda: True
    for name, module in list(sys.modules.items()):
        if name.startswith("torchvision.") and hasattr(module, "_has_ops"):
            module._has_ops = extension._has_ops  # type: ignore[attr-defined]


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The boxes that no box of a higher score overlaps by more than the threshold; (N, 4), (N,)."""
    order = scores.argsort(descending=True, stable=True)
    left, top, right, bottom = dets[order].numpy().T
    area = (right - left) * (bottom - top)
    wide = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    high = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
    common = np.maximum(wide, 0) * np.maximum(high, 0)
    over = common / (area[:, None] + area - common) > iou_threshold
    keep = np.ones(len(order), dtype=bool)
    for i in range(len(order)):
        if keep[i]:
            keep[i + 1 :] &= ~over[i, i + 1 :]
    return order[torch.from_numpy(keep)]


def roi_align(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool
) -> Tensor:
    """The mean of bilinear samples in each cell of each box: (K, 5), (N, C, H, W) -> (K, C, h, w).

    A sample is a product of a row's weights and a column's, and so is the mean of a cell."""
    out = input.new_zeros(len(rois), input.shape[1], height, width)
    low, high = rois[:, 1:3] * scale - aligned / 2, rois[:, 3:] * scale - aligned / 2
    size = high - low if aligned else (high - low).clamp(min=1)
    columns = _cell_weights(low[:, 0], size[:, 0], width, ratio, input.shape[3])
    rows = _cell_weights(low[:, 1], size[:, 1], height, ratio, input.shape[2])
    for start in range(0, len(rois), 64):  # a limit for memory
        for n, image in enumerate(input):
            some = start + torch.nonzero(rois[start : start + 64, 0] == n)[:, 0]
            if len(some):
                seen = torch.einsum("khy,cyx->kchx", rows[some], image)
                out[some] = seen @ columns[some][:, None].mT
    return out


def _cell_weights(start: Tensor, size: Tensor, cells: int, ratio: int, pixels: int) -> Tensor:
    """What each pixel of an axis counts in each cell of each box: (K, cells, pixels)."""
    counts = (size / cells).ceil() if ratio <= 0 else torch.full_like(size, ratio)
    top = max(1, int(counts.max())) if len(counts) else 1
    sample = torch.arange(top, dtype=size.dtype)
    step = (sample + 0.5) / counts.clamp(min=1)[:, None]
    place = start[:, None, None] + (torch.arange(cells)[:, None] + step[:, None]) * (
        size[:, None, None] / cells
    )
    used = (sample < counts[:, None])[:, None] & (place >= -1) & (place <= pixels)
    place = place.clamp(0, pixels - 1)[..., None]
    weight = (1 - (place - torch.arange(pixels)).abs()).clamp(min=0) * used[..., None]
    return weight.sum(2) / counts.clamp(min=1)[:, None, None]


def deform_conv2d(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *more: Any
) -> Tensor:
    """The taps are sampled bilinearly, then multiplied by the weights as one matrix."""
    stride, pad, dilation = more[:2], more[2:4], more[4:6]
    groups, offset_groups, use_mask = more[6:]
    n, channels, height, width = input.shape
    rows, columns = weight.shape[2:]
    taps, (high, wide) = rows * columns, offset.shape[2:]
    shift = offset.reshape(n * offset_groups, taps, 2, high, wide)
    grid = []
    for axis, (tap, count, size) in enumerate(
        (
            (torch.arange(taps) // columns, high, height),
            (torch.arange(taps) % columns, wide, width),
        )
    ):
        base = torch.arange(count) * stride[axis] - pad[axis]
        base = base[:, None] if axis == 0 else base[None]
        place = shift[:, :, axis] + base + (tap * dilation[axis])[:, None, None]
        grid.append((2 * place + 1) / size - 1)
    where = torch.stack(grid[::-1], -1).flatten(1, 2)
    split = input.reshape(n * offset_groups, -1, height, width)
    seen = torch.nn.functional.grid_sample(split, where.to(input.dtype), align_corners=False)
    seen = seen.unflatten(2, (taps, high))
    if use_mask:
        seen = seen * mask.reshape(n * offset_groups, 1, taps, high, wide)
    seen = seen.reshape(n, groups, channels // groups * taps, high * wide)
    made = weight.reshape(groups, weight.shape[0] // groups, -1) @ seen
    return made.reshape(n, -1, high, wide) + bias[:, None, None]
