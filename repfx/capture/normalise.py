"""normalise: drops assertions from a graph, with the nodes that only they read.

    y = conv(x); n = y.ndim; ok = n == 4; _assert(ok)      ->      y = conv(x)

Then the users of a value are those that compute with it.
"""

from __future__ import annotations

import torch
from torch import fx

from repfx.graph.effects import is_dead
from repfx.graph.traits import Trait
from repfx.graph.vocabulary import kind_of


def normalise(graph: fx.Graph) -> None:
    """Erases assertions, all that only they read, and dropouts that are always off, in place."""
    for node in list(graph.nodes):
        if Trait.CHECKS in kind_of(node).traits and not node.users:
            graph.erase_node(node)
        elif node.target is torch.ops.aten.dropout.default and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        if is_dead(node):
            graph.erase_node(node)
