"""What every test shares: one torch thread count, and timm on a CPU build of torch."""

from __future__ import annotations

import sys

import pytest
import torch

import repfx  # noqa: F401

# torchvision's wheels are built for CUDA; beside a CPU torch its operators have no schema, and its import fails on
# registering their shapes. Declaring them cures that. timm only wants torchvision's feature extraction.
_OPERATORS = ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
_BACKWARD = ("_roi_align_backward", "_ps_roi_align_backward", "_roi_pool_backward", "_ps_roi_pool_backward")
_KEPT = []


def _declare_missing_operators() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in (*_OPERATORS, *_BACKWARD, "_deform_conv2d_backward"):
            library.define(f"{name}(Tensor x) -> Tensor")
        _KEPT.append(library)


_declare_missing_operators()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
