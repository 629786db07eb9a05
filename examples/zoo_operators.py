"""torchvision with a CPU build of torch: its operators, written in Python.

torchvision's wheels on PyPI are built for CUDA, so with a CPU build of torch its library does not
load and no detector of it runs. `provide()` gives the operators that models call a kernel in plain
torch. Where the library loads nothing is changed."""

from __future__ import annotations

import importlib
import sys
from typing import Any

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
    area = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    keep = []
    while order.numel():
        best, rest = order[0], order[1:]
        keep.append(best)
        low, high = (
            torch.max(dets[best, :2], dets[rest, :2]),
            torch.min(dets[best, 2:], dets[rest, 2:]),
        )
        common = (high - low).clamp(min=0).prod(1)
        order = rest[common / (area[best] + area[rest] - common) <= iou_threshold]
    return torch.stack(keep) if keep else order


def roi_align(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool
) -> Tensor:
    if not len(rois):
        return input.new_zeros(0, input.shape[1], height, width)
    slow: Any = importlib.import_module("torchvision.ops.roi_align")
    return slow._roi_align(input, rois, scale, height, width, ratio, aligned)


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
