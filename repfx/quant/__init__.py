"""Number formats and fake quantization: grids, and the modules that round values to them."""

from repfx.quant.affine import Affine
from repfx.quant.fake_quant import FakeQuant, Unset
from repfx.quant.grid import Grid
from repfx.quant.observers import METHODS, Observer, search_scale, together
from repfx.quant.switches import (
    in_eval,
    in_float,
    observing,
    quantizers_of,
    same_modes,
    unset_is_fine,
)
from repfx.quant.targets import TARGETS, Target, target_named

__all__ = [
    "METHODS",
    "TARGETS",
    "Affine",
    "FakeQuant",
    "Grid",
    "Observer",
    "Target",
    "Unset",
    "in_eval",
    "in_float",
    "observing",
    "quantizers_of",
    "same_modes",
    "search_scale",
    "target_named",
    "together",
    "unset_is_fine",
]
