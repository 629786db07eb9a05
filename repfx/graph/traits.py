"""Traits: facts about an operator beyond its rule, such as that its output is never negative.

Some depend on the arguments: clamp(x, 0, 6) is a ReLU6, clamp(x, -1, 1) is not. The functions below
have the signatures of their operators, and return the traits of a call.
"""

from __future__ import annotations

from enum import Flag, auto
from typing import Any

import torch
from torch import fx


class Trait(Flag):
    """Facts about the value that an operator returns."""

    NONE = 0
    LAYER = auto()  # a convolution or linear layer: it has a weight
    FRESH = auto()  # new memory, not shared with any input
    RANDOM = auto()  # random values
    UNSET = auto()  # memory whose values are still to be written
    NON_NEGATIVE = auto()  # no entry is negative
    KEEPS_SIGN = auto()  # no entry is negative unless an entry of an input is
    SAME = auto()  # the input itself, in eval mode
    MOVES = auto()  # entries of the input, or some of them, in other places; nothing is computed
    RESHAPES = auto()  # the same entries in the same order, in another shape
    SPREADS = auto()  # entries repeated along axes of size one
    PADS = auto()  # the input with a constant around it
    JOINS = auto()  # several values side by side
    STORES = auto()  # writes into the memory of another value
    MAXIMUM = auto()  # the largest entry of each window
    AVERAGES = auto()  # means of entries
    PRODUCT = auto()  # a product of two values
    ACTIVATION = auto()  # a nonlinear function of each entry
    CLIPS = auto()  # max(x, 0), perhaps with an upper limit; rounding to an unsigned grid does this
    TABLE = auto()  # runtimes compute it on 8-bit integers with a table of 256 entries
    SWISH = auto()  # x * sigmoid(x)
    MEASURES = auto()  # a size or a type of its input, whatever the entries are
    CHECKS = auto()  # an assertion: it raises an error or returns nothing


def attribute(input: Any, name: str, *default: Any) -> Trait:
    """getattr: of what a tensor has, transposes are values and the rest describes it."""
    return Trait.NONE if name in ("T", "mT", "H", "mH", "real", "imag") else Trait.MEASURES


def clamp(input: Any, min: Any = None, max: Any = None) -> Trait:
    number = isinstance(min, (int, float)) and not isinstance(min, bool)
    upper = max is None or isinstance(max, (int, float))
    if not number or not upper or min < 0 or (max is not None and max < min):
        return Trait.NONE
    return Trait.NON_NEGATIVE | (Trait.CLIPS if min == 0 else Trait.NONE)


def hardtanh(input: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Trait:
    return clamp(input, min_val, max_val)


def clamp_min(input: Any, min: Any) -> Trait:
    return clamp(input, min)


def threshold(input: Any, threshold: Any, value: Any, inplace: bool = False) -> Trait:
    """F.threshold: x where x is above the threshold, else `value`."""
    return clamp(input, 0) if threshold == 0 and value == 0 else Trait.NONE


def power(input: Any, exponent: Any) -> Trait:
    even = isinstance(exponent, (int, float)) and exponent % 2 == 0
    return Trait.NON_NEGATIVE if even else Trait.NONE


def interpolate(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    *_: Any,
    **__: Any,
) -> Trait:
    """Nearest-neighbour only moves entries. Linear weights are not negative, cubic ones may be."""
    if mode in ("nearest", "nearest-exact"):
        return Trait.MOVES | Trait.KEEPS_SIGN
    return Trait.NONE if mode == "bicubic" else Trait.KEEPS_SIGN


def product(input: Any, other: Any) -> Trait:
    """A product of two values keeps the sign. A factor that is a number may be negative."""
    both = isinstance(input, fx.Node) and isinstance(other, fx.Node)
    return Trait.PRODUCT | Trait.KEEPS_SIGN if both else Trait.PRODUCT


def view(input: Any, *sizes: Any, **named: Any) -> Trait:
    """A view with another shape. With another dtype the same bits are other numbers."""
    given = (*sizes, *named.values())
    if any(isinstance(v, torch.dtype) for v in given):
        return Trait.NONE
    return Trait.MOVES | Trait.KEEPS_SIGN | Trait.RESHAPES
