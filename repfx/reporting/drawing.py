"""Lays out a graph for the page: depth runs to the right, parallel nodes are stacked."""

from __future__ import annotations

from collections import defaultdict

from torch import fx, nn

from repfx.capture.model import graphs
from repfx.graph.view import GraphView
from repfx.reporting.numbers import Drawing, Region
from repfx.reporting.regions import kinds_of


def drawing(model: nn.Module, regions: tuple[Region, ...], merged: bool) -> Drawing:
    """The graphs of a model, one below the other.

    The nodes of a region, or of the layer it became where `merged`, carry the region's number."""
    owner = {
        name: i
        for i, r in enumerate(regions)
        for name in ((r.name,) if merged else (*r.ops, r.name))
    }
    names: list[str] = []
    kinds: list[str] = []
    places: list[tuple[float, float]] = []
    numbers: list[int] = []
    edges: list[tuple[int, int]] = []
    floor = 0.0
    for path, module in graphs(model):
        view = GraphView(module)
        shown = [
            n
            for n in module.graph.nodes
            if n.op == "output" or (n.op != "get_attr" and _is_data(view, n))
        ]
        depth: dict[fx.Node, int] = {}
        rows: dict[int, int] = defaultdict(int)
        at: dict[fx.Node, int] = {}
        lowest = floor
        for node in shown:
            before = [n for n in node.all_input_nodes if n in depth]
            depth[node] = 1 + max((depth[n] for n in before), default=-1)
            name = (f"{path}." if path else "") + view.name(node)
            at[node] = len(names)
            names.append(name)
            kinds.append(kinds_of(view, node))
            y = floor - rows[depth[node]]
            rows[depth[node]] += 1
            lowest = min(lowest, y)
            places.append((float(depth[node]), y))
            numbers.append(owner.get(name, owner.get(str(node.target), -1)))
            edges += [(at[n], at[node]) for n in before]
        floor = lowest - 2
    return Drawing(tuple(names), tuple(kinds), tuple(places), tuple(numbers), tuple(edges))


def _is_data(view: GraphView, node: fx.Node) -> bool:
    return node.op == "placeholder" or view.is_data(node)
