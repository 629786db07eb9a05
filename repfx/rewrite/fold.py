"""fold: the program that computes a weight becomes the weight, by the program itself, so that not a
bit differs.

F.conv2d(Q(x), Q(M(W3, W1, bn)), b(W3, W1, bn))   ->   F.conv2d(Q(x), Q(weight), bias)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra import CONVS, KernelNorm, Moments
from repfx.graph.edit import CONV_LAYERS, drop_unreferenced, free_path, put_module, references
from repfx.graph.effects import is_dead
from repfx.graph.run_node import call as run_node
from repfx.quant import FakeQuant
from repfx.rewrite.results import Merged

_LAYERS = {CONVS[axes]: layer for axes, layer in CONV_LAYERS.items()}


def fold_programs(module: fx.GraphModule) -> tuple[Merged, ...]:
    """Evaluates, in eval meaning, the program of each weight that reads a KernelNorm or is
    quantized, in place.
    """
    graph, before = module.graph, references(module.graph)
    replaced: list[nn.Module] = []
    done = []
    calls: list[Any] = list(graph.nodes)
    for call in calls:
        if call.target is not F.linear and call.target not in _LAYERS:
            continue
        given = _bound(call)
        weight, bias = given["weight"], given["bias"]
        if not isinstance(weight, fx.Node):
            continue
        quant = _quantizer(module, weight)
        program: Any = weight.args[0] if quant is not None else weight
        if program.op == "get_attr" or not _is_program(module, program):
            continue
        nodes = _ancestors(module, [n for n in (program, bias) if isinstance(n, fx.Node)])
        values = _evaluate(module, nodes)
        now = values[program].detach().contiguous()
        layer = _layer(
            call.target, given, now, None if bias is None else values[bias].detach().contiguous()
        )
        layer.train(module.training)
        reads = [
            n
            for n in nodes
            if n.op == "get_attr" and values[n].dim() > 1 and "_constant" not in str(n.target)
        ]
        path = str(max(reads, key=lambda n: values[n].numel()).target).rpartition(".")[0]
        mine = [
            n
            for n in graph.nodes
            if n.op == "get_attr" and str(n.target).rpartition(".")[0] == path
        ]
        free = type(layer) is type(module.get_submodule(path)) and not any(
            set(n.users) - {*nodes, call} for n in mine
        )
        if not free:
            path = free_path(module, f"{path}.merged" if path else "merged")
        old = put_module(module, path, layer)
        if old is not None:  # its quantizers hang on it
            layer._modules.update(old._modules)
            replaced.append(old)
        with graph.inserting_before(weight if quant is not None else call):
            new_weight = graph.get_attr(f"{path}.weight")
            new_bias = None if bias is None else graph.get_attr(f"{path}.bias")
        if quant is not None:
            weight.args = (new_weight,)
            if bias is not None:
                call.replace_input_with(bias, new_bias)
        else:
            with graph.inserting_before(call):
                plain = graph.call_module(path, (given["input"],))
            plain.meta = dict(call.meta)
            call.replace_all_uses_with(plain)
            graph.erase_node(call)
        params = sum(values[n].numel() for n in reads)
        macs = float(now.numel())
        done.append(
            Merged(
                path,
                tuple(str(n.target) for n in reads),
                path,
                macs,
                macs,
                params,
                now.numel(),
                0.0,
            )
        )
    if done:
        for node in reversed(graph.nodes):
            if is_dead(node) or (not node.users and _is_norm(module, node, (KernelNorm, Moments))):
                graph.erase_node(node)
        drop_unreferenced(module, before, replaced)
    return tuple(done)


def _quantizer(module: fx.GraphModule, node: fx.Node) -> FakeQuant | None:
    found = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, FakeQuant) and found.of_weight else None


def _is_program(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is computed from constants and KernelNorms alone."""
    return all(
        n.op in ("get_attr", "call_function", "call_method") or _is_norm(module, n)
        for n in _ancestors(module, [node])
    )


def _is_norm(module: fx.GraphModule, node: fx.Node, kinds: Any = KernelNorm) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), kinds)


def _ancestors(module: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, None]:
    """The nodes and what they are computed from, without what a KernelNorm reads statistics of;
    inputs first.
    """
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in found:
            return
        for before in node.all_input_nodes[1:] if _is_norm(module, node) else node.all_input_nodes:
            visit(before)
        found[node] = None

    for node in nodes:
        visit(node)
    return found


def _evaluate(module: fx.GraphModule, nodes: dict[fx.Node, None]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in nodes:
            if node.op == "get_attr":
                at: Any = module
                for name in str(node.target).split("."):
                    at = getattr(at, name)
                values[node] = at
                continue
            if node.op != "call_module":
                values[node] = run_node(node, values.__getitem__)
                continue
            norm = module.get_submodule(str(node.target))
            training, norm.training = norm.training, False
            given = (values[v] if isinstance(v, fx.Node) else v for v in node.args[1:])
            values[node] = norm((None, None, None), *given)  # in eval mode it reads no input
            norm.training = training
    return values


def _bound(call: fx.Node) -> dict[str, Any]:
    """The arguments of a functional convolution or linear by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {**defaults, **dict(zip(names, call.args, strict=False)), **call.kwargs}


def _layer(target: Any, given: dict[str, Any], weight: Tensor, bias: Tensor | None) -> nn.Module:
    if target is F.linear:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], False, device="meta")
    else:
        groups, options = (
            given["groups"],
            {k: given[k] for k in ("stride", "padding", "dilation", "groups")},
        )
        sizes = (weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]))
        layer = _LAYERS[target](*sizes, bias=False, device="meta", **options)
    layer._parameters["weight"] = nn.Parameter(weight)
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias)
    return layer
