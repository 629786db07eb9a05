"""Op: what an operator of a graph means to the algebra. It is one of three things, whatever
spelling it came in:

    Map(x)      an affine, shift-invariant map of one value    convolution, batch norm, pad, ...
    Sum(x, ..)  a weighted sum of values, their channels moved   add, concat, slice, shuffle, ...
    Opaque      anything else, with the reason where it is one a person would want to know

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

Ref = (
    str | fx.Node
)  # a tensor that does not depend on the input: an attribute's path, or an expression of such
Fetch = Callable[[Ref], Tensor]


class Constants(Protocol):
    """What a rule may ask of the graph."""

    ops: dict[fx.Node, Op]  # of the nodes before

    def is_constant(self, value: Any) -> bool: ...
    def follows_mode(self, value: Any) -> bool: ...
    def tensor(self, ref: Ref) -> Tensor: ...
    def rank(self, node: fx.Node) -> int | None: ...
    def dtype(self, node: fx.Node) -> torch.dtype | None: ...


@dataclass(frozen=True)
class Map:
    """y = map(x). `geometry` takes that of x relative to the source; `kernel` fetches the weights
    of that geometry.

    `macs` is per output position, `stride` the positions of x per output position. `space` is
    (number of axes, channel axis) of x and `inputs` its channels, where known. `fill` is what the
    padding holds: a number or a constant. `own` is the geometry of a layer that is the same
    whatever it reads."""

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

    `arrange` moves the channels of the values, Geometries or Kernels alike. `pieces` is given by
    what returns several tensors (chunk, split): the channels of each, from the number of channels;
    the op itself is then the whole."""

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
    """Not a map of this algebra. `reason` is given where the operator looks as if it were one."""

    reason: str = ""
    cure: str = ""


Op: TypeAlias = Map | Sum | Opaque


def pointwise(g: Geometry, bias: bool = False) -> Geometry:
    """The geometry of a map with one number a channel, on the channels and axes of g's output."""
    return Geometry(
        g.outputs, g.outputs, g.outputs, (Axis(),) * len(g.axes), bias, channel_axis=g.channel_axis
    )
