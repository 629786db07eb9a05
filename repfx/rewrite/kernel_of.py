"""kernel_of: the block run on kernels instead of images.

One interpreter, three rules, two meanings. Run on a Geometry it tells whether a region is one convolution and what that
costs; run on a Kernel it yields the convolution:

    source -> identity,    Map -> value.then(map),    Sum -> sum of factor * value
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from repfx.algebra import Geometry, Kernel
from repfx.errors import Inexact
from repfx.graph.ops import Map, Ref, Sum
from repfx.graph.regions import Region
from repfx.graph.view import GraphView

Value = TypeVar("Value", Geometry, Kernel)


def geometries(view: GraphView, source: fx.Node, nodes: Sequence[fx.Node]) -> dict[fx.Node, Geometry | Inexact]:
    """The geometry of each node as a map of `source`, or why it has none."""
    found: dict[fx.Node, Geometry | Inexact] = {}
    try:
        dtype = source.meta.get("dtype")
        if dtype is not None and not dtype.is_floating_point:
            raise Inexact(f"its input is {str(dtype).removeprefix('torch.')}, which a convolution does not take")
        start = source_geometry(view, source, nodes)
    except Inexact as why:
        return dict.fromkeys(nodes, why)
    for node in nodes:
        try:
            found[node] = _step(view, node, source, start, found, lambda op, g: op.geometry(g))
        except Inexact as why:
            found[node] = why
    return found


def kernel_of(view: GraphView, region: Region, fetch: Callable[[Ref], Tensor]) -> Kernel:
    """The one convolution that `region` equals, from the weights that `fetch` gives.

    Raises Inexact where the region is not a single convolution.
    """
    start = source_geometry(view, region.source, region.nodes)
    like = torch.empty(0, dtype=torch.float64)
    identity = Kernel.identity(start, like)
    found: dict[fx.Node, Any] = {}
    readers = {n: sum(n in view.ops[m].values for m in region.nodes) for n in region.nodes}  # type: ignore[union-attr]
    for node in region.nodes:
        found[node] = _step(view, node, region.source, identity, found, lambda op, g: op.kernel(fetch, op.geometry(g)))
        for value in set(view.ops[node].values):  # type: ignore[union-attr]
            if value in readers:
                readers[value] -= 1
                if not readers[value]:
                    found.pop(value, None)  # its weights are in the next value: free them
    return found[region.sink]


def source_geometry(view: GraphView, source: fx.Node, nodes: Sequence[fx.Node]) -> Geometry:
    """The identity on the source's channels and axes, read from the operators that take it."""
    space: tuple[int, int] | None = None
    channels: int | None = None
    same = {source}
    for node in nodes:
        op = view.ops[node]
        if isinstance(op, Map):
            space = space or op.space
            if op.x in same and channels is None:
                channels = op.inputs
            if op.x in same and op.kind not in ("conv", "linear"):
                same.add(node)
        elif isinstance(op, Sum) and any(v in same for v in op.values):
            same.add(node)
    if space is None or channels is None:
        raise Inexact("the number of channels or axes of its source is unknown")
    return Geometry.identity(channels, *space)


def _step(
    view: GraphView,
    node: fx.Node,
    source: fx.Node,
    start: Value,
    found: dict[fx.Node, Any],
    meaning: Callable[[Map, Geometry], Value],
) -> Value:
    op = view.ops[node]

    def value(of: fx.Node) -> Value:
        v = start if of is source else found[of]
        if isinstance(v, Inexact):
            raise v
        return v

    if isinstance(op, Sum):
        (first, factor), *rest = op.terms
        total = value(first).scaled(factor)
        for term, factor in rest:
            total = total + value(term).scaled(factor)
        return total
    assert isinstance(op, Map)
    before = value(op.x)
    outer = meaning(op, before if isinstance(before, Geometry) else before.geometry)
    if op.x is source:  # nothing to compose with: id.then(map) == map
        checked = (start if isinstance(start, Geometry) else start.geometry).then(
            outer if isinstance(outer, Geometry) else outer.geometry
        )
        return checked if isinstance(outer, Geometry) else outer
    return before.then(outer)
