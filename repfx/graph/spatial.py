"""Rules of convolutions, linear layers, batch norms, pads and average pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from repfx.algebra import Axis, Geometry, Kernel, impulse_response, swapped
from repfx.errors import Inexact
from repfx.graph.ops import Constants, Fetch, Map, Op, Opaque, Ref, pointwise
from repfx.graph.pointwise import identity


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
    """The kernel K of a convolution."""
    if not c.is_constant(weight) or not (bias is None or c.is_constant(bias)):
        return Opaque("its weight is quantized or computed from the input")
    shape = c.tensor(weight).shape
    if c.tensor(weight).is_complex():
        return Opaque("its weight is complex")
    n = len(shape) - 2
    strides, dilations = _tuple(stride, n), _tuple(dilation, n)
    taps = tuple(d * (k - 1) + 1 for k, d in zip(shape[2:], dilations, strict=True))
    pads = _conv_pads(padding, taps)
    axes = tuple(
        Axis(t, s, *p, gap=d if t > 1 else 1)
        for t, s, p, d in zip(taps, strides, pads, dilations, strict=True)
    )
    whole = Geometry(shape[1] * groups, shape[0], groups, axes, bias is not None, mode)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        return Kernel(g, fetch(weight), None if bias is None else fetch(bias))

    macs = shape[0] * shape[1] * prod(shape[2:])
    params = macs + (shape[0] if bias is not None else 0)
    return Map(
        input,
        "conv",
        lambda _: whole,
        kernel,
        macs,
        params,
        prod(strides),
        (n, 1),
        whole.inputs,
        own=whole,
    )


def transposed_convolution(
    c: Constants,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Op:
    """y[o, s*n + t - p] += K[o, i, t] x[i, n]. The weight is (in, out / groups, *taps)."""
    if not c.is_constant(weight) or not (bias is None or c.is_constant(bias)):
        return Opaque("its weight is quantized or computed from the input")
    shape = c.tensor(weight).shape
    n = len(shape) - 2
    strides, dilations, pads, extra = (
        _tuple(v, n) for v in (stride, dilation, padding, output_padding)
    )
    taps = tuple(d * (k - 1) + 1 for k, d in zip(shape[2:], dilations, strict=True))
    sizes = zip(taps, strides, pads, extra, dilations, strict=True)
    axes = tuple(Axis(t, s, p, p - e, d if t > 1 else 1) for t, s, p, e, d in sizes)
    whole = Geometry(shape[0], shape[1] * groups, groups, axes, bias is not None, transposed=True)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        return Kernel(g, swapped(fetch(weight), groups), None if bias is None else fetch(bias))

    params, step = shape.numel(), prod(strides)
    macs = Fraction(params, step)
    params += whole.outputs * whole.bias
    rate = Fraction(1, step)
    return Map(
        input,
        "conv_transpose",
        lambda _: whole,
        kernel,
        macs,
        params,
        rate,
        (n, 1),
        whole.inputs,
        own=whole,
    )


def linear(c: Constants, input: Any, weight: Any, bias: Any = None) -> Op:
    if not c.is_constant(weight) or not (bias is None or c.is_constant(bias)):
        return Opaque("its weight is quantized or computed from the input")
    if c.tensor(weight).dim() != 2:
        return Opaque("its weight is not a matrix")
    out, inputs = c.tensor(weight).shape
    whole = Geometry(inputs, out, 1, (), bias is not None, channel_axis=-1)

    def geometry(g: Geometry) -> Geometry:
        return replace(whole, axes=(Axis(),) * len(g.axes))

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        weights = fetch(weight).reshape(out, inputs, *(1,) * len(g.axes))
        return Kernel(g, weights, None if bias is None else fetch(bias))

    return Map(
        input,
        "linear",
        geometry,
        kernel,
        out * inputs,
        whole.params,
        1,
        (None, -1),
        inputs,
        own=whole,
    )


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
        return Opaque(
            "a batch norm without running statistics", "train it with track_running_stats=True"
        )
    if training is not False and not c.follows_mode(training):
        return Opaque("a batch norm that runs on batch statistics", "trace the model in eval mode")
    if not all(v is None or c.is_constant(v) for v in (running_mean, running_var, weight, bias)):
        return Opaque("its statistics are computed from the input")
    channels = c.tensor(running_mean).shape[0]

    def geometry(g: Geometry) -> Geometry:
        if g.channel_axis == -1 and g.axes:
            raise Inexact("a batch norm over an axis that is not the channel axis")
        if g.channel_axis == -1 and c.rank(input) != 2:
            raise Inexact("a batch norm after a linear layer of unknown rank", "pass an example")
        if g.outputs != channels:
            raise Inexact(f"a batch norm of {channels} channels after {g.outputs} channels")
        return pointwise(g, bias=True)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        scale = torch.rsqrt(fetch(running_var) + eps)
        scale = scale if weight is None else scale * fetch(weight)
        shift = -fetch(running_mean) * scale
        return Kernel.diagonal(g, scale, shift if bias is None else shift + fetch(bias))

    params = channels * (4 - (weight is None) - (bias is None))
    return Map(
        input,
        "bn",
        geometry,
        kernel,
        0,
        params,
        1,
        (None, None) if axes is None else (axes, 1),
        channels,
    )


def aten_batch_norm(
    c: Constants,
    input: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: Any,
    momentum: Any,
    eps: float,
    *_: Any,
) -> Op:
    return batch_norm(c, input, mean, var, weight, bias, training, momentum, eps)


def pad(
    c: Constants, input: Any, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> Op:
    """A padding: the identity with wider axes. Negative amounts crop."""
    if value is not None and not isinstance(value, (int, float)):
        return Opaque("a padding with a computed value")
    return _pad(c, input, pad, mode, float(value or 0))


def constant_pad(c: Constants, input: Any, pad: Sequence[int], value: Any = 0) -> Op:
    return _pad(c, input, pad, "constant", float(value))


def pad_own(c: Constants, input: Any, sides: Sequence[int], value: Any) -> Op:
    """`pad_with`: a padding with one constant per channel."""
    return (
        _pad(c, input, sides, "constant", value)
        if c.is_constant(value)
        else Opaque("a padding with a computed value")
    )


def _pad(c: Constants, input: Any, pad: Sequence[int], mode: str, fill: float | Ref) -> Op:
    if not all(isinstance(v, int) for v in pad):
        return Opaque("a padding computed from the input")
    sides = list(zip(pad[::2], pad[1::2], strict=True))

    def geometry(g: Geometry) -> Geometry:
        spatial, rest = sides[: len(g.axes)], sides[len(g.axes) :]
        if g.channel_axis == -1 or any(side != (0, 0) for side in rest):
            raise Inexact("a padding of the channels")
        spatial += [(0, 0)] * (len(g.axes) - len(spatial))
        axes = tuple(Axis(1, 1, *side) for side in reversed(spatial))
        return Geometry(
            g.outputs, g.outputs, g.outputs, axes, False, "zeros" if mode == "constant" else mode
        )

    return Map(input, "pad", geometry, identity(c, input).kernel, fill=fill)


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
    """An average pool: a depthwise kernel of 1 / k^2. Its taps are measured with an impulse."""
    if ceil_mode:
        return Opaque("an average pool with ceil_mode")
    if divisor_override is not None:
        return Opaque("an average pool with divisor_override")
    taps, pads = _tuple(kernel_size, axes), _tuple(padding, axes)
    strides = taps if stride in (None, [], ()) else _tuple(stride, axes)
    if any(pads) and not count_include_pad:
        return Opaque(
            "an average pool that does not count its padding", "use count_include_pad=True"
        )
    lines = tuple(Axis(t, s, p, p) for t, s, p in zip(taps, strides, pads, strict=True))
    run = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]

    def geometry(g: Geometry) -> Geometry:
        return Geometry(g.outputs, g.outputs, g.outputs, lines)

    def kernel(fetch: Fetch, g: Geometry) -> Kernel:
        one = impulse_response(lambda x: run(x, taps, strides, pads), Geometry(1, 1, 1, lines))
        return Kernel(g, one.weight.expand(g.outputs, *one.weight.shape[1:]))

    return Map(input, "avgpool", geometry, kernel, 0, 0, prod(strides), (axes, 1))


def same_padding(taps: int) -> tuple[int, int]:
    """What padding="same" puts before and after an axis of this many taps, gaps included."""
    return (taps - 1) // 2, taps - 1 - (taps - 1) // 2


def _conv_pads(padding: Any, taps: tuple[int, ...]) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0)] * len(taps)
    if padding == "same":
        return [same_padding(t) for t in taps]
    return [(p, p) for p in _tuple(padding, len(taps))]


def _tuple(v: Any, n: int) -> tuple[int, ...]:
    found = (v,) * n if isinstance(v, int) else tuple(v)
    return found * n if len(found) == 1 else found
