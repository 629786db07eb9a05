"""Rules of the operators that act on each pixel alone: sums, scales, shifts, identities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from repfx.algebra import Geometry, Kernel
from repfx.errors import Inexact
from repfx.graph.ops import Constants, Fetch, Map, Op, Opaque, Sum, pointwise


def add(c: Constants, input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Op:
    if not isinstance(alpha, (int, float)):
        return Opaque()
    if _is_value(c, input) and _is_value(c, other):
        return Sum(((input, 1.0), (other, float(alpha))))
    if _is_value(c, input):
        return _shift(c, input, 1.0, other, float(alpha))
    return _shift(c, other, float(alpha), input, 1.0)


def sub(c: Constants, input: Any, other: Any, *, alpha: float = 1) -> Op:
    return add(c, input, other, alpha=-alpha)


def rsub(c: Constants, input: Any, other: Any, *, alpha: float = 1) -> Op:
    return Opaque() if alpha != 1 else add(c, other, input, alpha=-1)


def mul(c: Constants, input: Any, other: Any) -> Op:
    if _is_value(c, input) and _is_value(c, other):
        return Opaque("a product of two values")
    return _scale(c, input, other) if _is_value(c, input) else _scale(c, other, input)


def div(c: Constants, input: Any, other: Any, *, rounding_mode: str | None = None) -> Op:
    if rounding_mode is not None or not _is_value(c, input):
        return Opaque()
    return (
        Opaque("a quotient of two values")
        if _is_value(c, other)
        else _scale(c, input, other, power=-1)
    )


def neg(c: Constants, input: Any) -> Op:
    return _scale(c, input, -1)


def identity(c: Constants, input: Any, *_: Any, **__: Any) -> Map:
    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        return Kernel.diagonal(g, torch.ones(g.outputs, dtype=torch.float64, device="cpu"), None)

    return Map(input, "identity", pointwise, kernel)


def train_only(c: Constants, input: Any) -> Op:
    """The identity in eval mode, and something else in training.

    It is removed only inside a block that is merged."""
    return replace(identity(c, input), kind="dropout")


def dropout(
    c: Constants, input: Any, p: float = 0.5, training: Any = True, inplace: bool = False
) -> Op:
    if training is False:
        return identity(c, input)
    return train_only(c, input) if c.follows_mode(training) else Opaque("dropout that is always on")


def _scale(c: Constants, x: Any, factor: Any, power: int = 1) -> Op:
    if _is_number(factor) and factor == 1 and _keeps_dtype(c, x):
        return identity(c, x)
    return _affine(c, x, "scale", lambda v: (v**power, None), factor)


def _shift(c: Constants, x: Any, sign: float, amount: Any, alpha: float) -> Op:
    if _is_number(amount) and amount == 0 and sign == 1 and _keeps_dtype(c, x):
        return identity(c, x)  # Python's sum() starts from the number 0
    return _affine(
        c, x, "shift", lambda v: (torch.full_like(v, sign), alpha * v), amount, bias=True
    )


def _affine(
    c: Constants,
    x: Any,
    kind: str,
    f: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    operand: Any,
    bias: bool = False,
) -> Op:
    """y = scale * x + shift, both from a number, or a constant tensor with an entry per channel."""
    number = _is_number(operand)
    if not isinstance(x, fx.Node) or not (number or c.is_constant(operand)):
        return Opaque()
    shape = () if number else tuple(c.tensor(operand).shape)
    seen = c.dtype(x)
    if not number and (c.tensor(operand).is_complex() or _widens(c.tensor(operand), seen)):
        return Opaque("its operand changes the dtype of the value")

    def geometry(g: Geometry) -> Geometry:
        _per_channel(shape, g, lambda: c.rank(x))
        return pointwise(g, bias=bias)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        v = torch.tensor(operand, dtype=torch.float64, device="cpu") if number else fetch(operand)
        v = v if v.dtype.is_floating_point else v.to(torch.float64)
        return Kernel.diagonal(g, *f(v.reshape(-1).expand(g.outputs)))

    inputs = prod(shape) if prod(shape) > 1 else None
    return Map(x, kind, geometry, kernel, 0, 0 if number else prod(shape), inputs=inputs)


def _per_channel(shape: tuple[int, ...], g: Geometry, rank: Callable[[], int | None]) -> None:
    """Raises Inexact unless an operand of this shape has one number per channel.

    The shape of the value must stay the same too."""
    if shape == ():
        return
    channels_last = g.channel_axis == -1
    known = rank() if channels_last and len(shape) > 1 else None
    dims = (known or 1) if channels_last else len(g.axes) + 2
    at = len(shape) - 1 if channels_last else len(shape) - 1 - len(g.axes)
    others = [size for i, size in enumerate(shape) if i != at]
    if (
        len(shape) > dims
        or any(size != 1 for size in others)
        or (at >= 0 and shape[at] not in (1, g.outputs))
    ):
        raise Inexact(
            f"an operand of shape {tuple(shape)} is not one number per channel",
            "use shape (C, 1, 1)",
        )


def _widens(operand: Tensor, value: torch.dtype | None) -> bool:
    """Whether the result has another dtype than the value. Scalar tensors do not change it."""
    return (
        value is not None
        and operand.dim() > 0
        and torch.promote_types(value, operand.dtype) != value
    )


def _is_number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool)


def _keeps_dtype(c: Constants, x: Any) -> bool:
    """Whether a number cannot change the dtype of x. It would make integers floats, say."""
    seen = c.dtype(x) if isinstance(x, fx.Node) else None
    return isinstance(x, fx.Node) and (seen is None or seen.is_floating_point)


def _is_value(c: Constants, v: Any) -> bool:
    return isinstance(v, fx.Node) and not c.is_constant(v)
