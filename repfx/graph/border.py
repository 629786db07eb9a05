"""pad_with: a padding with one constant a channel, and the graphs that spell it by writing the border of a zero padding.

    y = F.pad(x, [p] * 4);  y[:, :, :p] = v;  y[:, :, -p:] = v;  ...        ->        y = pad_with(x, [p] * 4, v)

Which spellings mean it is not decided by their indices: they are run, on random values of several sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_PADS = {F.pad, torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default}


def pad_with(x: Tensor, sides: Sequence[int], value: Tensor) -> Tensor:
    """x (N, C, ...) with `sides` (as F.pad counts them) of `value` (1, C, 1, ...) around it.

    >>> pad_with(torch.zeros(1, 2, 1), [1, 0], torch.tensor([[[3.0], [4.0]]]))
    tensor([[[3., 0.],
             [4., 0.]]])
    """
    inside = F.pad(torch.ones_like(x[:1, :1], dtype=torch.bool), sides)
    return torch.where(inside, F.pad(x, sides), value)


def name_border_writes(graph: fx.Graph, shape_of: Any) -> None:
    """Replaces each zero padding whose border is then filled with one constant by `pad_with`, in place.

    `shape_of(node)` is the shape of a constant node, or None for what is none.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _PADS and node.args and isinstance(node.args[0], fx.Node):
            _name(graph, node, shape_of)


def _name(graph: fx.Graph, pad: fx.Node, shape_of: Any) -> None:
    writes = [u for u in pad.users if u.target is operator.setitem and u.args[0] is pad]
    values = {w.args[2] for w in writes}
    value = values.pop() if len(values) == 1 else None
    order = {node: i for i, node in enumerate(graph.nodes)} if writes else {}
    if not writes or not isinstance(value, fx.Node) or any(w.users for w in writes):
        return
    if any(order[u] < order[writes[-1]] for u in pad.users if u not in writes):
        return
    shape = shape_of(value)
    sides: Any = pad.args[1] if len(pad.args) > 1 else pad.kwargs.get("pad")
    if shape is None or len(shape) < 3 or not all(isinstance(s, int) and s >= 0 for s in sides):
        return
    if not _same(pad, writes, shape, sides):
        return
    with graph.inserting_after(writes[-1]):
        named = graph.call_function(pad_with, (pad.args[0], list(sides), value))
    named.meta = dict(pad.meta)
    for w in writes:
        graph.erase_node(w)
    pad.replace_all_uses_with(named, delete_user_cb=lambda user: user is not named)
    graph.erase_node(pad)


def _same(pad: fx.Node, writes: list[fx.Node], shape: Sequence[int], sides: Sequence[int]) -> bool:
    """Whether the padding and its writes give what pad_with gives, on several sizes."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(tuple(shape), generator=generator)
    if len(shape) < 3 or shape[0] != 1 or any(s != 1 for s in shape[2:]):
        return False
    target: Any = pad.target
    for size in (3, 6):
        x = torch.randn(2, shape[1], *(size + i for i in range(len(shape) - 2)), generator=generator)
        try:
            y = target(x, *pad.args[1:], **pad.kwargs)
            for w in writes:
                y[w.args[1]] = value
        except (RuntimeError, IndexError, TypeError):
            return False
        if not torch.equal(y, pad_with(x, sides, value)):
            return False
    return True
