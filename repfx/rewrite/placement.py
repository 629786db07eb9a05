"""Where a runtime wants integers besides the inputs of layers, so that no stretch between two layers runs in float.

conv + skip   ->   conv + Q(skip)       the convolution and the sum become one kernel
mean(x)       ->   mean(Q(x))           an average pool between quantized layers
Q(max(x))     ->   max(Q(x))            the same values, and the layer before the pool writes integers
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from repfx.graph.ops import Map, Sum
from repfx.graph.view import GraphView
from repfx.quant import FakeQuant, Target

_AVERAGES = {torch.mean, "mean", F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
_AVERAGES |= {torch.ops.aten.mean.dim, torch.ops.aten.adaptive_avg_pool2d.default}
_LAYERS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


_MAXIMA: set[Any] = {F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d}
_MAXIMA |= {torch.ops.aten.max_pool2d.default, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d}

Place = tuple[fx.Node, fx.Node, fx.Node]  # who reads, which value, the layer whose bits it takes


def other_places(view: GraphView, layers: Collection[fx.Node], target: Target) -> list[Place]:
    """What is to be quantized of each sum with a layer's own output, and before each average that a layer reads."""
    found: list[Place] = []
    for node in view.nodes:
        op = view.ops[node]
        if isinstance(op, Sum):
            layer, values = _addends(view, op, layers, target.sums)
        else:
            layer = _reader(node, layers) if target.averages else None
            values = [] if layer is None else _averaged(view, node)
        if layer is not None:
            found += [(node, v, layer) for v in values if not view.writes.changed(v) and not _is_quantized(view, v)]
    return found


def before_pools(view: GraphView, places: Iterable[Place], inside: Mapping[fx.Node, fx.Node] | None = None) -> list[Place]:
    """The places with each quantizer after a max pool moved before it, where the pool has no other reader. `inside`: of
    nodes that go into one reader, that reader."""
    owner = inside or {}
    readers: dict[fx.Node, list[Place]] = {}
    for place in places:
        readers.setdefault(place[1], []).append(place)
    for pool in reversed(view.nodes):
        mine = readers.get(pool, [])
        if (
            is_max_pool(view.module, pool)
            and mine
            and {reader for reader, _, _ in mine} == {owner.get(u, u) for u in pool.users}
        ):
            (value,) = pool.all_input_nodes
            if not view.writes.changed(value) and not _is_quantized(view, value):
                del readers[pool]
                readers.setdefault(value, []).extend((pool, value, layer) for _, _, layer in mine)
    return sorted((p for some in readers.values() for p in some), key=lambda place: view.index[place[0]])


def is_max_pool(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) in _MAXIMA
    return node.op == "call_function" and node.target in _MAXIMA


def _is_quantized(view: GraphView, value: fx.Node) -> bool:
    return value.op == "call_module" and isinstance(view.modules[str(value.target)], FakeQuant)


def _addends(view: GraphView, op: Sum, layers: Collection[fx.Node], which: str) -> tuple[fx.Node | None, list[fx.Node]]:
    """The layer whose output is summed, and which of both values the target wants in integers."""
    if not which or op.kind != "add" or op.arrange is not None or len(op.terms) != 2:
        return None, []
    a, b = op.values
    mains = [n for n in (a, b) if n in layers and len(n.users) == 1]
    if not mains or a is b or any(factor != 1 for _, factor in op.terms):
        return None, []
    main = max(mains, key=view.index.__getitem__)
    return main, [a, b] if which == "all" else [a if main is b else b]


def _averaged(view: GraphView, node: fx.Node) -> list[fx.Node]:
    op, target = view.ops[node], view.modules.get(str(node.target)) if node.op == "call_module" else node.target
    average = isinstance(target, _LAYERS) or (isinstance(op, Map) and op.kind == "avgpool")
    average = average or (node.op != "call_module" and target in _AVERAGES)
    value = node.args[0] if node.args else None
    return [value] if average and isinstance(value, fx.Node) and view.is_data(value) else []


def _reader(node: fx.Node, layers: Collection[fx.Node]) -> fx.Node | None:
    """The layer that reads what this gives, at most reshaped."""
    for _ in range(4):
        found = next((user for user in node.users if user in layers), None)
        if found is not None or len(node.users) != 1:
            return found
        node = next(iter(node.users))
    return None
