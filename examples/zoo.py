"""Imports timm for the examples and tests, even with a CPU build of torch: `from zoo import timm`.

torchvision's wheels on PyPI are built for CUDA. With a CPU build of torch its operators have no
schema, so its import fails where it registers their shapes. Declaring them first avoids this. timm
only needs torchvision's feature extraction."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "ps_roi_align",
    "roi_pool",
    "ps_roi_pool",
    "deform_conv2d",
)
_BACKWARD = (
    "_roi_align_backward",
    "_ps_roi_align_backward",
    "_roi_pool_backward",
    "_ps_roi_pool_backward",
)
_KEPT: list[torch.library.Library] = []


def declare_missing_operators() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in (*_OPERATORS, *_BACKWARD, "_deform_conv2d_backward"):
            library.define(f"{name}(Tensor x) -> Tensor")
        _KEPT.append(library)


def __getattr__(name: str) -> Any:
    """Imports timm on first use."""
    if name != "timm":
        raise AttributeError(name)
    declare_missing_operators()
    return importlib.import_module("timm")
