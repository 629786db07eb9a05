"""Which operators of a float16 file stay in float32, because float16 cannot hold their numbers.

    a result beyond 65504           the operator and what reads it, up to the next quantizer
    a scale that float16 rounds     of a weight: its layers; of an activation: what makes it as well
    a constant or an input beyond   what reads it

Such nodes are marked. Between them values pass in float32; a Cast stands where they meet others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from repfx.graph.run_node import Interpreter
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of
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
        if node.op == "get_attr" and _unfit(_value(model, node)):
            found |= _readers(node, quants)
        elif node.op == "call_module" and node not in quants:
            layer = model.get_submodule(str(node.target))
            if any(map(_unfit, layer.parameters())) or any(map(_lost, layer.buffers())):
                found.add(node)
        elif node.op.startswith("call") and any(map(_lost, _numbers(node))):
            found |= {node, *_readers(node, quants)}  # x + 1e-12 is mostly there to be divided by
        quant = quants.get(node)
        if quant is not None and off(quant) > WORST:
            found |= {node, *_readers(node, quants)}
            made = node.all_input_nodes[0]
            if not quant.of_weight and made.op.startswith("call") and made not in quants:
                found.add(made)
    found = _together(model, found, quants)
    for node in found:
        node.meta[_MARK] = True
    return tuple(n.name for n in model.graph.nodes if n in found and n not in quants)


def _together(
    model: fx.GraphModule, found: set[fx.Node], quants: dict[fx.Node, FakeQuant]
) -> set[fx.Node]:
    """The nodes, with those that have to be in the same precision as one of them.

    These are layers that share a weight, calls of one module, and values that share memory that is
    written to: a cast would be a copy, and the write would be lost."""
    writes = GraphView(model).writes
    groups = [{writer, *values} for writer, values in writes.by.items()]
    calls: dict[str, set[fx.Node]] = {}
    for node in model.graph.nodes:
        if node.op == "call_module" and node not in quants:
            calls.setdefault(str(node.target), set()).add(node)
    groups += [{node, *_readers(node, quants)} for node, q in quants.items() if q.of_weight]
    groups += calls.values()
    groups = [{n for n in group if n.op.startswith("call")} for group in groups]
    while more := [g for g in groups if not g.isdisjoint(found) and not g <= found]:
        found = found.union(*more)
    return found


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
    quantizer: type[nn.Module],
    narrow: Callable[[Any], Any],
    widen: Callable[[Any], Any] | None = None,
) -> None:
    """Puts `narrow` and `widen` where values of marked nodes meet others.

    A module of the class `quantizer` takes either kind, and so does an output of the model."""
    either = {
        n
        for n in module.graph.nodes
        if n.op == "output"
        or (n.op == "call_module" and isinstance(module.get_submodule(str(n.target)), quantizer))
    }
    for node in list(module.graph.nodes):
        constant = node.op == "get_attr" and any(map(is_wide, node.users))
        if is_wide(node) or constant:
            readers = {r for r in node.users if not is_wide(r)} - either
            _between(module.graph, node, readers, narrow)
        elif widen is not None and node.op != "output":
            _between(module.graph, node, {r for r in node.users if is_wide(r)}, widen)


def _between(
    graph: fx.Graph, node: fx.Node, readers: set[fx.Node], function: Callable[[Any], Any]
) -> None:
    for reader in readers:  # right before it, since the value may be written to until then
        with graph.inserting_before(reader):
            call = graph.call_function(function, (node,))
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
    """The largest magnitude in the float tensors of a value; 0 if there are none."""
    found = [
        float(t.detach().abs().max())
        for t in tree_leaves(value)
        if isinstance(t, Tensor) and t.is_floating_point() and t.numel()
    ]
    return max([top for top in found if math.isfinite(top)], default=0.0)


def _unfit(value: Any) -> bool:
    """Whether a float tensor reaches beyond float16, or is so small that float16 rounds all of it.

    Single small numbers among larger ones do no harm."""
    return (top := _reach(value)) > LARGEST or 0 < top < torch.finfo(torch.float16).tiny


def _lost(value: Any) -> bool:
    """Whether a number, or one of a tensor, becomes 0 or infinite in float16."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        return False
    t = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    rounded = t.to(torch.float32).half()
    return bool((t.isfinite() & (rounded.isinf() | ((rounded == 0) & (t != 0)))).any())


def _numbers(node: fx.Node) -> list[float]:
    """The numbers that a node computes with. The whole numbers of a view are sizes."""
    kinds = (int, float) if Trait.FRESH in kind_of(node).traits else (float,)
    given = tree_leaves((node.args, node.kwargs))
    return [v for v in given if isinstance(v, kinds) and not isinstance(v, bool)]


def _beyond(model: fx.GraphModule, args: tuple[Any, ...]) -> set[fx.Node]:
    """The nodes whose results overflow float16 on this input."""
    found: set[fx.Node] = set()

    class Reach(Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.op.startswith(("call", "placeholder")) and _reach(result) > LARGEST:
                found.add(n)
            return result

    with torch.no_grad():
        Reach(model).run(*args)
    return found
