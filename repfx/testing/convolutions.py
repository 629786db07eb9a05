"""Convolutions, linear layers and batch norms, in all the ways they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from repfx.testing.layers import (
    WEIGHTS,
    ChannelsLast,
    ComputedWeight,
    FunctionalNorm,
    RowNorm,
    Scale,
    Shift,
)
from repfx.testing.plan import Draft, Recipe, Unfit

# The module for each number of axes.
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
DECONV: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def per_axis(d: Draft, *choices: int, equal: float = 0.6) -> tuple[int, ...]:
    """One of the choices for each axis, or one for all axes."""
    if d.odds(equal):
        return (d.one(*choices),) * d.axes
    return tuple(d.one(*choices) for _ in range(d.axes))


def keeping(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """The padding that keeps the sizes if the kernel is odd."""
    return tuple(t * (k - 1) // 2 for k, t in zip(kernel, dilation, strict=True))


def groups_of(d: Draft, inputs: int, outputs: int) -> int:
    return d.one(*(g for g in (1, 1, 2, inputs) if inputs % g == 0 and outputs % g == 0))


def conv(d: Draft, a: int, **fixed: Any) -> int:
    """A convolution; options that are not fixed are drawn."""
    inputs = d.channels(a)
    out = fixed.pop("out", None) or d.one(2, 4, 6, inputs, inputs)
    options: dict[str, Any] = {
        "groups": groups_of(d, inputs, out),
        "bias": d.odds(0.4),
        "stride": 1,
        "dilation": (1,) * d.axes,
    }
    options |= {"kernel_size": per_axis(d, 1, 1, 3, 3, 5)} | fixed
    if "padding" not in options:
        same = keeping(options["kernel_size"], options["dilation"])
        options["padding"] = d.one(0, same, same, same, 1, per_axis(d, 0, 1, 2))
    return d.add(CONV[d.axes](inputs, out, **options), a)


def even(d: Draft, a: int) -> int:
    return conv(d, a, kernel_size=per_axis(d, 2, 2, 4), dilation=per_axis(d, 1, 1, 2))


def big(d: Draft, a: int) -> int:
    """A convolution with kernel size 7 along all axes, or along one."""
    kernel = [7] * d.axes
    if d.odds(0.6):
        kernel = [1] * d.axes
        kernel[d.rng.randrange(d.axes)] = 7
    depthwise = d.axes == 3 or d.odds(0.5)
    fixed = {"out": d.channels(a), "groups": d.channels(a)} if depthwise else {}
    return conv(d, a, kernel_size=tuple(kernel), padding=tuple(k // 2 for k in kernel), **fixed)


def same(d: Draft, a: int) -> int:
    """A convolution with padding='same', which pads unevenly if the number of taps is even."""
    return conv(
        d,
        a,
        kernel_size=per_axis(d, 1, 2, 3, 4),
        dilation=per_axis(d, 1, 2),
        padding=d.one("same", "same", "valid"),
    )


def mirrored(d: Draft, a: int) -> int:
    return conv(
        d, a, padding_mode=d.one("reflect", "circular", "replicate"), kernel_size=per_axis(d, 1, 3)
    )


def transposed(d: Draft, a: int) -> int:
    inputs, out = d.channels(a), d.one(2, 4, d.channels(a))
    stride, dilation = per_axis(d, 1, 2), per_axis(d, 1, 1, 2)
    extra = (
        tuple(d.rng.randrange(max(s, t)) for s, t in zip(stride, dilation, strict=True))
        if d.odds(0.4)
        else 0
    )
    options: Any = {
        "output_padding": extra,
        "groups": groups_of(d, inputs, out),
        "bias": d.odds(0.4),
        "dilation": dilation,
    }
    kernel = per_axis(d, 1, 2, 3, 4)
    y = d.add(DECONV[d.axes](inputs, out, kernel, stride, per_axis(d, 0, 1), **options), a)
    return d.do(lambda: y, lambda: plain_norm(d, y), lambda: conv(d, y, kernel_size=(1,) * d.axes))


def computed(d: Draft, a: int) -> int:
    out = d.one(4, 6, d.channels(a), d.channels(a))
    kernel, groups = per_axis(d, 1, 3), groups_of(d, d.channels(a), out)
    return d.add(
        ComputedWeight(d.one(*WEIGHTS), d.channels(a), out, kernel, groups, d.odds(0.4)), a
    )


def identity_plus(d: Draft, a: int) -> int:
    """A convolution with the weight W + I."""
    c = d.channels(a)
    return d.add(
        ComputedWeight(
            "identity", c, c, per_axis(d, 1, 3, equal=1), groups_of(d, c, c), d.odds(0.4)
        ),
        a,
    )


def plain_norm(d: Draft, a: int) -> int:
    return d.add(NORM[d.axes](d.channels(a), eps=d.one(1e-5, 1e-3)), a)


def bare_norm(d: Draft, a: int) -> int:
    return d.add(NORM[d.axes](d.channels(a), affine=False), a)


def weighted_norm(d: Draft, a: int) -> int:
    """A batch norm with a weight but no bias, or the other way round."""
    norm = NORM[d.axes](d.channels(a))
    norm.register_parameter(d.one("bias", "bias", "weight"), None)
    return d.add(norm, a)


def sync_norm(d: Draft, a: int) -> int:
    return d.add(nn.SyncBatchNorm(d.channels(a)), a)


def functional_norm(d: Draft, a: int) -> int:
    return d.add(FunctionalNorm(d.channels(a), d.axes, formula=False), a)


def formula_norm(d: Draft, a: int) -> int:
    return d.add(FunctionalNorm(d.channels(a), d.axes, formula=True), a)


STEPS: dict[str, Callable[[int], nn.Module]] = {
    "norm": lambda c: RowNorm(nn.BatchNorm1d(c)),
    "scale": lambda c: Scale(torch.rand(c) + 0.5),
    "shift": lambda c: Shift(torch.rand(c) - 0.5),
    "bend": lambda c: nn.GELU(),
    "layer norm": nn.LayerNorm,
}


def last(d: Draft, a: int) -> int:
    """Linear layers on channels-last values, with norms, scales and perhaps a residual."""
    c = d.channels(a)
    residual = d.odds(0.35)
    steps: list[nn.Module] = []
    weights = (4, 1, 1, 1, *((0.4, 0.2) if d.nonlinear else (0, 0)))
    for kind in d.rng.choices(("linear", *STEPS), weights, k=d.one(1, 2, 3)):
        if kind == "linear":
            out = c if residual else d.one(c, 2, 6)
            steps.append(nn.Linear(c, out, bias=d.odds(0.6)))
            c = out
        else:
            steps.append(STEPS[kind](c))
    return d.add(ChannelsLast(d.axes, d.odds(0.25), residual, steps), a)


def again(d: Draft, a: int) -> int:
    """A layer that is already in the plan, called on another value."""
    fits = [
        m
        for m in d.layers
        if getattr(m, "in_channels", getattr(m, "num_features", 0)) == d.channels(a)
    ]
    if not fits:
        raise Unfit("no layer accepts it")
    return d.add(d.rng.choice(fits), a)


def strided(d: Draft, a: int) -> int:
    return conv(d, a, stride=per_axis(d, 1, 2, 2, 3, equal=0.4))


def dilated(d: Draft, a: int) -> int:
    return conv(d, a, dilation=per_axis(d, 1, 2, 3, equal=0.4), kernel_size=per_axis(d, 2, 3))


RECIPES = {
    "conv": Recipe(conv, 8),
    "conv again": Recipe(again, 1.8),
    "conv even": Recipe(even, 1.2),
    "conv big": Recipe(big),
    "conv same": Recipe(same, 1.2),
    "conv strided": Recipe(strided, 1.2),
    "conv dilated": Recipe(dilated, 1.2),
    "conv mirrored": Recipe(mirrored),
    "conv transposed": Recipe(transposed, 1.2),
    "conv computed": Recipe(computed, 1.2),
    "conv plus identity": Recipe(identity_plus),
    "linear": Recipe(last, 1.2),
    "norm": Recipe(plain_norm, 4),
    "norm bare": Recipe(bare_norm),
    "norm weighted": Recipe(weighted_norm),
    "norm sync": Recipe(sync_norm),
    "norm functional": Recipe(functional_norm),
    "norm by formula": Recipe(formula_norm),
}
