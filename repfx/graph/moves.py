"""Where a value goes when it is only moved, and where it came from."""

from __future__ import annotations

from torch import fx

from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of


def moves(view: GraphView, node: fx.Node) -> bool:
    """Whether it gives values of its input in other places."""
    return Trait.MOVES in view.traits(node)


def joins(view: GraphView, node: fx.Node) -> bool:
    """Whether it is a concatenation, of channels or along another axis."""
    return Trait.JOINS in view.traits(node)


def moved_from(view: GraphView, value: fx.Node) -> fx.Node:
    """The value that this one was before it was moved, up to a concatenation."""
    while not joins(view, value):
        inputs = view.data_inputs(value)
        if len(inputs) != 1 or not moves(view, value):
            break
        (value,) = inputs
    return value


def joined(view: GraphView, value: fx.Node) -> fx.Node | None:
    """The concatenation whose values this one holds, if any."""
    value = moved_from(view, value)
    return value if joins(view, value) else None


def readers(view: GraphView, value: fx.Node) -> list[fx.Node]:
    """Who computes with a value, perhaps after it was moved."""
    found: list[fx.Node] = []
    for node in value.users:
        found += readers(view, node) if moves(view, node) else [node]
    return found


def passes_codes(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a layer reads the integers of a quantizer through this node, a max pool or a pad."""
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return bool(kind_of(node, called).traits & (Trait.MAXIMUM | Trait.PADS))
