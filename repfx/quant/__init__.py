"""Number formats and fake quantization: the grid a value is rounded to, and the module that rounds
it.
"""

from repfx.quant.affine import Affine
from repfx.quant.fake_quant import FakeQuant
from repfx.quant.grid import Grid
from repfx.quant.observers import METHODS, Observer, search_scale
from repfx.quant.targets import TARGETS, Target, target_named

__all__ = [
    "METHODS",
    "TARGETS",
    "Affine",
    "FakeQuant",
    "Grid",
    "Observer",
    "Target",
    "search_scale",
    "target_named",
]
