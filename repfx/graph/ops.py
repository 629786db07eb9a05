"""Op: what an operator of a graph means to the algebra, however it is spelled.

    Map(x)      an affine, shift-invariant map of one value      convolution, batch norm, pad, ...
    Sum(x, ..)  a weighted sum of values with moved channels     add, concat, slice, shuffle, ...
    Opaque      anything else, with a reason if the user may want to know it

`repfx.graph.vocabulary` says which operator is which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, fx

from repfx.algebra import Axis, Geometry, Kernel

# A tensor that does not depend on the input: the path of an attribute, or an expression of such.
Ref = str | fx.Node
Fetch = Callable[[Ref], Tensor]


class Constants(Protocol):
    """What a rule may ask of the graph."""

    ops: dict[fx.Node, Op]  # of the nodes so far

    def is_constant(self, value: Any) -> bool: ...
    def follows_mode(self, value: Any) -> bool: ...
    def tensor(self, ref: Ref) -> Tensor: ...
    def rank(self, node: fx.Node) -> int | None: ...
    def dtype(self, node: fx.Node) -> torch.dtype | None: ...


@dataclass(frozen=True)
class Map:
    """y = map(x).

    `geometry` takes the geometry of x, relative to the source, and returns that of this map.
    `kernel` fetches the weights for that geometry. `macs` is counted per output position, and
    `stride` is the number of positions of x per output position. `space` is (number of axes,
    channel axis) of x, and `inputs` the number of its channels, as far as known. `fill` is the
    value of the padding: a number or a constant. `own` is the geometry of a layer, which is the
    same for every input."""

    x: fx.Node
    kind: str
    geometry: Callable[[Geometry], Geometry]
    kernel: Callable[[Fetch, Geometry], Kernel]
    macs: int | Fraction = 0
    params: int = 0
    stride: int | Fraction = 1
    space: tuple[int | None, int | None] = (None, None)
    inputs: int | None = None
    fill: float | Ref = 0.0
    own: Geometry | None = None

    @property
    def values(self) -> tuple[fx.Node, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Sum:
    """y = sum of factor * arranged value over `terms`.

    `arrange` moves the channels of the values; it works on Geometries and on Kernels. Operators
    that return several tensors (chunk, split) have `pieces`, which maps the number of channels to
    the channels of each piece. The Op itself then stands for the whole."""

    terms: tuple[tuple[fx.Node, float], ...]
    kind: str = "add"
    arrange: Callable[[list[Any]], list[Any]] | None = None
    pieces: Callable[[int], list[range]] | None = None
    macs: int = 0
    params: int = 0
    stride: int = 1
    space: tuple[int | None, int | None] = (None, None)

    @property
    def values(self) -> tuple[fx.Node, ...]:
        return tuple(node for node, _ in self.terms)


@dataclass(frozen=True)
class Opaque:
    """Not a map of this algebra. It has a `reason` if the operator looks like one.

    `cure` is a hint: what would make it one."""

    reason: str = ""
    cure: str = ""


Op: TypeAlias = Map | Sum | Opaque


def pointwise(g: Geometry, bias: bool = False) -> Geometry:
    """The geometry of a map with one factor per channel, on the channels and axes of g's output."""
    return Geometry(
        g.outputs, g.outputs, g.outputs, (Axis(),) * len(g.axes), bias, channel_axis=g.channel_axis
    )
