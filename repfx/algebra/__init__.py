"""Affine, shift-invariant maps, such as convolutions: when two compose exactly, and into what."""

from repfx.algebra.axis import Axis
from repfx.algebra.fixed import Fixed
from repfx.algebra.geometry import Geometry
from repfx.algebra.impulse import impulse_response
from repfx.algebra.kernel import CONVS, Kernel, dense, swapped
from repfx.algebra.links import Links, Rows
from repfx.algebra.norm import KernelNorm, Moments
from repfx.algebra.pad import pad_with

__all__ = [
    "CONVS",
    "Axis",
    "Fixed",
    "Geometry",
    "Kernel",
    "KernelNorm",
    "Links",
    "Moments",
    "Rows",
    "dense",
    "impulse_response",
    "pad_with",
    "swapped",
]
