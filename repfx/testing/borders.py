"""Pads, crops, pools, resizes and other operators that move positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.testing.convolutions import CONV, NORM, conv, per_axis, plain_norm
from repfx.testing.layers import PaddedBy, Sides, flat
from repfx.testing.plan import Draft, Recipe

ZERO_PAD: dict[int, Any] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
CONSTANT_PAD: dict[int, Any] = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}
AVG: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
AVG_CALL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE: dict[int, Any] = {
    1: nn.AdaptiveAvgPool1d,
    2: nn.AdaptiveAvgPool2d,
    3: nn.AdaptiveAvgPool3d,
}
MAX: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def sides(d: Draft, *choices: int) -> Sides:
    return [(d.one(*choices), d.one(*choices)) for _ in range(d.axes)]


def before_convolution(d: Draft, a: int, odds: float = 0.6) -> int:
    """Mostly adds a convolution without padding after the value."""
    return conv(d, a, kernel_size=per_axis(d, 1, 2, 3, 3), padding=0) if d.odds(odds) else a


def padded(d: Draft, a: int) -> int:
    """Zero padding, uneven, perhaps with a crop on one side."""
    pad = flat(sides(d, 0, 1, 1, 2, -1))
    text = d.one("F.pad", "F.pad(value=0)", "layer", "layer", "last axis")
    if text == "layer":
        y = d.add(ZERO_PAD[d.axes](tuple(pad)), a)
    else:
        short = pad[:2] if text == "last axis" else pad
        options: Any = {"value": 0.0} if text == "F.pad(value=0)" else {}
        y = d.call(f"{text}, {short}", lambda v: F.pad(v, short, **options), a)
    return before_convolution(d, y)


def padded_by_value(d: Draft, a: int) -> int:
    pad, value = flat(sides(d, 0, 1, 1, 2)), d.one(0.5, -1.0)
    if d.odds(0.4):
        return before_convolution(d, d.add(CONSTANT_PAD[d.axes](tuple(pad), value), a))
    return before_convolution(
        d, d.call(f"F.pad, {pad}, {value}", lambda v: F.pad(v, pad, "constant", value), a)
    )


def padded_by_mirror(d: Draft, a: int) -> int:
    pad, mode = flat(sides(d, 0, 1, 2)), d.one("reflect", "replicate", "circular")
    return before_convolution(
        d, d.call(f"F.pad, {pad}, {mode}", lambda v: F.pad(v, pad, mode=mode), a)
    )


def cropped(d: Draft, a: int) -> int:
    ends = {0: None, 1: -1, 2: -2}
    cut = [slice(b, ends[e]) for b, e in sides(d, 0, 1, 1, 2)]
    fewer = cut[: d.rng.randint(1, d.axes)]
    amounts, start, n = flat(sides(d, 0, -1, -1, -2)), d.one(0, 1, 2), d.shape(a)[2] - 3
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        f"v[:, :, {cut}]": lambda v: v[(slice(None), slice(None), *cut)],
        f"v[:, :, {fewer}]": lambda v: v[(slice(None), slice(None), *fewer)],
        f"v[..., {cut[-1]}]": lambda v: v[..., cut[-1]],
        f"F.pad(v, {amounts})": lambda v: F.pad(v, amounts),
        f"v.narrow(2, {start}, {n})": lambda v: v.narrow(2, start, n),
    }
    text = d.one(*ways)
    return before_convolution(d, d.call(text, ways[text], a), 0.3)


def every_other(d: Draft, a: int) -> int:
    """Slices with a step, which act as a stride."""
    steps = [slice(d.one(0, 0, 1), None, d.one(1, 2)) for _ in range(d.axes)]
    y = d.call(f"v[:, :, {steps}]", lambda v: v[(slice(None), slice(None), *steps)], a)
    return before_convolution(d, y, 0.3)


def around(spelling: str) -> Callable[[Draft, int], int]:
    """Padding with one constant per channel.

    It is the shift of the norm or the bias of the convolution before it, or some other constant.
    """

    def draw(d: Draft, a: int) -> int:
        p = d.one(1, 1, 2)
        border = [(p, p)] * d.axes if d.odds(0.6) else sides(d, 0, 1, 2)
        written = [True] * (2 * d.axes)
        if spelling == "bordered" and d.odds(0.25):
            written = [d.odds(0.6) for _ in written]
        channels = d.one(2, 4, d.channels(a))
        layer: Any = CONV[d.axes](d.channels(a), channels, 1)
        if d.odds(0.6):
            layer.bias = layer.bias if d.odds(0.3) else None
            layer = nn.Sequential(layer, NORM[d.axes](channels))
        own = d.uniform(channels) if d.odds(0.25) else None
        y = d.add(PaddedBy(layer, spelling, border, written, own), a)
        return before_convolution(d, y, 0.8)

    return draw


def average(d: Draft, a: int) -> int:
    side = per_axis(d, 2, 3, 3, equal=0.7)
    pad = tuple(d.one(0, k // 2) for k in side)
    stride = d.one(1, 1, 2, None)
    options = f"{side}, stride={stride}, padding={pad}"
    if d.odds(0.5):
        y = d.add(AVG[d.axes](side, stride, pad), a)
    else:
        y = d.call(options, lambda v: AVG_CALL[d.axes](v, side, stride, pad), a)
    return d.do(lambda: y, lambda: plain_norm(d, y), lambda: conv(d, y, kernel_size=(1,) * d.axes))


def average_oddly(d: Draft, a: int) -> int:
    """An average pool with an option that makes it another convolution, or none."""
    ways: list[dict[str, Any]] = [
        {"ceil_mode": True},
        {"count_include_pad": False},
        {"divisor_override": 3},
    ]
    odd = d.rng.choice(ways)
    if d.axes == 1 and "divisor_override" in odd:
        odd = {"ceil_mode": True}
    side = d.one(2, 3)
    y = d.add(AVG[d.axes](side, d.one(1, 2), d.one(0, side // 2), **odd), a)
    return plain_norm(d, y) if d.odds(0.4) else y


def adaptive(d: Draft, a: int) -> int:
    """An adaptive pool to a few positions, or to all, which is the identity at this one size."""
    return d.add(ADAPTIVE[d.axes](d.one(3, 4, tuple(d.shape(a)[2:]))), a)


def largest(d: Draft, a: int) -> int:
    return d.add(MAX[d.axes](d.one(2, 3), d.one(1, 2), d.one(0, 1), ceil_mode=d.odds(0.2)), a)


def positions_to_channels(d: Draft, a: int) -> int:
    return d.add(d.one(nn.PixelShuffle(2), nn.PixelShuffle(2), nn.PixelUnshuffle(2)), a)


def stretched(d: Draft, a: int) -> int:
    mode: Any = d.one("nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[d.axes])
    return d.call(
        f"F.interpolate, {mode}", lambda v: F.interpolate(v, scale_factor=2.0, mode=mode), a
    )


def mean(d: Draft, a: int) -> int:
    """A value minus its mean over the positions: linear, but not a convolution."""
    dims = tuple(range(2, d.axes + 2))
    return d.call("v - mean", lambda v: v - v.mean(dims, keepdim=True), a)


def wrapped(d: Draft, a: int) -> int:
    """Moves positions: a roll, a flip, or a swap of axes."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "v.roll(1, -1)": lambda v: v.roll(1, -1),
        "torch.flip(v, [2])": lambda v: torch.flip(v, [2]),
        "v.transpose(2, -1)": lambda v: v.transpose(2, -1),
    }
    text = d.one(*ways)
    return d.call(text, ways[text], a)


RECIPES = {
    "pad": Recipe(padded, 1.5),
    "pad by value": Recipe(padded_by_value),
    "pad by mirror": Recipe(padded_by_mirror),
    "pad shifted": Recipe(around("shifted"), 0.9),
    "pad bordered": Recipe(around("bordered"), 0.9),
    "pad filled": Recipe(around("filled"), 0.9),
    "crop": Recipe(cropped, 1.5),
    "every other": Recipe(every_other),
    "average": Recipe(average, 1.2),
    "average oddly": Recipe(average_oddly, 0.9),
    "adaptive": Recipe(adaptive, 0.8),
    "max": Recipe(largest, 1.6, bent=True),
    "pixel shuffle": Recipe(positions_to_channels, 4, axes=(2,)),
    "interpolate": Recipe(stretched, 0.9),
    "less its mean": Recipe(mean, 0.8),
    "positions moved": Recipe(wrapped, 0.8),
}
