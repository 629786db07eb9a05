"""Imports timm for the examples and tests, even with a CPU build of torch: `from zoo import timm`.

timm only needs torchvision's feature extraction."""

from __future__ import annotations

import importlib
from typing import Any

from repfx.data.vision import torchvision


def __getattr__(name: str) -> Any:
    """Imports timm on first use."""
    if name != "timm":
        raise AttributeError(name)
    torchvision()
    return importlib.import_module("timm")
