"""Follows values through nodes that only move them, forwards and backwards."""

from __future__ import annotations

from torch import fx

from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of


def moves(view: GraphView, node: fx.Node) -> bool:
    """Whether the node only moves values of its input, or some of them, to other places."""
    return Trait.MOVES in view.traits(node)


def joins(view: GraphView, node: fx.Node) -> bool:
    """Whether the node is a concatenation along any axis; one of a single value is a move."""
    return view.traits(node) & (Trait.JOINS | Trait.MOVES) == Trait.JOINS


def moved_from(view: GraphView, value: fx.Node) -> fx.Node:
    """The value that this one was before it was moved. A concatenation ends the search."""
    while not joins(view, value):
        inputs = view.data_inputs(value)
        if len(inputs) != 1 or not moves(view, value):
            break
        (value,) = inputs
    return value


def joined(view: GraphView, value: fx.Node) -> fx.Node | None:
    """The concatenation whose values this one has, or None."""
    value = moved_from(view, value)
    return value if joins(view, value) else None


def readers(view: GraphView, value: fx.Node) -> list[fx.Node]:
    """The nodes that compute with a value, perhaps after it was moved."""
    found: list[fx.Node] = []
    for node in value.users:
        found += readers(view, node) if moves(view, node) else [node]
    return found


def passes_codes(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the integers of a quantizer pass through this node, as in a max pool or a pad."""
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return bool(kind_of(node, called).traits & (Trait.MAXIMUM | Trait.PADS))
