"""THE table: what each operator of a graph means to the algebra.

An operator is one of four things, whatever spelling it came in (module, function, method, aten):

    Map(x)      an affine, shift-invariant map of one value      convolution, batch norm, scale, shift, pool, pad, crop
    Sum(x, ..)  a weighted sum of values                         add, sub
    Opaque      anything else, with the reason where it is one a person would want to know

A rule is a function with the operator's own signature, so Python binds and defaults its arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra import Axis, Geometry, Kernel, impulse_response
from repfx.errors import Inexact

aten = torch.ops.aten
Ref = str | fx.Node  # a tensor that does not depend on the input: an attribute's path, or an expression of such
Fetch = Callable[[Ref], Tensor]


class Constants(Protocol):
    """What a rule may ask of the graph."""

    def is_constant(self, value: Any) -> bool: ...
    def follows_mode(self, value: Any) -> bool: ...
    def tensor(self, ref: Ref) -> Tensor: ...
    def rank(self, node: fx.Node) -> int | None: ...


@dataclass(frozen=True)
class Map:
    """y = map(x). `geometry` takes that of x relative to the source; `kernel` fetches the weights of that geometry.

    `macs` is per output position. `space` is (number of axes, channel axis) and `inputs` the channels, where known.
    """

    x: fx.Node
    kind: str
    geometry: Callable[[Geometry], Geometry]
    kernel: Callable[[Fetch, Geometry], Kernel]
    macs: int = 0
    params: int = 0
    stride: int = 1
    space: tuple[int, int] | None = None
    inputs: int | None = None

    @property
    def values(self) -> tuple[fx.Node, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Sum:
    """y = sum of factor * value over `terms`."""

    terms: tuple[tuple[fx.Node, float], ...]
    kind: str = "add"
    macs: int = 0
    params: int = 0
    stride: int = 1

    @property
    def values(self) -> tuple[fx.Node, ...]:
        return tuple(node for node, _ in self.terms)


@dataclass(frozen=True)
class Opaque:
    """Not a map of this algebra. `reason` is given where the operator looks as if it were one."""

    reason: str = ""
    cure: str = ""


Op = Map | Sum | Opaque


def convolution(
    c: Constants,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    mode: str = "zeros",
) -> Op:
    """K, with d - 1 zeros between the taps."""
    if not c.is_constant(weight) or not (bias is None or c.is_constant(bias)):
        return Opaque("its weight is quantized or computed from the input")
    shape = c.tensor(weight).shape
    n = len(shape) - 2
    strides, dilations = _tuple(stride, n), _tuple(dilation, n)
    taps = tuple(d * (k - 1) + 1 for k, d in zip(shape[2:], dilations, strict=True))
    pads = _conv_pads(padding, taps)
    axes = tuple(Axis(t, s, *p) for t, s, p in zip(taps, strides, pads, strict=True))
    whole = Geometry(shape[1] * groups, shape[0], groups, axes, bias is not None, mode)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        w = fetch(weight)
        if any(d > 1 for d in dilations):
            w = _dilate(w, dilations)
        return Kernel(g, w, None if bias is None else fetch(bias))

    macs = shape[0] * shape[1] * _prod(shape[2:])
    params = macs + (shape[0] if bias is not None else 0)
    return Map(input, "conv", lambda _: whole, kernel, macs, params, _prod(strides), (n, 1), whole.inputs)


def linear(c: Constants, input: Any, weight: Any, bias: Any = None) -> Op:
    if not c.is_constant(weight) or not (bias is None or c.is_constant(bias)):
        return Opaque("its weight is quantized or computed from the input")
    out, inputs = c.tensor(weight).shape
    whole = Geometry(inputs, out, 1, (), bias is not None, channel_axis=-1)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        return Kernel(g, fetch(weight), None if bias is None else fetch(bias))

    return Map(input, "linear", lambda _: whole, kernel, out * inputs, whole.params, 1, (0, -1), inputs)


def batch_norm(
    c: Constants,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    axes: int | None = None,
) -> Op:
    """y = a*x + c, a = gamma / sqrt(var + eps), c = beta - mean*a, with the running statistics."""
    if running_mean is None or running_var is None:
        return Opaque("a batch norm without running statistics", "train it with track_running_stats=True")
    if training is not False and not c.follows_mode(training):
        return Opaque("a batch norm that runs on batch statistics", "trace the model in eval mode")
    if not all(v is None or c.is_constant(v) for v in (running_mean, running_var, weight, bias)):
        return Opaque("its statistics are computed from the input")
    channels = c.tensor(running_mean).shape[0]

    def geometry(g: Geometry) -> Geometry:
        if g.channel_axis == -1 and c.rank(input) != 2:
            raise Inexact("a batch norm after a linear of unknown rank", "pass an example")
        if g.outputs != channels:
            raise Inexact(f"{g.outputs} channels meet a batch norm of {channels}")
        return _pointwise(g, bias=True)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        scale = torch.rsqrt(fetch(running_var) + eps)
        scale = scale if weight is None else scale * fetch(weight)
        shift = -fetch(running_mean) * scale
        return Kernel.diagonal(g, scale, shift if bias is None else shift + fetch(bias))

    params = channels * (4 - (weight is None) - (bias is None))
    return Map(input, "bn", geometry, kernel, 0, params, 1, None if axes is None else (axes, 1), channels)


def aten_batch_norm(
    c: Constants, input: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: float, *_: Any
) -> Op:
    return batch_norm(c, input, mean, var, weight, bias, training, momentum, eps)


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
    return Opaque("a quotient of two values") if _is_value(c, other) else _scale(c, input, other, power=-1)


def neg(c: Constants, input: Any) -> Op:
    return _scale(c, input, -1)


def identity(c: Constants, input: Any, *_: Any, **__: Any) -> Op:
    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        return Kernel.diagonal(g, torch.ones(g.outputs, dtype=torch.float64), None)

    return Map(input, "identity", _pointwise, kernel)


def dropout(c: Constants, input: Any, p: float = 0.5, training: Any = True, inplace: bool = False) -> Op:
    return identity(c, input) if training is False or c.follows_mode(training) else Opaque("dropout that is always on")


def pad(c: Constants, input: Any, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Op:
    """The identity with wider axes; a negative amount crops."""
    if not all(isinstance(v, int) for v in pad):
        return Opaque("a padding computed from the input")
    if mode == "constant" and isinstance(value, (int, float)) and value != 0:
        return Opaque("a padding with a constant other than zero")
    if value is not None and not isinstance(value, (int, float)):
        return Opaque("a padding with a computed value")
    sides = list(zip(pad[::2], pad[1::2], strict=True))

    def geometry(g: Geometry) -> Geometry:
        spatial, rest = sides[: len(g.axes)], sides[len(g.axes) :]
        if g.channel_axis == -1 or any(side != (0, 0) for side in rest):
            raise Inexact("a padding of the channels")
        spatial += [(0, 0)] * (len(g.axes) - len(spatial))
        axes = tuple(Axis(1, 1, *side) for side in reversed(spatial))
        return Geometry(g.outputs, g.outputs, g.outputs, axes, False, "zeros" if mode == "constant" else mode)

    return Map(input, "pad", geometry, identity(c, input).kernel)  # type: ignore[union-attr]


def avg_pool(
    c: Constants,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    axes: int,
) -> Op:
    """Depthwise 1 / k^2, its taps read off by an impulse."""
    if ceil_mode:
        return Opaque("an average pool with ceil_mode")
    if divisor_override is not None:
        return Opaque("an average pool with divisor_override")
    taps, pads = _tuple(kernel_size, axes), _tuple(padding, axes)
    strides = taps if stride in (None, [], ()) else _tuple(stride, axes)
    if any(pads) and not count_include_pad:
        return Opaque("an average pool that does not count its padding", "use count_include_pad=True")
    lines = tuple(Axis(t, s, p, p) for t, s, p in zip(taps, strides, pads, strict=True))
    run = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]

    def geometry(g: Geometry) -> Geometry:
        return Geometry(g.outputs, g.outputs, g.outputs, lines)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        one = impulse_response(lambda x: run(x, taps, strides, pads), Geometry(1, 1, 1, lines))
        return Kernel(g, one.weight.expand(g.outputs, *one.weight.shape[1:]))

    return Map(input, "avgpool", geometry, kernel, 0, 0, _prod(strides), (axes, 1))


def _scale(c: Constants, x: Any, factor: Any, power: int = 1) -> Op:
    return _affine(c, x, "scale", lambda v: (v**power, None), factor)


def _shift(c: Constants, x: Any, sign: float, amount: Any, alpha: float) -> Op:
    if isinstance(amount, (int, float)) and amount == 0 and sign == 1:
        return identity(c, x)  # the literal that sum() starts from
    return _affine(c, x, "shift", lambda v: (torch.full_like(v, sign), alpha * v), amount, bias=True)


def _affine(
    c: Constants, x: Any, kind: str, f: Callable[[Tensor], tuple[Tensor, Tensor | None]], operand: Any, bias: bool = False
) -> Op:
    """y = scale * x + shift from one operand that is a number or a constant tensor with one entry a channel."""
    number = isinstance(operand, (int, float)) and not isinstance(operand, bool)
    if not isinstance(x, fx.Node) or not (number or c.is_constant(operand)):
        return Opaque()
    shape = () if number else tuple(c.tensor(operand).shape)

    def geometry(g: Geometry) -> Geometry:
        _per_channel(shape, g, lambda: c.rank(x))
        return _pointwise(g, bias=bias)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        v = torch.tensor(operand, dtype=torch.float64) if number else fetch(operand)
        return Kernel.diagonal(g, *f(v.reshape(-1).expand(g.outputs)))

    inputs = _prod(shape) if _prod(shape) > 1 else None
    return Map(x, kind, geometry, kernel, 0, 0 if number else _prod(shape), 1, None, inputs)


def _per_channel(shape: tuple[int, ...], g: Geometry, rank: Callable[[], int | None]) -> None:
    """Raises Inexact unless an operand of this shape gives one number per channel and leaves the value's shape alone."""
    if shape == ():
        return
    channels_last = g.channel_axis == -1
    known = rank() if channels_last and len(shape) > 1 else None
    dims = (known or 1) if channels_last else len(g.axes) + 2
    at = len(shape) - 1 if channels_last else len(shape) - 1 - len(g.axes)
    others = [size for i, size in enumerate(shape) if i != at]
    if len(shape) > dims or any(size != 1 for size in others) or (at >= 0 and shape[at] not in (1, g.outputs)):
        raise Inexact(f"an operand of shape {tuple(shape)} is not one number a channel", "use shape (C, 1, 1)")


