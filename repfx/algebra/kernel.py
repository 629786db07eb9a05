"""Kernel: an affine, shift-invariant map as (geometry, weight, bias), with `+` and `then`.

    (a + b)(x)     == a(x) + b(x)
    a.then(b)(x)   == b(a(x))

Both raise `Inexact` if no single map is equal for every input size. `Geometry` decides that, and
this file computes. Every operation is a differentiable torch expression of the weights, with
static shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.algebra.axis import Axis
from repfx.algebra.geometry import Geometry
from repfx.algebra.links import Rows

CONVS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A map: its `geometry`, `weight` (out, in / groups, *taps), and `bias` (out,) or None."""

    geometry: Geometry
    weight: Tensor
    bias: Tensor | None = None

    @staticmethod
    def identity(geometry: Geometry, like: Tensor) -> Kernel:
        """The map y = x with a diagonal `geometry`, in the dtype and on the device of `like`."""
        shape = (geometry.outputs, 1) + (1,) * len(geometry.axes)
        return Kernel(geometry, torch.ones(shape, dtype=like.dtype, device=like.device))

    @staticmethod
    def diagonal(geometry: Geometry, scale: Tensor, shift: Tensor | None) -> Kernel:
        """The map y = scale * x + shift per channel. Scale and shift are (channels,)."""
        return Kernel(geometry, scale.reshape((-1, 1) + (1,) * len(geometry.axes)), shift)

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the map on x (N, in, ...), or (..., in) for a linear layer."""
        g = self.geometry
        if g.turned:
            return Kernel(g.turned_to(g.source_axis), self.weight, self.bias)(x).permute(g.turn)
        if g.channel_axis == -1:
            return F.linear(x, dense(self).flatten(1), self.bias)
        if not g.axes:
            raise ValueError("a map without axes must be linear: its channel axis must be -1")
        strides, gaps = [a.stride for a in g.axes], [a.gap for a in g.axes]
        if g.transposed:
            before, extra = [a.before for a in g.axes], [a.before - a.after for a in g.axes]
            weight = swapped(self.packed, g.groups)
            return _TRANSPOSED[len(g.axes)](
                x, weight, self.bias, strides, before, extra, g.groups, gaps
            )
        for sides, mode in g.pad_steps:
            x = F.pad(x, sides, mode)
        if _is_depthwise(g):
            return self._tap_by_tap(x)
        return CONVS[len(g.axes)](x, self.packed, self.bias, strides, 0, gaps, g.groups)

    @property
    def packed(self) -> Tensor:
        """The weight without the zeros between its taps, as in layers with a dilation."""
        if all(a.gap == 1 for a in self.geometry.axes):
            return self.weight
        return self.weight[
            (slice(None), slice(None), *(slice(None, None, a.gap) for a in self.geometry.axes))
        ]

    def _tap_by_tap(self, x: Tensor) -> Tensor:
        """Runs a depthwise map as a sum over its taps.

        In float64 torch would run one convolution per channel, which is many times slower."""
        g = self.geometry
        y: Tensor | None = None
        for at in product(*(a.places for a in g.axes)):
            part = x
            for axis, (t, a) in enumerate(zip(at, g.axes, strict=True), start=2):
                last = (x.shape[axis] - a.taps) // a.stride * a.stride + t + 1
                part = part[(slice(None),) * axis + (slice(t, last, a.stride),)]
            tap: Any = (slice(None), 0, *at)
            term = part * self.weight[tap].reshape((-1,) + (1,) * len(g.axes))
            y = term if y is None else y + term
        assert y is not None
        return y if self.bias is None else y + self.bias.reshape((-1,) + (1,) * len(g.axes))

    def __add__(self, other: Kernel) -> Kernel:
        """The map x -> self(x) + other(x).

        Raises Inexact if channels, sizes, strides or padding modes differ."""
        geometry = self.geometry + other.geometry
        a, b = self._embedded(geometry), other._embedded(geometry)
        if self.bias is None or other.bias is None:
            bias = self.bias if other.bias is None else other.bias
        else:
            bias = self.bias + other.bias
        return Kernel(geometry, a + b, bias)

    def scaled(self, factor: float) -> Kernel:
        if factor == 1:
            return self
        return Kernel(
            self.geometry, self.weight * factor, None if self.bias is None else self.bias * factor
        )

    def moved(self, rows: Rows) -> Kernel:
        """The map y[o] = self(x)[rows[o]], and y[o] = 0 where a row is -1."""
        geometry = self.geometry.moved(rows)
        if geometry is self.geometry:
            return self
        weight = _taken(dense(self), rows)
        return Kernel(
            geometry,
            _regroup(weight, 1, geometry.groups),
            None if self.bias is None else _taken(self.bias, rows),
        )

    def cropped(self, axes: tuple[Axis, ...]) -> Kernel:
        g = Geometry.identity(self.geometry.outputs, len(axes), self.geometry.channel_axis)
        return self.then(Kernel.identity(replace(g, axes=axes), self.weight))

    def turned_to(self, channel_axis: int) -> Kernel:
        return Kernel(self.geometry.turned_to(channel_axis), self.weight, self.bias)

    def then(self, outer: Kernel) -> Kernel:
        """The map x -> outer(self(x)):

        K'[o, i, t + s*u] = sum_{m, u} W[o, m, u] K[m, i, t],    b' = b_W + (sum_u W) b.

        Raises Inexact if that would be wrong, as with a padding between the two.
        """
        geometry = self.geometry.then(outer.geometry)
        weight = _regroup(
            _compose(self, outer, geometry),
            gcd(self.geometry.groups, outer.geometry.groups),
            geometry.groups,
        )
        shift = (
            None
            if self.bias is None
            else _over_inputs(outer.weight * _per_input(self.bias, outer.geometry))
        )
        if shift is None or outer.bias is None:
            bias = outer.bias if shift is None else shift
        else:
            bias = shift + outer.bias
        return Kernel(geometry, weight, bias)

    def _embedded(self, geometry: Geometry) -> Tensor:
        """The weight with the groups and taps of a geometry that has room for it."""
        weight = _regroup(self.weight, self.geometry.groups, geometry.groups)
        pads: list[int] = []
        for mine, whole in zip(reversed(self.geometry.axes), reversed(geometry.axes), strict=True):
            left = whole.before - mine.before
            pads += [left, whole.taps - mine.taps - left]
        return F.pad(weight, pads) if any(pads) else weight


def _per_input(values: Tensor, g: Geometry) -> Tensor:
    """Values (in, *taps) of a map's inputs in the shape of its weight: (out, in / groups, *taps).

    Without taps they have 1s in their place."""
    width = g.inputs // g.groups
    rows = values.reshape(g.groups, 1, width, *values.shape[1:])
    rows = rows.expand(g.groups, g.outputs // g.groups, width, *values.shape[1:])
    taps = values.shape[1:] or (1,) * len(g.axes)
    return rows.reshape(g.outputs, width, *taps)


def _over_inputs(weight: Tensor) -> Tensor:
    return weight.flatten(1).sum(1)


def dense(kernel: Kernel) -> Tensor:
    """The weight (out, in, *taps) without groups, with zeros for channels of other groups."""
    return _regroup(kernel.weight, kernel.geometry.groups, 1)


def swapped(weight: Tensor, groups: int) -> Tensor:
    """A weight (out, in / groups, *taps) as (in, out / groups, *taps), or back.

    Transposed convolutions of torch use the second form."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return blocks.transpose(1, 2).flatten(0, 1)


