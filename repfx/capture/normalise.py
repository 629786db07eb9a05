"""normalise: drop from a graph what only reads metadata to assert on it, so that values have their
true readers.

y = conv(x); n = y.ndim; ok = n == 4; _assert(ok)      ->      y = conv(x)
"""

from __future__ import annotations

import torch
from torch import fx

from repfx.graph.effects import is_dead
from repfx.graph.traits import Trait
from repfx.graph.vocabulary import kind_of


def normalise(graph: fx.Graph) -> None:
    """Erases assertions and everything that only they read, and dropouts that are off for good, in
    place.
    """
    for node in list(graph.nodes):
        if Trait.CHECKS in kind_of(node).traits and not node.users:
            graph.erase_node(node)
        elif node.target is torch.ops.aten.dropout.default and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        if is_dead(node):
            graph.erase_node(node)
