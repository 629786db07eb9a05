"""torchvision, also beside a torch that its operators were not built for.

Its wheels on PyPI are built for CUDA. Beside a CPU build of torch their library does not load, and
the import fails where it registers the shapes of operators that nobody has declared. Its
transforms and box functions are Python and need none of them, so they are declared here."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from repfx.errors import MissingPart

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
    "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor",
    # torchvision only registers the shapes of these, by name
    "ps_roi_align(Tensor x) -> Tensor",
    "roi_pool(Tensor x) -> Tensor",
    "ps_roi_pool(Tensor x) -> Tensor",
    "_roi_align_backward(Tensor x) -> Tensor",
    "_ps_roi_align_backward(Tensor x) -> Tensor",
    "_roi_pool_backward(Tensor x) -> Tensor",
    "_ps_roi_pool_backward(Tensor x) -> Tensor",
    "_deform_conv2d_backward(Tensor x) -> Tensor",
)
_DECLARED: list[torch.library.Library] = []


def torchvision(part: str = "") -> Any:
    """The package torchvision, or a module of it such as "transforms.v2".

    Raises MissingPart if it is not installed."""
    name = f"torchvision.{part}" if part else "torchvision"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPart("detection needs torchvision: pip install repfx[detect]") from error
    except RuntimeError:
        if _DECLARED:
            raise
    for loaded in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[loaded]
    _DECLARED.append(torch.library.Library("torchvision", "DEF"))
    for schema in SCHEMAS:
        _DECLARED[0].define(schema)
    return importlib.import_module(name)