def _pointwise(g: Geometry, bias: bool = False) -> Geometry:
    return Geometry(g.outputs, g.outputs, g.outputs, (Axis(),) * len(g.axes), bias, channel_axis=g.channel_axis)


def _is_value(c: Constants, v: Any) -> bool:
    return isinstance(v, fx.Node) and not c.is_constant(v)


def _conv_pads(padding: Any, taps: tuple[int, ...]) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0)] * len(taps)
    if padding == "same":
        return [((t - 1) // 2, t - 1 - (t - 1) // 2) for t in taps]
    return [(p, p) for p in _tuple(padding, len(taps))]


def _dilate(w: Tensor, dilations: Sequence[int]) -> Tensor:
    for axis, d in enumerate(dilations, start=2):
        if d > 1 and w.shape[axis] > 1:
            w = w.unsqueeze(axis + 1)
            w = F.pad(w, [0, 0] * (w.dim() - axis - 2) + [0, d - 1]).flatten(axis, axis + 1).narrow(
                axis, 0, d * (w.shape[axis] - 1) + 1
            )
    return w


def _tuple(v: Any, n: int) -> tuple[int, ...]:
    found = (v,) * n if isinstance(v, int) else tuple(v)
    return found * n if len(found) == 1 else found


def _prod(sizes: Sequence[int]) -> int:
    total = 1
    for s in sizes:
        total *= s
    return total


def _pool_rule(axes: int) -> Callable[..., Op]:
    return lambda c, *args, **kwargs: avg_pool(c, *args, **kwargs, axes=axes)


CALLS: dict[Any, Callable[..., Op]] = {
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], convolution),
    **dict.fromkeys([aten.conv1d.default, aten.conv2d.default, aten.conv3d.default], convolution),
    **dict.fromkeys([aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding], convolution),
    **dict.fromkeys([F.linear, aten.linear.default], linear),
    F.batch_norm: batch_norm,
    **dict.fromkeys([torch.batch_norm, aten.batch_norm.default], aten_batch_norm),
    **dict.fromkeys([operator.add, operator.iadd, torch.add, "add", "add_", aten.add.Tensor, aten.add_.Tensor], add),
    **dict.fromkeys([operator.sub, operator.isub, torch.sub, "sub", "sub_", aten.sub.Tensor, aten.sub_.Tensor], sub),
    **dict.fromkeys([torch.rsub, aten.rsub.Scalar, aten.rsub.Tensor], rsub),
    **dict.fromkeys([operator.mul, operator.imul, torch.mul, "mul", "mul_", aten.mul.Tensor, aten.mul_.Tensor], mul),
    **dict.fromkeys([operator.truediv, torch.div, "div", aten.div.Tensor], div),
    **dict.fromkeys([operator.neg, torch.neg, "neg", aten.neg.default], neg),
    **dict.fromkeys([F.dropout, aten.dropout.default], dropout),
    **dict.fromkeys(["contiguous", aten.contiguous.default, aten.clone.default, aten.alias.default, "clone"], identity),
    **dict.fromkeys([F.pad, aten.pad.default, aten.constant_pad_nd.default], pad),
    **dict.fromkeys([F.avg_pool1d, aten.avg_pool1d.default], _pool_rule(1)),
    **dict.fromkeys([F.avg_pool2d, aten.avg_pool2d.default], _pool_rule(2)),
    **dict.fromkeys([F.avg_pool3d, aten.avg_pool3d.default], _pool_rule(3)),
}
CALLS[aten.constant_pad_nd.default] = lambda c, input, p, value=0: pad(c, input, p, "constant", value)
