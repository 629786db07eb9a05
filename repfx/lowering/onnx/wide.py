"""Which operators of a float16 file stay in float32, because float16 cannot hold their numbers.

    a result beyond 65504           the operator and what reads it, up to the next quantizer
    a scale that float16 rounds     of a weight: its layers; of an activation: what makes it as well
    a constant beyond 65504         what reads it

Such nodes are marked. Between them values pass in float32; a Cast stands where they meet others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from repfx.graph.run_node import Interpreter
from repfx.quant import FakeQuant

LARGEST = torch.finfo(torch.float16).max
# The largest relative error of a scale in float16: half a step at the end of an 8-bit grid.
WORST = 2**-8
_MARK = "float32"


def is_wide(node: fx.Node) -> bool:
    """Whether the node computes in float32, or quantizes with a scale that is kept in float32."""
    return bool(node.meta.get(_MARK))


def mark(model: nn.Module, args: tuple[Any, ...]) -> tuple[str, ...]:
    """Marks the nodes of a model that was traced whole, and returns the names of the operators.

    `args`: an input, to see how far the results reach."""
    if not isinstance(model, fx.GraphModule):
        return ()
    quants = {n: q for n in model.graph.nodes if (q := _quantizer(model, n)) is not None}
    found = _beyond(model, args)
    for node in list(found):
        found |= _readers(node, quants)
    for node in model.graph.nodes:
        if node.op == "get_attr" and _reach(_value(model, node)) > LARGEST:
            found |= _readers(node, quants)
        quant = quants.get(node)
        if quant is not None and off(quant) > WORST:
            found |= {node, *_readers(node, quants)}
            made = node.all_input_nodes[0]
            if not quant.of_weight and made.op.startswith("call") and made not in quants:
                found.add(made)
    for node, quant in quants.items():  # layers may share a weight
        if quant.of_weight and not found.isdisjoint(node.users):
            found |= {node, *_readers(node, quants)}
    for node in found:
        node.meta[_MARK] = True
    return tuple(n.name for n in model.graph.nodes if n in found and n not in quants)


def off(quant: FakeQuant) -> float:
    """The largest relative error of a quantizer's scales in float16."""
    step = quant.step.detach().float()
    return float(((step.half().float() - step) / step).abs().max())


def kept(module: fx.GraphModule) -> Iterator[tuple[nn.Module, str]]:
    """The tensors that stay in float32, each by its holder and name."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and any(map(is_wide, node.users)):
            parent, _, name = str(node.target).rpartition(".")
            yield module.get_submodule(parent), name
        elif node.op == "call_module" and is_wide(node):
            layer = module.get_submodule(str(node.target))
            for name in [*dict(layer.named_parameters()), *dict(layer.named_buffers())]:
                parent, _, last = name.rpartition(".")
                yield layer.get_submodule(parent), last


def cast_edges(
    module: fx.GraphModule,
    quantizers: set[fx.Node],
    narrow: Callable[[Any], Any],
    widen: Callable[[Any], Any] | None = None,
) -> None:
    """Puts `narrow` and `widen` where values of marked nodes meet others.

    A quantizer takes either kind, and so does an output of the model."""
    for node in list(module.graph.nodes):
        constant = node.op == "get_attr" and any(map(is_wide, node.users))
        if is_wide(node) or constant:
            free = {r for r in node.users if is_wide(r) or r in quantizers or r.op == "output"}
            _between(module.graph, node, set(node.users) - free, narrow)
        elif widen is not None and node.op != "output":
            _between(module.graph, node, {r for r in node.users if is_wide(r)}, widen)


def _between(
    graph: fx.Graph, node: fx.Node, readers: set[fx.Node], function: Callable[[Any], Any]
) -> None:
    if not readers:
        return
    with graph.inserting_after(node):
        call = graph.call_function(function, (node,))
    for reader in readers:
        reader.replace_input_with(node, call)


def to_float(value: Any) -> Any:
    """float16 tensors in float32."""
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.float16 else t, value)


def to_float16(value: Any) -> Any:
    """float32 tensors in float16."""
    return tree_map_only(Tensor, lambda t: t.half() if t.dtype == torch.float32 else t, value)


def _readers(node: fx.Node, quants: dict[fx.Node, FakeQuant]) -> set[fx.Node]:
    return {user for user in node.users if user.op.startswith("call") and user not in quants}


def _quantizer(model: fx.GraphModule, node: fx.Node) -> FakeQuant | None:
    found = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, FakeQuant) else None


def _value(model: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = model
    for atom in str(node.target).split("."):
        value = getattr(value, atom)
    return value


def _reach(value: Any) -> float:
    """The largest magnitude of a float tensor; 0 for anything else."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    top = float(value.detach().abs().max())
    return top if math.isfinite(top) else 0.0


def _beyond(model: fx.GraphModule, args: tuple[Any, ...]) -> set[fx.Node]:
    """The nodes whose results overflow float16 on this input."""
    found: set[fx.Node] = set()

    class Reach(Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.op.startswith("call") and _reach(result) > LARGEST:
                found.add(n)
            return result

    with torch.no_grad():
        Reach(model).run(*args)
    return found
