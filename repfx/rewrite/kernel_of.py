"""kernel_of: runs a block on kernels instead of images.

One interpreter with three rules. Run on a Geometry, it tells whether a region is one convolution
and what that costs; run on a Kernel, it computes the convolution:

    source -> identity,    Map -> value.then(map),    Sum -> sum of factor * arranged value

A padding may use the very constant that the padded value has at its border. Whether it does must
not depend on the current weights, so both are compared for several random draws of all parameters
and buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx

from repfx.algebra import Geometry, Kernel
from repfx.errors import Inexact
from repfx.graph.naming import described, operator
from repfx.graph.ops import Map, Sum
from repfx.graph.regions import Region, nodes_between
from repfx.graph.view import GraphView
from repfx.rewrite.weights import Drawn, Fetch
from repfx.tolerances import SAME_CONSTANT

# The sums whose values have the channels of the result.
_KEEPS = ("add", "chunk", "permute")
# The maps that reject an input of another dtype than their weights.
_TYPED = ("conv", "linear", "conv_transpose", "bn")
# The maps whose output channels differ from their input channels.
_CHANGES = ("conv", "linear", "conv_transpose")

Value = TypeVar("Value", Geometry, Kernel)


def geometries(
    view: GraphView, source: fx.Node, nodes: Sequence[fx.Node]
) -> dict[fx.Node, Geometry | Inexact]:
    """The geometry of each node as a map of `source`, or why it has none."""
    found: dict[fx.Node, Any] = {}
    try:
        dtype = source.meta.get("dtype")
        if dtype is not None and not dtype.is_floating_point:
            raise Inexact(
                f"its input is {str(dtype).removeprefix('torch.')}, which a convolution "
                "does not accept"
            )
        if source.meta.get("guessed") and not any(
            getattr(view.ops[n], "kind", "") in _TYPED for n in source.users
        ):
            raise Inexact("the dtype of the model's input is not known", "pass an example")
        start = source_geometry(view, source, nodes)
    except Inexact as why:
        return dict.fromkeys(nodes, why)
    for node in nodes:
        try:
            found[node] = _step(
                view, node, source, start, found, lambda op, before: op.geometry(before)
            )
        except Inexact as why:
            found[node] = why
    return found


def kernel_of(
    view: GraphView,
    region: Region,
    fetch: Fetch,
    start: Geometry | None = None,
    meaning: Callable[[Map, Kernel], Kernel] | None = None,
) -> Kernel:
    """The one convolution that `region` equals, with the weights that `fetch` returns.

    `start`: the identity on the region's source, if known. `meaning`: replaces the rule for the
    kernel of a Map after a value. Raises Inexact if the region is not one convolution."""
    start = start or source_geometry(view, region.source, region.nodes)
    identity = Kernel.identity(start, torch.empty(0, dtype=torch.float64, device="cpu"))
    meaning = meaning or (lambda op, before: op.kernel(fetch, op.geometry(before.geometry)))
    found: dict[fx.Node, Any] = {region.source: identity}
    readers = {n: sum(n in view.ops[m].values for m in region.nodes) for n in region.nodes}  # type: ignore[union-attr]
    for node in region.nodes:
        found[node] = _step(view, node, region.source, identity, found, meaning)
        for value in set(view.ops[node].values):  # type: ignore[union-attr]
            if value in readers:
                readers[value] -= 1
                if not readers[value]:
                    found.pop(value, None)  # nothing reads it any more: free its memory
    whole: Kernel = found[region.sink]
    return whole


def source_geometry(view: GraphView, source: fx.Node, nodes: Sequence[fx.Node]) -> Geometry:
    """The identity on the source's channels and axes.

    These are read from the operators that take the source, or from a run of the model."""
    axes: int | None = None
    channel_axis: int | None = None
    channels: int | None = None
    # 1 if the axes are in the order of the source, -1 if the channel axis has moved.
    order = {source: 1}
    same = {source}  # values with the source's channels
    for node in nodes:
        op: Any = view.ops[node]
        for value in op.values:
            if value not in order:
                continue
            n, at = op.space
            axes = n if axes is None else axes
            channel_axis = (
                at * order[value] if at is not None and channel_axis is None else channel_axis
            )
            order[node] = -order[value] if op.kind == "permute" else order[value]
            if value in same:
                channels = op.inputs if channels is None and isinstance(op, Map) else channels
                if op.kind in _KEEPS or (isinstance(op, Map) and op.kind not in _CHANGES):
                    same.add(node)
    if axes is None and channel_axis == -1:
        axes = 0
    if channel_axis is not None:
        seen = view.channels(source, channel_axis)
        # An operand may have more channels than the source, which it then broadcasts.
        channels = channels if seen is None else seen
    rank = view.rank(source)
    if channel_axis == 1 and axes is not None and rank not in (None, axes + 2):
        raise Inexact("its input has no batch dimension")
    if axes is None or channel_axis is None or channels is None:
        raise Inexact("the number of channels or axes of its source is unknown", "pass an example")
    return Geometry.identity(channels, axes, channel_axis)


def _step(
    view: GraphView,
    node: fx.Node,
    source: fx.Node,
    start: Value,
    found: dict[fx.Node, Any],
    meaning: Callable[[Map, Value], Value],
) -> Value:
    op = view.ops[node]

    def value(of: fx.Node) -> Value:
        v = start if of is source else found[of]
        if isinstance(v, Inexact):
            raise v
        return v

    if isinstance(op, Sum):
        values = [value(term) for term, _ in op.terms]
        if op.arrange is not None:
            values = op.arrange(values)
        scaled = [v.scaled(factor) for v, (_, factor) in zip(values, op.terms, strict=True)]
        total = scaled[0]
        for term in scaled[1:]:
            total = total + term
        return total
    assert isinstance(op, Map)
    before = value(op.x)
    outer = _padded(view, source, node, start.geometry, before.geometry, meaning(op, before))
    if op.x is source:  # no need to compose: id.then(map) == map
        checked = start.geometry.then(outer.geometry)
        return checked if isinstance(outer, Geometry) else Kernel(checked, outer.weight, outer.bias)
    return before.then(outer)


def _padded(
    view: GraphView, source: fx.Node, node: fx.Node, start: Geometry, before: Geometry, outer: Value
) -> Value:
    """The map, with padding mode "own" if it pads with the very constant of the padded value."""
    g, op = outer.geometry, view.ops[node]
    assert isinstance(op, Map)
    if not g.pads or g.mode != "zeros" or (not before.bias and op.fill == 0):
        return outer
    if not _holds_own(view, source, node, start):
        if not before.bias:
            raise Inexact(
                "it pads with a value other than the constant of its input", "pad with zeros"
            )
        pads = "zeros" if op.fill == 0 else "something else"
        cure = "remove the bias, remove this padding, or pad with the value that the bias gives"
        raise Inexact(
            f"{_biased(view, source, op.x)} has a bias and {described(view, node)} pads "
            f"with {pads}",
            cure,
        )
    own = replace(g, mode="own")
    return own if isinstance(outer, Geometry) else Kernel(own, outer.weight, outer.bias)


def _biased(view: GraphView, source: fx.Node, node: fx.Node) -> str:
    """The nearest operator before a value that gives the value its constant."""
    while isinstance(view.ops[node], Map):
        op: Any = view.ops[node]
        if op.x is source or op.kind in ("bn", "shift") or (op.own is not None and op.own.bias):
            break
        node = op.x
    return f"{operator(view.ops[node])} {view.name(node)!r}"


def _holds_own(view: GraphView, source: fx.Node, node: fx.Node, start: Geometry) -> bool:
    """Whether a padding equals the constant part of the padded value for all parameters.

    Both are analytic in the parameters: if they are equal on random draws, they are equal
    everywhere.
    """
    if (source, node) not in view.own_padding:
        op = view.ops[node]
        assert isinstance(op, Map)
        inner = nodes_between(view, source, op.x)
        # Only a shift can cancel a constant, so the usual convolution after a biased one needs
        # no draws.
        shifts = any(view.ops[n].kind == "shift" for n in inner or ())  # type: ignore[union-attr]
        worth = inner is not None and (shifts or op.fill != 0)
        view.own_padding[source, node] = worth and _equal(
            view, Region(source, op.x, inner or (), frozenset()), op, start
        )
    return view.own_padding[source, node]


def _equal(view: GraphView, padded: Region, op: Map, start: Geometry) -> bool:
    for seed in range(3):
        fetch = Drawn(view, seed)
        bias = kernel_of(view, padded, fetch, start).bias
        fill = (
            torch.tensor(op.fill, dtype=torch.float64, device="cpu")
            if isinstance(op.fill, float)
            else fetch(op.fill).reshape(-1)
        )
        if bias is None:
            bias = torch.zeros_like(fill)
        if fill.numel() not in (1, bias.numel()) or not torch.allclose(
            bias, fill.expand_as(bias), rtol=SAME_CONSTANT, atol=1e-12
        ):
            return False
    return True