def _taken(rows: Tensor, index: Rows) -> Tensor:
    """rows[index], with zeros where the index is -1."""
    found = rows[[max(i, 0) for i in index]]
    if min(index) >= 0:
        return found
    there = torch.tensor([i >= 0 for i in index], device=rows.device)
    return torch.where(there.reshape(-1, *(1,) * (rows.dim() - 1)), found, found.new_zeros(()))


def _regroup(weight: Tensor, groups: int, wanted: int) -> Tensor:
    """A weight (out, in / groups, *taps) as (out, in / wanted, *taps).

    Blocks of zeros are added or dropped."""
    if groups == wanted:
        return weight
    taps, inner = weight.shape[2:], weight.shape[1]
    if wanted % groups == 0:  # more groups: the blocks off the diagonal are known to be zero
        blocks = wanted // groups
        spread = weight.reshape(
            (groups, blocks, weight.shape[0] // wanted, blocks, inner // blocks, *taps)
        )
        at = list(range(blocks))
        return (
            spread[:, at, :, at].transpose(0, 1).reshape((weight.shape[0], inner // blocks, *taps))
        )
    if groups % wanted:
        return _regroup(_regroup(weight, groups, 1), 1, wanted)
    blocks, out = groups // wanted, weight.shape[0] // groups
    eye = torch.eye(blocks, dtype=weight.dtype, device=weight.device).reshape(
        (1, blocks, 1, blocks, 1) + (1,) * len(taps)
    )
    spread = weight.reshape((wanted, blocks, out, 1, inner, *taps)) * eye
    return spread.reshape((wanted * blocks * out, blocks * inner, *taps))


def _compose(inner: Kernel, outer: Kernel, geometry: Geometry) -> Tensor:
    """The weight of `outer(inner(x))`, in gcd(inner groups, outer groups) groups.

    It is a sum over the channels in the middle and the taps of `outer`. Each tap shifts `inner` by
    its position times the stride. If one of the maps does not mix channels (depthwise, batch norm,
    identity), the sum over channels is a single product."""
    a, b = inner.geometry, outer.geometry
    groups = gcd(a.groups, b.groups)
    if _is_depthwise(b):
        rows, columns = inner.weight, outer.weight
    elif _is_depthwise(a):
        rows, columns = _per_input(inner.weight[:, 0], b), outer.weight
    else:
        rows = _regroup(inner.weight, a.groups, groups)
        rows = rows.reshape(groups, rows.shape[0] // groups, -1)
        columns = _regroup(outer.weight, b.groups, groups)
    whole, strides = [x.taps for x in geometry.axes], [x.stride for x in a.axes]
    total: Tensor | None = None
    for at in product(*(x.places for x in b.axes)):
        tap: Any = (slice(None), slice(None), *at)
        column = columns[tap]
        if _is_depthwise(b) or _is_depthwise(a):
            part = rows * column.reshape(*column.shape, *(1,) * len(whole))
        else:
            part = column.reshape(groups, b.outputs // groups, -1) @ rows
            part = part.reshape(b.outputs, a.inputs // groups, *(x.taps for x in a.axes))
        pads: list[int] = []
        for size, x, s, u in reversed(list(zip(whole, a.axes, strides, at, strict=True))):
            pads += [s * u, size - x.taps - s * u]
        part = F.pad(part, pads) if any(pads) else part
        total = part if total is None else total + part
    assert total is not None
    return total


def _is_depthwise(g: Geometry) -> bool:
    return g.inputs == g.outputs == g.groups
