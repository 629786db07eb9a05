"""Regions and layers of a report: what merged, the program that did it, the kernels and norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from repfx.algebra import Moments
from repfx.capture.model import graphs
from repfx.graph.calls import layer_of
from repfx.graph.naming import operator
from repfx.graph.ops import Map
from repfx.graph.view import GraphView
from repfx.passes import RepQ
from repfx.reporting.numbers import Branch, Norm, Region
from repfx.reporting.spreads import spread
from repfx.rewrite.inspection import inspect
from repfx.rewrite.results import Report
from repfx.rewrite.runner import rewrite


def regions_of(model: Any, report: Report, example: Any) -> tuple[Region, ...]:
    """Every block that merged, then every one that was declined, with its reason."""
    known = {r.name: r for r in inspect(model, example=example).regions}
    programs = programs_of(model, example)
    found = []
    for m in report.merged:
        seen = known.get(m.name)
        code = next((text for reads, text in programs if reads & set(m.ops)), "")
        becomes = seen.merged if seen is not None and seen.merged else m.into
        kinds = seen.ops if seen is not None else ()
        costs = (m.macs_before, m.macs_after, m.params_before, m.params_after)
        found.append(Region(m.into, m.ops, kinds, becomes, "", "", *costs, code))
    found += [
        Region(d.where, (), (), "", d.reason, d.cure, 0.0, 0.0, 0, 0) for d in report.declined
    ]
    return tuple(found)


def programs_of(model: Any, example: Any) -> list[tuple[set[str], str]]:
    """For each weight computed by a program: the layers the program reads, and its code."""
    trained, _ = rewrite(model, [RepQ(bits=32, bn="frozen")], example, "tensorrt")
    found = []
    for path, module in graphs(trained):
        prefix = f"{path}." if path else ""
        for node in module.graph.nodes:
            layer = layer_of(node) if node.op == "call_function" else None
            if layer is not None and not layer.path:
                ends = [v for v in (layer.weight, layer.bias) if isinstance(v, fx.Node)]
                nodes = _ancestors(module, ends)
                reads = {
                    prefix + str(n.target).rpartition(".")[0] for n in nodes if n.op == "get_attr"
                }
                reads |= {prefix + str(n.target) for n in nodes if n.op == "call_module"}
                found.append((reads, _code(nodes, ends)))
    return found


def _ancestors(module: fx.GraphModule, ends: list[fx.Node]) -> list[fx.Node]:
    todo, seen = list(ends), set(ends)
    while todo:
        for before in todo.pop().all_input_nodes:
            if (
                before not in seen
                and before.op not in ("placeholder",)
                and not _reads_input(module, before)
            ):
                seen.add(before)
                todo.append(before)
    return [n for n in module.graph.nodes if n in seen]


def _reads_input(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node computes moments of a feature map: no part of a program on weights."""
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Moments)


def _code(nodes: list[fx.Node], ends: list[fx.Node]) -> str:
    graph, made = fx.Graph(), {}
    for node in nodes:
        for before in node.all_input_nodes:
            if before not in made:
                made[before] = graph.placeholder(
                    "x" if not any(n.op == "placeholder" for n in graph.nodes) else before.name
                )
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[n] for n in ends))
    lines = graph.python_code("self").src.strip().splitlines()
    return "\n".join(line.split(";  ")[0] for line in lines if line.strip())


def deployed_layers(model: nn.Module) -> Iterator[tuple[str, fx.Node, GraphView]]:
    """The convolutions and linear layers of a merged model in order, each with its path."""
    for path, module in graphs(model):
        view = GraphView(module)
        prefix = f"{path}." if path else ""
        for node in view.nodes:
            op, layer = view.ops[node], view.layer(node)
            if layer is not None and isinstance(op, Map) and op.kind in ("conv", "linear"):
                yield prefix + (layer.path or node.name), node, view


def branches_of(base: nn.Module, regions: tuple[Region, ...], into: str) -> tuple[Branch, ...]:
    """The kernels that merged into this layer, as they were trained."""
    return tuple(
        Branch(name, spread(view.tensor(f"{node.target}.weight")))
        for name, node, view in _inside(base, regions, into)
        if node.op == "call_module" and view.layer(node) is not None
    )


def norms_of(base: nn.Module, regions: tuple[Region, ...], into: str) -> tuple[Norm, ...]:
    """The factors and the betas of the batch norms in this layer's region."""
    found = []
    for name, node, view in _inside(base, regions, into):
        m = view.modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None:
            gamma = torch.ones_like(m.running_var) if m.weight is None else m.weight.detach()
            factor = (gamma / torch.sqrt(m.running_var + m.eps)).abs()
            low, median, high = (float(f) for f in (factor.min(), factor.median(), factor.max()))
            beta = torch.zeros_like(m.running_var) if m.bias is None else m.bias
            found.append(Norm(name, low, median, high, spread(beta)))
    return tuple(found)


def _inside(
    base: nn.Module, regions: tuple[Region, ...], into: str
) -> Iterator[tuple[str, fx.Node, GraphView]]:
    ops = {op for r in regions if r.name == into for op in r.ops}
    for path, module in graphs(base) if ops else ():
        view = GraphView(module)
        for node in view.nodes:
            name = (f"{path}." if path else "") + view.name(node)
            if name in ops:
                yield name, node, view


def kinds_of(view: GraphView, node: fx.Node) -> str:
    """What a node does, in words for a reader."""
    text = operator(view.ops[node]) if node in view.ops else ""
    if text:
        return text
    if node.op == "call_module":
        return type(view.modules[str(node.target)]).__name__
    return (
        str(getattr(node.target, "__name__", node.target))
        if node.op.startswith("call")
        else node.op
    )
