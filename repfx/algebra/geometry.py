"""Geometry: the shape of an affine, shift-invariant map, and when two of them make one map.

Everything here is integers and flags. Whether a merge is exact, and what it costs, is decided
without looking at weights, so a bias of zeros is still a bias. What a map does along one spatial
axis is in `repfx.algebra.axis`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, prod
from typing import Any

from repfx.algebra.axis import Axis
from repfx.algebra.links import Links, Rows
from repfx.errors import Inexact


@dataclass(frozen=True)
class Geometry:
    """The shape of a map: its channels, groups, axes, bias, padding mode and channel axis.

    `mode`: "zeros", a mode of F.pad, or "own", if the padding is the constant that the padded value
    has for an input of zeros. `channel_axis`: 1 for images (N, C, ...), -1 for linear layers
    (..., C), whose axes, if given, are points. `turned`: the output has another channel axis than
    the source. `links`: which channels are read, if these are not plain groups; then `groups` are
    the smallest groups around them.

    >>> a = Geometry.conv(8, 8, taps=(1, 1), bias=True)
    >>> a.then(Geometry.conv(8, 4, taps=(3, 3), pad=(1, 1)))
    Traceback (most recent call last):
    ...
    repfx.errors.Inexact: a value with a bias is padded with zeros
    >>> Geometry.conv(8, 8, taps=(1, 1)).then(Geometry.conv(8, 4, taps=(3, 3), pad=(1, 1))).macs
    Fraction(288, 1)
    """

    inputs: int
    outputs: int
    groups: int
    axes: tuple[Axis, ...]
    bias: bool = False
    mode: str = "zeros"
    channel_axis: int = 1
    transposed: bool = False
    turned: bool = False
    links: Links | None = None

    @staticmethod
    def conv(
        inputs: int,
        outputs: int,
        taps: tuple[int, ...] = (),
        stride: tuple[int, ...] | None = None,
        pad: tuple[int, ...] | None = None,
        groups: int = 1,
        bias: bool = False,
    ) -> Geometry:
        """A convolution with symmetric zero padding `pad` per axis."""
        stride, pad = stride or (1,) * len(taps), pad or (0,) * len(taps)
        axes = tuple(Axis(t, s, p, p) for t, s, p in zip(taps, stride, pad, strict=True))
        return Geometry(inputs, outputs, groups, axes, bias)

    @staticmethod
    def identity(channels: int, axes: int, channel_axis: int = 1) -> Geometry:
        return Geometry(channels, channels, channels, (Axis(),) * axes, channel_axis=channel_axis)

    @property
    def depthwise(self) -> bool:
        """Whether each output of a 1-D or 2-D convolution reads one channel, its own."""
        return 1 < self.groups == self.inputs == self.outputs and len(self.axes) in (1, 2)

    @property
    def geometry(self) -> Geometry:
        """The Geometry itself, so that code written for a Kernel works on its Geometry too."""
        return self

    @property
    def taps(self) -> int:
        """The number of taps that may differ from zero."""
        return prod(len(a.places) for a in self.axes)

    @property
    def stride(self) -> int:
        return prod(a.stride for a in self.axes)

    @property
    def macs(self) -> Fraction:
        """Multiply-accumulates per position of the source."""
        return Fraction(self.weights, 1 if self.transposed else self.stride)

    @property
    def weights(self) -> int:
        return self.outputs * (self.inputs // self.groups) * self.taps

    @property
    def params(self) -> int:
        return self.weights + self.outputs * self.bias

    @property
    def channels(self) -> Links:
        """Which channels are read, also if these are plain groups."""
        return self.links or Links.regular(self.inputs, self.outputs, self.groups)

    @property
    def is_diagonal(self) -> bool:
        """Whether y = a*x + c per channel, as for a batch norm, a layer scale or the identity."""
        return self.inputs == self.outputs == self.groups and self.is_point

    @property
    def pads(self) -> bool:
        return not self.transposed and any(a.before > 0 or a.after > 0 for a in self.axes)

    @property
    def is_point(self) -> bool:
        return all(a.is_point for a in self.axes)

    @property
    def source_axis(self) -> int:
        """The channel axis of the source."""
        return -self.channel_axis if self.turned else self.channel_axis

    @property
    def turn(self) -> tuple[int, ...]:
        """The permutation from a layer's output, laid out as the source, to the `turned` layout."""
        n = len(self.axes)
        return (0, *range(2, n + 2), 1) if self.channel_axis == -1 else (0, n + 1, *range(1, n + 1))

    @property
    def why_no_layer(self) -> str:
        """Why no layer computes this map. Empty if one does."""
        if self.transposed and any(a.before - a.after >= max(a.stride, a.gap) for a in self.axes):
            return "an output padding as large as the stride"
        here = self.source_axis == 1 or self.is_point
        return "" if here else "a convolution of a value with channels last"

    @property
    def pad_steps(self) -> list[tuple[list[int], str]]:
        """The padding as calls of F.pad, (sides, mode). Wrapping and mirroring come before crops.

        >>> Geometry(1, 1, 1, (Axis(3, 2, -1, 1),), mode="circular").pad_steps
        [([0, 1], 'circular'), ([-1, 0], 'constant')]
        """
        sides = [side for a in reversed(self.axes) for side in (a.before, a.after)]
        if self.mode == "zeros":
            return [(sides, "constant")] if any(sides) else []
        steps = [([max(s, 0) for s in sides], self.mode), ([min(s, 0) for s in sides], "constant")]
        return [(s, mode) for s, mode in steps if any(s)]

    def then(self, outer: Geometry) -> Geometry:
        """The geometry of `outer(self(x))`.

        Raises Inexact unless that is the same map for every input size."""
        self._same_space(outer)
        if self.outputs != outer.inputs:
            raise Inexact(f"a map of {outer.inputs} channels after {self.outputs} channels")
        if outer.transposed or (self.transposed and not outer.is_point):
            self._scattered_by(outer)
        if outer.pads:
            self._paddable_by(outer)
        modes = [g.mode for g in (self, outer) if g.pads]
        if len(modes) == 2 and (modes[0] != "zeros" or modes[1] not in ("zeros", "own")):
            raise Inexact(
                f"two paddings in a row, {modes[0]!r} and {modes[1]!r}",
                "only zero paddings compose",
            )
        return replace(
            self,
            outputs=outer.outputs,
            **self._linked(outer.outputs, gcd(self.groups, outer.groups), outer, Links.then),
            axes=tuple(a.then(b) for a, b in zip(self.axes, outer.axes, strict=True)),
            bias=self.bias or outer.bias,
            mode=modes[-1] if modes and modes[-1] != "own" else "zeros",
            transposed=self.transposed or outer.transposed,
        )

    def scaled(self, factor: float) -> Geometry:
        return self

    def moved(self, rows: Rows) -> Geometry:
        """The geometry of y[o] = self(x)[rows[o]], and y[o] = 0 where a row is -1."""
        if rows == tuple(range(self.outputs)):
            return self
        if not rows:
            raise Inexact("none of its channels is used")
        links = self.channels.moved(rows)
        return replace(self, outputs=len(rows), **_canonical(links))

    def cropped(self, axes: tuple[Axis, ...]) -> Geometry:
        """The geometry of the output, read at the positions of `axes`. These have one tap each."""
        return self.then(replace(Geometry.identity(self.outputs, 0, self.channel_axis), axes=axes))

    def turned_to(self, channel_axis: int) -> Geometry:
        """The same map, with the channels of its output on another axis."""
        return (
            self
            if channel_axis == self.channel_axis
            else replace(self, channel_axis=channel_axis, turned=not self.turned)
        )

    def __add__(self, other: Geometry) -> Geometry:
        """The geometry of `self(x) + other(x)`.

        Raises Inexact if the two differ in channels, size, stride or padding mode."""
        self._same_space(other)
        if self.outputs != other.outputs or self.inputs != other.inputs:
            raise Inexact(f"the operands have {self.outputs} and {other.outputs} channels")
        if self.transposed != other.transposed or (self.transposed and self.axes != other.axes):
            raise Inexact("a transposed convolution is added to a map of another shape")
        for a, b in zip(self.axes, other.axes, strict=True):
            if a.stride != b.stride:
                raise Inexact(f"the operands have different strides, {a.stride} and {b.stride}")
            if a.surplus != b.surplus:
                raise Inexact("the operands have different sizes")
        modes = {g.mode for g in (self, other) if g.pads}
        if len(modes) > 1:
            raise Inexact(
                f"the branches pad in different ways: {', '.join(sorted(modes))}",
                "use one padding mode",
            )
        return replace(
            self,
            **self._linked(self.outputs, gcd(self.groups, other.groups), other, Links.plus),
            axes=tuple(a.plus(b) for a, b in zip(self.axes, other.axes, strict=True)),
            bias=self.bias or other.bias,
            mode=modes.pop() if modes else "zeros",
        )

    def _linked(
        self, outputs: int, groups: int, other: Geometry, join: Callable[[Links, Links], Links]
    ) -> dict[str, Any]:
        if self.links is None and other.links is None:
            return {"groups": groups, "links": None}
        return _canonical(join(self.channels, other.channels))

    def _scattered_by(self, outer: Geometry) -> None:
        """Raises Inexact unless a composition with a transposed map is exact.

        It composes with 1x1 maps only, and it spreads a bias in front of it unevenly."""
        if (self.transposed and not outer.is_point) or not self.is_point:
            raise Inexact(
                "a transposed convolution next to a map that is not 1x1",
                "only 1x1 maps merge with it",
            )
        if outer.transposed and self.bias:
            raise Inexact(
                "a value with a bias goes into a transposed convolution", "put the bias after it"
            )

    def _same_space(self, other: Geometry) -> None:
        if len(self.axes) != len(other.axes) or self.channel_axis != other.channel_axis:
            raise Inexact("maps over different axes (linear and convolution, or 1d and 2d)")

    def _paddable_by(self, outer: Geometry) -> None:
        """Raises Inexact unless a padding of y = K x gives what K gives beyond the ends of x.

        The padding holds zeros, so K must read only zeros there. On the left, the last tap of K at
        position -1 reads pixel -s + T - 1 - p, which is outside x iff p >= T - s. On the right, the
        first position beyond y reads, for the worst remainder of the division, from pixel
        H + q - T + 1 on, which is outside x iff q >= T - 1."""
        if outer.mode not in ("zeros", "own"):
            if not all(a.is_point for a in self.axes):
                raise Inexact(
                    f"a {outer.mode!r} padding after a map that is not 1x1",
                    "only zero paddings compose",
                )
            return
        if self.bias and outer.mode != "own":
            raise Inexact(
                "a value with a bias is padded with zeros",
                "drop the bias, remove the second padding, or pad with the bias as DBB does",
            )
        for a, b in zip(self.axes, outer.axes, strict=True):
            if (b.before > 0 and a.before < a.taps - a.stride) or (
                b.after > 0 and a.after < a.taps - 1
            ):
                raise Inexact(
                    f"a padding after a map of {a.taps} taps that is itself padded by "
                    f"{a.before} and {a.after}",
                    "pad once, before the first map",
                )


def _canonical(links: Links) -> dict[str, Any]:
    """The smallest groups around the links, and the links themselves if they are finer."""
    groups, inputs, outputs = links.groups, len(links.inputs), len(links.outputs)
    return {
        "groups": groups,
        "links": None if links == Links.regular(inputs, outputs, groups) else links,
    }
