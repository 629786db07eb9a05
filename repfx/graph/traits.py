"""Traits: what else is true of an operator, beside its rule. Each row of the vocabulary has some.

Some depend on how the operator is called: clamp(x, 0, 6) is a ReLU6, clamp(x, -1, 1) is not. The
functions below have the operator's own signature and say which.
"""

from __future__ import annotations

from enum import Flag, auto
from typing import Any

import torch
from torch import fx


class Trait(Flag):
    """Facts about the value that an operator gives."""

    NONE = 0
    LAYER = auto()  # a convolution or linear layer: it has a weight
    FRESH = auto()  # new memory, which it shares with none of its inputs
    RANDOM = auto()  # drawn at random, or never written
    NON_NEGATIVE = auto()  # no entry is below zero
    KEEPS_SIGN = auto()  # no entry is below zero if no entry of its inputs is
    SAME = auto()  # the input as it is, in eval mode
    MOVES = auto()  # entries of its input in other places, or some of them; nothing is computed
    RESHAPES = auto()  # entries in the order they had, in another shape
    SPREADS = auto()  # entries repeated along axes of size one
    PADS = auto()  # entries of its input and a constant around them
    JOINS = auto()  # entries of several values side by side
    STORES = auto()  # entries written into the memory of another value
    MAXIMUM = auto()  # the largest entry of each window
    AVERAGES = auto()  # means of entries
    PRODUCT = auto()  # a product of two values
    ACTIVATION = auto()  # a function of one entry at a time that is not linear
    CLIPS = (
        auto()
    )  # max(x, 0), perhaps with an upper end: what rounding to an unsigned grid does too
    TABLE = auto()  # one of 256 integers in, one of 256 out, on runtimes that have tables for it
    SWISH = auto()  # x * sigmoid(x)
    MEASURES = auto()  # a size or a type of its input, whatever the entries are
    CHECKS = auto()  # raises where something does not hold, and gives nothing


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
    """x where it is above the threshold, else the value."""
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
    """Nearest neighbours are moved, linear weights are positive, cubic ones are not."""
    if mode in ("nearest", "nearest-exact"):
        return Trait.MOVES | Trait.KEEPS_SIGN
    return Trait.NONE if mode == "bicubic" else Trait.KEEPS_SIGN


def product(input: Any, other: Any) -> Trait:
    """Of two values; a factor that is a number may be negative."""
    both = isinstance(input, fx.Node) and isinstance(other, fx.Node)
    return Trait.PRODUCT | Trait.KEEPS_SIGN if both else Trait.PRODUCT


def view(input: Any, *sizes: Any, **named: Any) -> Trait:
    """Of another shape; or of another type, whose entries are the same bits and other numbers."""
    given = (*sizes, *named.values())
    if any(isinstance(v, torch.dtype) for v in given):
        return Trait.NONE
    return Trait.MOVES | Trait.KEEPS_SIGN | Trait.RESHAPES
