"""Segments: a graph cut where one value carries all, so that it can be run, and learned, a piece at a time.

    x -> [Q conv relu] -> [Q conv relu Q conv + relu] -> [pool Q linear] -> y

A cut is a value on which everything after it depends and through which everything before it passes; a segment ends at a
cut that a quantizer reads. Segments share the modules and tensors of the graph they are cut from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from repfx.errors import InputError, unknown
from repfx.quant import FakeQuant


@dataclass(frozen=True)
class Segment:
    """`name`: what a person calls the value it ends with. `module` takes the value before and gives the one after.

    Called, it gives one tensor: several outputs are joined, flat, (N, all of them).
    """

    name: str
    module: fx.GraphModule

    def __call__(self, x: Tensor) -> Tensor:
        y = self.module(x)
        if isinstance(y, Tensor):
            return y
        return torch.cat([t.flatten(1) for t in tree_leaves(y) if isinstance(t, Tensor)], 1)

    def modules(self, kind: type[nn.Module]) -> dict[str, nn.Module]:
        """Those of a kind in it, by path."""
        return {name: m for name, m in self.module.named_modules() if isinstance(m, kind)}


def segments(module: nn.Module, ends: Sequence[str] | None = None) -> list[Segment]:
    """The segments of a model with one input, in order. `ends` names the values they end with, all but the last.

    Raises InputError for a model that is no GraphModule or has several inputs, and for an end that is no cut, naming those
    that are.
    """
    if not isinstance(module, fx.GraphModule):
        raise InputError("blocks are found in a GraphModule, a model traced whole; repfx.calibrate takes any")
    nodes = list(module.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder" and n.users]
    if len(inputs) != 1:
        raise InputError(f"blocks are found in a model of one input, not {len(inputs)}")
    output = nodes[-1]
    cuts = {_name(n): n for n in _cuts(nodes) if n is not inputs[0]}
    if ends is None:
        chosen = [n for n in cuts.values() if any(_quantizes(module, user) for user in n.users)]
    else:
        for end in ends:
            if end not in cuts:
                raise unknown("end of a block", end, cuts)
        chosen = [n for name, n in cuts.items() if name in ends]
    found, start = [], inputs[0]
    for end in [*(n for n in chosen if n is not inputs[0]), output]:
        found.append(Segment(_name(end), _between(module, nodes, start, end)))
        start = end
    return found


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _quantizes(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), FakeQuant)


def _data(nodes: list[fx.Node]) -> set[fx.Node]:
    """What depends on an input."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _cuts(nodes: list[fx.Node]) -> list[fx.Node]:
    """The values that are all that is alive at some place."""
    data = _data(nodes)
    order = {n: i for i, n in enumerate(nodes)}
    alive: dict[fx.Node, int] = {}
    found = []
    for i, node in enumerate(nodes[:-1]):
        if node not in data:
            continue
        if node.users:
            alive[node] = max(order[u] for u in node.users)
        alive = {n: last for n, last in alive.items() if last > i}
        if len(alive) == 1 and node in alive:
            found.append(node)
    return found


def _between(module: fx.GraphModule, nodes: list[fx.Node], start: fx.Node, end: fx.Node) -> fx.GraphModule:
    graph, made = fx.Graph(), {}
    made[start] = graph.placeholder("x")
    data = _data(nodes)

    def copy(node: fx.Node) -> fx.Node:
        if node not in made:
            for before in node.all_input_nodes:
                copy(before)
            made[node] = graph.node_copy(node, made.__getitem__)
        return made[node]

    inside = nodes[nodes.index(start) + 1 : nodes.index(end) + 1]
    for node in inside:
        if node in data and node.op != "output":
            copy(node)
    if end.op == "output":
        for node in end.all_input_nodes:
            copy(node)
        place: Callable[[fx.Node], fx.Node] = made.__getitem__
        graph.output(fx.node.map_arg(end.args[0], place))
    else:
        graph.output(made[end])
    return fx.GraphModule(module, graph)
