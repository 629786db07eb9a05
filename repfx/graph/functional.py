"""Calls of a convolution or linear layer whose weight and bias are values of the graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from repfx.algebra import CONVS, Geometry
from repfx.graph.ops import Ref


def value_of(ref: Ref | None, before: fx.Node) -> fx.Node | None:
    """A constant as a node. For a path, a node that reads it is inserted in front of `before`."""
    if not isinstance(ref, str):
        return ref
    with before.graph.inserting_before(before):
        return before.graph.get_attr(ref)


def call_layer(
    graph: fx.Graph, g: Geometry, x: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    """Calls the layer of this geometry and returns the node of its output.

    Padding that a convolution does not offer becomes a call of F.pad. The output is permuted if the
    geometry moves the channels to another axis."""
    if g.source_axis == -1:
        y = graph.call_function(F.linear, (x, weight, bias))
    else:
        even = all(a.before == a.after >= 0 for a in g.axes) and g.mode == "zeros"
        for step in [] if even else g.pad_steps:
            x = graph.call_function(F.pad, (x, *step))
        pads = tuple(a.before if even else 0 for a in g.axes)
        strides, gaps = tuple(a.stride for a in g.axes), tuple(a.gap for a in g.axes)
        args = (x, weight, bias, strides, pads, gaps, g.groups)
        y = graph.call_function(CONVS[len(g.axes)], args)
    return graph.call_function(torch.permute, (y, list(g.turn))) if g.turned else y
