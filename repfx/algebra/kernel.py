"""Kernel: an affine, shift-invariant map as (geometry, weight, bias), with `+` and `then`.

    (a + b)(x)     == a(x) + b(x)
    a.then(b)(x)   == b(a(x))

Both raise `Inexact` if no single map is equal for every input size. `Geometry` decides that, and
this file computes. Every operation is a differentiable torch expression of the weights, with
static shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repfx.algebra.axis import Axis
from repfx.algebra.geometry import Geometry
from repfx.algebra.links import Links, Rows

CONVS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}

Axes = tuple[Axis, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A map: its `geometry`, `weight` (out, width, *places), and `bias` (out,) or None.

    The weight has only the places of each axis, without the zeros of a dilation between them. Its
    columns are the inputs that an output reads, in order: those of its group, or with `links` those
    of its label, filled up with zeros. So neither a dilated nor a depthwise kernel grows on the way
    through other operators; `plain` is the kernel as a layer holds it."""

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
        if g.links is not None:
            return self.plain(x)
        if g.channel_axis == -1:
            return F.linear(x, dense(self).flatten(1), self.bias)
        if not g.axes:
            raise ValueError("a map without axes must be linear: its channel axis must be -1")
        strides, gaps = [a.stride for a in g.axes], [a.gap for a in g.axes]
        if g.transposed:
            before, extra = [a.before for a in g.axes], [a.before - a.after for a in g.axes]
            weight = swapped(self.weight, g.groups)
            return _TRANSPOSED[len(g.axes)](
                x, weight, self.bias, strides, before, extra, g.groups, gaps
            )
        for sides, mode in g.pad_steps:
            x = F.pad(x, sides, mode)
        if _is_depthwise(g):
            return self._tap_by_tap(x)
        return CONVS[len(g.axes)](x, self.weight, self.bias, strides, 0, gaps, g.groups)

    @property
    def plain(self) -> Kernel:
        """The same map without links, in the weight of a convolution with plain groups."""
        if self.geometry.links is None:
            return self
        geometry = replace(self.geometry, links=None)
        return Kernel(geometry, self._embedded(geometry), self.bias)

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
            tap: Any = (slice(None), 0, *(t // a.gap for t, a in zip(at, g.axes, strict=True)))
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
        bias = None if self.bias is None else _taken(self.bias, rows)
        # An output keeps its label, so its columns stay in their order.
        weight = _taken(self.weight, rows)
        return Kernel(geometry, weight[:, : geometry.channels.width], bias)

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
        weight = _compose(self, outer, geometry)
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
        """The weight with the channels and places of a geometry that has room for it."""
        mine = self.geometry
        if mine.links is None and geometry.links is None:
            weight = _regroup(self.weight, mine.groups, geometry.groups)
        else:
            weight = _relinked(self.weight, mine.channels, geometry.channels)
        at = [b.before - a.before for a, b in zip(mine.axes, geometry.axes, strict=True)]
        return _placed(weight, mine.axes, geometry.axes, at)


def _placed(weight: Tensor, mine: Axes, whole: Axes, at: Sequence[int]) -> Tensor:
    """The weight on the places of axes that have room for it, its first tap at tap `at`."""
    pads: list[int] = []
    for axis, (a, b, first) in enumerate(zip(mine, whole, at, strict=True), start=2):
        step = a.gap // b.gap
        if step > 1 and len(a.places) > 1:
            weight = weight.unsqueeze(axis + 1)
            weight = F.pad(weight, [0, 0] * (weight.dim() - axis - 2) + [0, step - 1])
            weight = weight.flatten(axis, axis + 1).narrow(axis, 0, (a.taps - 1) // b.gap + 1)
        left = first // b.gap
        pads = [left, len(b.places) - left - (a.taps - 1) // b.gap - 1, *pads]
    return F.pad(weight, pads) if any(pads) else weight


def _per_input(values: Tensor, g: Geometry) -> Tensor:
    """Values (in, *places) of a map's inputs in the shape of its weight: (out, width, *places).

    Without places they have 1s in their place."""
    taps = values.shape[1:] or (1,) * len(g.axes)
    if g.links is not None:
        found = _taken(values, _table(g.links.columns).flatten())
        return found.reshape(g.outputs, g.links.width, *taps)
    width = g.inputs // g.groups
    rows = values.reshape(g.groups, 1, width, *values.shape[1:])
    rows = rows.expand(g.groups, g.outputs // g.groups, width, *values.shape[1:])
    return rows.reshape(g.outputs, width, *taps)


def _over_inputs(weight: Tensor) -> Tensor:
    return weight.flatten(1).sum(1)


def dense(kernel: Kernel) -> Tensor:
    """The weight (out, in, *places) without groups, with zeros for channels of other groups."""
    return _regroup(kernel.plain.weight, kernel.geometry.groups, 1)


def swapped(weight: Tensor, groups: int) -> Tensor:
    """A weight (out, in / groups, *taps) as (in, out / groups, *taps), or back.

    Transposed convolutions of torch use the second form."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return blocks.transpose(1, 2).flatten(0, 1)


def _taken(rows: Tensor, index: Rows | Tensor) -> Tensor:
    """rows[index], with zeros where the index is -1."""
    if isinstance(index, tuple):
        if index == tuple(range(rows.shape[0])):
            return rows
        index = torch.tensor(index, device="cpu")
    found = rows[index.clamp(min=0).to(rows.device)]
    if int(index.min()) >= 0:
        return found
    there = (index >= 0).reshape(-1, *(1,) * (rows.dim() - 1)).to(rows.device)
    return torch.where(there, found, found.new_zeros(()))


def _table(rows: Sequence[Rows]) -> Tensor:
    """Rows of integers as a tensor. Most of them are the same tuple."""
    kinds = {id(row): row for row in rows}
    place = {key: i for i, key in enumerate(kinds)}
    which = torch.tensor([place[id(row)] for row in rows], device="cpu")
    return torch.tensor(list(kinds.values()), device="cpu")[which]


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


def _relinked(weight: Tensor, have: Links, want: Links) -> Tensor:
    """A weight with the columns of links `have`, as one with the columns of coarser links."""
    pairs = list(zip(have.columns, want.columns, strict=True))
    kinds = {(id(given), id(wanted)): (given, wanted) for given, wanted in pairs}
    same = all(given == wanted or max(given) < 0 for given, wanted in kinds.values())
    if same and have.width == want.width:  # an output that reads nothing has zeros already
        return weight
    found: dict[tuple[int, int], Rows] = {}
    for key, (given, wanted) in kinds.items():
        at = {channel: k for k, channel in enumerate(given)}
        found[key] = tuple(at.get(channel, -1) if channel >= 0 else -1 for channel in wanted)
    table = _table([found[id(given), id(wanted)] for given, wanted in pairs])
    start = torch.arange(len(pairs), device="cpu")[:, None] * have.width
    index = torch.where(table >= 0, table + start, table).flatten()
    rows = _taken(weight.flatten(0, 1), index)
    return rows.reshape(weight.shape[0], want.width, *weight.shape[2:])


def _compose(inner: Kernel, outer: Kernel, geometry: Geometry) -> Tensor:
    """The weight of `outer(inner(x))`: a sum over the channels in the middle and the taps of outer.

    Each tap shifts `inner` by its position times the stride."""
    a, b = inner.geometry, outer.geometry
    linked = a.links is not None or b.links is not None
    times = (_linked_product if linked else _grouped_product)(inner, outer)
    total: Tensor | None = None
    for at in product(*(range(len(x.places)) for x in b.axes)):
        tap: Any = (slice(None), slice(None), *at)
        shift = [x.stride * u * y.gap for x, y, u in zip(a.axes, b.axes, at, strict=True)]
        part = _placed(times(tap), a.axes, geometry.axes, shift)
        total = part if total is None else total + part
    assert total is not None
    return total


def _grouped_product(inner: Kernel, outer: Kernel) -> Callable[[Any], Tensor]:
    """For a tap of `outer`: its weight times that of `inner`, in gcd(both groups) groups.

    If one of the maps does not mix channels (depthwise, batch norm, identity), the sum over
    channels is a single product."""
    a, b = inner.geometry, outer.geometry
    groups, places = gcd(a.groups, b.groups), inner.weight.shape[2:]
    if _is_depthwise(a) or _is_depthwise(b):
        rows = inner.weight if _is_depthwise(b) else _per_input(inner.weight[:, 0], b)
        return lambda tap: rows * outer.weight[tap].reshape(*outer.weight.shape[:2], *_ones(places))
    rows = _regroup(inner.weight, a.groups, groups)
    rows = rows.reshape(groups, rows.shape[0] // groups, -1)
    columns = _regroup(outer.weight, b.groups, groups)

    def times(tap: Any) -> Tensor:
        part = columns[tap].reshape(groups, b.outputs // groups, -1) @ rows
        return part.reshape(b.outputs, a.inputs // groups, *places)

    return times


def _linked_product(inner: Kernel, outer: Kernel) -> Callable[[Any], Tensor]:
    """The same for links: one product for all labels that join as many channels.

    The result has the columns of the joined links."""
    first, last = inner.geometry.channels.joined(outer.geometry.channels)
    rows = _relinked(inner.weight, inner.geometry.channels, first)
    columns = _relinked(outer.weight, outer.geometry.channels, last)
    width, places = first.then(last).width, rows.shape[2:]
    alike: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
    for block in last.blocks:
        alike.setdefault((len(block[0]), len(block[1])), []).append(block)
    factors = []
    for (outs, middle), blocks in alike.items():
        left = _taken(columns, tuple(o for group, _ in blocks for o in group))[:, :middle]
        right = _taken(rows, tuple(m for _, group in blocks for m in group))[:, :width]
        factors.append(((len(blocks), outs, middle), left, right.reshape(len(blocks), middle, -1)))
    order = [o for blocks in alike.values() for group, _ in blocks for o in group]
    back = tuple(sorted(range(len(order)), key=order.__getitem__))

    def times(tap: Any) -> Tensor:
        parts = []
        for shape, left, right in factors:
            at = left[tap].reshape(shape)
            part = at * right if shape[2] == 1 else at @ right
            parts.append(part.reshape(shape[0] * shape[1], width, *places))
        return _taken(torch.cat(parts) if len(parts) > 1 else parts[0], back)

    return times


def _ones(shape: Sequence[int]) -> tuple[int, ...]:
    return (1,) * len(shape)


def _is_depthwise(g: Geometry) -> bool:
    return g.inputs == g.outputs == g.groups
