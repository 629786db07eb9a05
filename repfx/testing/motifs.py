"""Groups of operators that are common in papers and model zoos, so that merges are frequent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.testing.convolutions import conv, keeping, per_axis, plain_norm
from repfx.testing.plan import Draft, Recipe

SUMS: dict[str, Callable[..., Any]] = {
    "sum": lambda *v: sum(v),
    "v + w + ...": lambda *v: _added(v),
    "v += ...": lambda *v: _augmented(v),
    "v - w - ...": lambda *v: _subtracted(v),
    "torch.stack.sum": lambda *v: torch.stack(v).sum(0),
    "mean": lambda *v: sum(v) / len(v),
}


def _added(values: tuple[Tensor, ...]) -> Tensor:
    total = values[0]
    for v in values[1:]:
        total = total + v
    return total


def _augmented(values: tuple[Tensor, ...]) -> Tensor:
    total: Any = 0
    for v in values:
        total += v
    added: Tensor = total
    return added


def _subtracted(values: tuple[Tensor, ...]) -> Tensor:
    total = values[0]
    for v in values[1:]:
        total = total - v
    return total


def one(d: Draft) -> tuple[int, ...]:
    return (1,) * d.axes


def line(d: Draft, k: int, axis: int) -> tuple[int, ...]:
    """A kernel size of k along one axis and 1 along the others."""
    return tuple(k if i == axis else 1 for i in range(d.axes))


def norm_maybe(d: Draft, a: int, odds: float = 0.5) -> int:
    return plain_norm(d, a) if d.odds(odds) else a


def line_pair(d: Draft, a: int) -> int:
    """(1, k) then (k, 1), each padded: exact without a bias between them."""
    k, c = d.one(3, 3, 5), d.channels(a)
    axes = [d.axes - 1, 0] if d.odds(0.5) else [0, d.axes - 1]
    groups = d.one(1, c)
    for i, axis in enumerate(axes):
        kernel = line(d, k, axis)
        bias = d.odds(0.15 if i == 0 else 0.5)
        a = conv(
            d,
            a,
            out=c,
            groups=groups,
            kernel_size=kernel,
            padding=keeping(kernel, one(d)),
            bias=bias,
        )
    return norm_maybe(d, a)


def point_then_wide(d: Draft, a: int) -> int:
    """1x1 then kxk: exact if the second does not pad, or nothing between them adds a constant."""
    kernel = per_axis(d, 2, 3, 3, 5, equal=0.8)
    bias = d.odds(0.5)
    pad = d.one(0, 0, keeping(kernel, one(d))) if bias else d.one(0, keeping(kernel, one(d)))
    inner = conv(d, a, out=d.one(2, 4, 8), kernel_size=one(d), padding=0, bias=bias)
    inner = norm_maybe(d, inner, 0.3)
    return norm_maybe(
        d, conv(d, inner, kernel_size=kernel, padding=pad, groups=1, stride=d.one(1, 1, 2))
    )


def wide_then_point(d: Draft, a: int) -> int:
    """kxk with padding then 1x1: always exact."""
    kernel = per_axis(d, 3, 3, 5, 4)
    inner = conv(d, a, out=d.one(4, 8), kernel_size=kernel, stride=d.one(1, 1, 2))
    inner = norm_maybe(d, inner)
    return norm_maybe(d, conv(d, inner, out=d.one(2, 4), kernel_size=one(d), padding=0, groups=1))


def bottleneck(d: Draft, a: int) -> int:
    """A linear bottleneck or its inverse, with a residual."""
    c = d.channels(a)
    y = norm_maybe(d, conv(d, a, out=d.one(2, c, 2 * c), kernel_size=one(d), padding=0, groups=1))
    kernel = per_axis(d, 1, 3)
    inner = d.channels(y)
    y = norm_maybe(
        d,
        conv(
            d,
            y,
            out=inner,
            groups=d.one(1, inner),
            kernel_size=kernel,
            padding=keeping(kernel, one(d)),
        ),
    )
    y = norm_maybe(d, conv(d, y, out=c, kernel_size=one(d), padding=0, groups=1))
    return d.call("v + w", lambda v, w: v + w, a, y) if d.odds(0.7) else y


def depthwise_pointwise(d: Draft, a: int) -> int:
    c, kernel = d.channels(a), per_axis(d, 3, 3, 5)
    y = norm_maybe(d, conv(d, a, out=c, groups=c, kernel_size=kernel))
    if d.nonlinear and d.odds(0.3):
        y = d.call("F.relu", F.relu, y)
    y = norm_maybe(d, conv(d, y, out=d.one(2, c), kernel_size=one(d), padding=0, groups=1))
    return (
        norm_maybe(d, conv(d, y, out=d.channels(y), groups=d.channels(y), kernel_size=kernel))
        if d.odds(0.2)
        else y
    )


def branch(d: Draft, a: int, out: int, groups: int, stride: int) -> int:
    kernel = per_axis(d, 1, 3, 3, 5)
    dilation = per_axis(d, 1, 1, 1, 2)
    kernel = tuple(k if t == 1 else 3 for k, t in zip(kernel, dilation, strict=True))
    fixed = {
        "out": out,
        "groups": groups,
        "stride": stride,
        "kernel_size": kernel,
        "dilation": dilation,
    }
    y = norm_maybe(d, conv(d, a, padding=keeping(kernel, dilation), **fixed), 0.6)
    if d.odds(0.2):
        y = norm_maybe(d, conv(d, y, out=out, groups=groups, kernel_size=one(d), padding=0))
    return y


def branches(d: Draft, a: int) -> int:
    """A sum of parallel branches: convolutions, the identity, its norm; perhaps a norm after it."""
    c = d.channels(a)
    out, stride = d.one(c, c, c, 4), d.one(1, 1, 1, 2)
    groups = d.one(*(g for g in (1, 1, 2, c) if c % g == 0 and out % g == 0))
    ends = [branch(d, a, out, groups, stride) for _ in range(d.one(1, 2, 2, 3))]
    if stride == 1 and out == c:
        ends += d.one([], [a], [plain_norm(d, a)], [a, a])
    d.rng.shuffle(ends)
    text = d.one(*SUMS)
    y = d.call(text, SUMS[text], *ends)
    return norm_maybe(d, y, 0.3)


def residual(d: Draft, a: int) -> int:
    """x + scale * (M(x) - N(x)), as in token mixers."""
    c = d.channels(a)
    kernel = per_axis(d, 3, 3, 1)
    m = norm_maybe(
        d,
        conv(d, a, out=c, groups=d.one(1, c), kernel_size=kernel, padding=keeping(kernel, one(d))),
    )
    n = plain_norm(d, a)
    return d.call(
        "u + s * (v - w)", lambda u, v, w, s: u + s * (v - w), a, m, n, tensor=d.uniform(c, *one(d))
    )


def twice(d: Draft, a: int) -> int:
    """Reads a value in the middle of a chain twice; the second reader may be nonlinear."""
    y = norm_maybe(d, conv(d, a), 0.6)
    z = norm_maybe(d, conv(d, y, out=d.channels(y), kernel_size=one(d), padding=0), 0.6)
    bent = d.nonlinear and d.odds(0.5)
    function: Any = (lambda v, w: v + F.relu(w)) if bent else (lambda v, w: v - 0.5 * w)
    return d.call("v + relu(w)" if bent else "v - 0.5 * w", function, z, y)


def norm_chain(d: Draft, a: int) -> int:
    """A convolution with a norm, and perhaps a norm of that norm."""
    y = plain_norm(d, conv(d, a))
    return plain_norm(d, y) if d.odds(0.3) else y


RECIPES = {
    "line pair": Recipe(line_pair, 1.2),
    "point then wide": Recipe(point_then_wide, 1.2),
    "wide then point": Recipe(wide_then_point, 1.2),
    "bottleneck": Recipe(bottleneck),
    "depthwise pointwise": Recipe(depthwise_pointwise),
    "branches": Recipe(branches, 2),
    "residual": Recipe(residual),
    "twice": Recipe(twice, 1.2),
    "conv norm": Recipe(norm_chain, 2),
}
