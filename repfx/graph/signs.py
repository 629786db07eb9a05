"""Which values cannot be negative, by structure: unsigned number formats need to know."""

from __future__ import annotations

from torch import fx

from repfx.graph.ops import Sum
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView


def non_negative(view: GraphView, node: fx.Node) -> bool:
    """Whether every entry of this value is at least zero, as far as the operators tell."""
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        traits = view.traits(at)
        # Whoever reads the value may find what a later operator wrote there.
        needed = [w for w in view.writes.of.get(at, ()) if view.index[w] > view.index[at]]
        if Trait.NON_NEGATIVE not in traits:
            values = view.data_inputs(at)
            # A constant among its inputs may be negative; the channels that a sum takes are none.
            fixed = any(view.is_constant(n) for n in at.all_input_nodes)
            unsure = fixed and not isinstance(view.ops[at], Sum)
            if Trait.KEEPS_SIGN not in traits or not values or unsure:
                return False
            needed += values
        for value in needed:
            if value not in seen:
                seen.add(value)
                todo.append(value)
    return True
