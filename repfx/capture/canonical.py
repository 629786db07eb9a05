"""canonical: replaces several operators that together spell one operator by that operator.

    F.pad and writes of its border         ->   pad_with(x, sides, value)
    view, transpose, view of channels      ->   channel_shuffle(x, groups)

This happens after a graph has been run and checked. A spelling is recognised by what it computes,
not by how it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from repfx.capture.border import name_border_writes
from repfx.capture.origins import Origins
from repfx.graph.effects import is_dead
from repfx.graph.run_node import call
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of

OfSource = Callable[[fx.Node, fx.Node], bool]
_MOVES = ("transpose", "permute", "identity", "clone")  # what may come between two reshapes


def _reshapes(node: fx.Node) -> bool:
    kind = kind_of(node)
    return Trait.RESHAPES in kind.of_call(node.args, node.kwargs)


def canonical(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrites a graph whose nodes know their shapes, in place, and returns the module."""
    graph, changed = module.graph, False
    shapes = {n: n.meta["shape"] for n in graph.nodes if "shape" in n.meta}
    layers = dict(module.named_modules(remove_duplicate=False))
    origins = Origins(shapes, lambda n: layers.get(str(n.target)))

    def of_source(size: fx.Node, source: fx.Node) -> bool:
        """Whether a size that is read elsewhere is that of the source, too."""
        where, axis = size.args[:2] if len(size.args) > 1 else (None, None)
        if size.target != "size" or not isinstance(axis, int) or source not in shapes:
            return False
        axis %= len(shapes[source])
        return origins.of(source, axis) is where

    if any(Trait.STORES in kind_of(node).traits for node in graph.nodes):
        changed = name_border_writes(graph, GraphView(module))
    for node in list(graph.nodes):
        shape = node.meta.get("shape", ())
        if _reshapes(node) and not node._erased and len(shape) >= 3:
            changed |= _name_shuffle(graph, node, of_source)
    if changed:
        for node in reversed(graph.nodes):
            if is_dead(node):
                graph.erase_node(node)
        module.recompile()
    return module


def _name_shuffle(graph: fx.Graph, last: fx.Node, of_source: OfSource) -> bool:
    """Replaces moves that end in `last` by channel_shuffle, if they are one.

    The shuffle may be the last few of a longer chain of moves. Returns whether there was one."""
    moves, source = [last], last.args[0] if last.args else None
    while isinstance(source, fx.Node):
        groups = _groups_shuffled(moves, source, of_source) if len(moves) >= 3 else 0
        if groups:
            with graph.inserting_after(last):
                named = graph.call_function(F.channel_shuffle, (source, groups))
            named.meta = dict(last.meta)
            last.replace_all_uses_with(named)
            return True
        moved = _reshapes(source) or kind_of(source).name in _MOVES
        if not moved or not source.args or len(source.users) > 1:
            return False
        moves.append(source)
        source = source.args[0]
    return False


def _groups_shuffled(moves: list[fx.Node], source: fx.Node, of_source: OfSource) -> int:
    """The number of groups if the moves are a channel shuffle, else 0.

    Checked on the sizes of the source, and on larger ones if the moves accept them."""
    shape = source.meta.get("shape", ())
    if shape != moves[0].meta["shape"]:
        return 0

    def shuffles(groups: int, more: int) -> bool | None:
        n, channels, *space = shape
        x = torch.arange(
            (n + more) * channels * prod(s + more for s in space), dtype=torch.float32, device="cpu"
        )
        x = x.reshape(n + more, channels, *(s + more for s in space))
        try:
            y = _value(moves[0], source, x, {}, of_source)
        except (RuntimeError, TypeError, ValueError):
            return None  # the moves do not run on this size
        return (
            isinstance(y, Tensor)
            and y.shape == x.shape
            and torch.equal(y, F.channel_shuffle(x, groups))
        )

    for groups in range(2, shape[1]):
        if shape[1] % groups == 0 and shuffles(groups, 0):
            return groups if shuffles(groups, 1) is not False else 0
    return 0


def _value(
    node: fx.Node, source: fx.Node, x: Tensor, known: dict[fx.Node, Any], of_source: OfSource
) -> Any:
    """The value of a node if the source is x. Sizes are read from x too."""
    if node is source:
        return x
    if node not in known:
        if node.op not in ("call_function", "call_method"):
            raise ValueError(f"{node} does not follow from the source")
        if of_source(node, source):
            known[node] = x.shape[node.args[1]]  # type: ignore[index]
        else:
            known[node] = call(node, lambda v: _value(v, source, x, known, of_source))
    return known[node]
