"""Which values cannot be negative, by the structure of the graph. These can use unsigned codes."""

from __future__ import annotations

from torch import fx

from repfx.graph.ops import Sum
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView


def non_negative(view: GraphView, node: fx.Node) -> bool:
    """Whether no entry of this value can be negative, as far as the operators tell."""
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        traits = view.traits(at)
        # A reader of the value may see what a later operator wrote into it.
        last = max((view.index[user] for user in at.users), default=0)
        needed = [w for w in view.writes.of.get(at, ()) if view.index[at] < view.index[w] < last]
        if Trait.NON_NEGATIVE not in traits:
            values = view.data_inputs(at)
            # A constant input may be negative. The constants of a Sum only say which channels.
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
