"""fold: replaces the program that computes a weight by its result, bit for bit.

F.conv2d(Q(x), Q(M(W3, W1, bn)), b(W3, W1, bn))   ->   F.conv2d(Q(x), Q(weight), bias)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from repfx.algebra import Fixed, KernelNorm, Moments
from repfx.graph.calls import Layer, layer_of
from repfx.graph.edit import CONV_LAYERS, drop_unreferenced, free_path, put_module, references
from repfx.graph.effects import is_dead
from repfx.graph.run_node import call as run_node
from repfx.quant import FakeQuant
from repfx.rewrite.results import Merged


@dataclass(frozen=True)
class _Program:
    """A call of a functional convolution or linear layer whose weight the graph computes.

    `quant` is the call of the weight's quantizer, if there is one. `values` maps each node of the
    program to its value for the current weights, inputs first."""

    layer: Layer
    quant: fx.Node | None
    weight: fx.Node
    bias: fx.Node | None
    values: dict[fx.Node, Any]

    @property
    def call(self) -> fx.Node:
        return self.layer.node

    def reads(self, module: fx.GraphModule) -> list[fx.Node]:
        """The weights of the model that the program reads: no vectors, no constants of a merge."""
        return [
            n
            for n, value in self.values.items()
            if n.op == "get_attr"
            and value.dim() > 1
            and not isinstance(module.get_submodule(_owner(n)), Fixed)
        ]


def fold_programs(module: fx.GraphModule) -> tuple[Merged, ...]:
    """Replaces each weight program by its result in eval mode, in place."""
    before = references(module.graph)
    replaced: list[nn.Module] = []
    done = []
    for call in list(module.graph.nodes):
        program = _program(module, call)
        if program is not None:
            done.append(_fold(module, program, replaced))
    if done:
        _drop_unread(module)
        drop_unreferenced(module, before, replaced)
    return tuple(done)


def _drop_unread(module: fx.GraphModule) -> None:
    """Removes what only the programs called. Moments may be inside a layer that stays."""
    moments: set[str] = set()
    for node in reversed(module.graph.nodes):
        unread = not node.users and _calls(module, node, (KernelNorm, Moments, FakeQuant))
        if is_dead(node) or unread:
            moments |= {str(node.target)} if _calls(module, node, Moments) else set()
            module.graph.erase_node(node)
    for path in moments - references(module.graph):
        owner, _, name = path.rpartition(".")
        del module.get_submodule(owner)._modules[name]


def _program(module: fx.GraphModule, call: fx.Node) -> _Program | None:
    layer = layer_of(call) if call.op == "call_function" else None
    if layer is None or layer.kind.name not in ("conv", "linear"):
        return None
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, fx.Node) or isinstance(bias, str):
        return None
    if _is_program(module, layer.x):  # a convolution of weights: a step of another program
        return None
    quant = weight if _quantizer(module, weight) is not None else None
    weight = weight if quant is None else cast(fx.Node, quant.args[0])
    if weight.op == "get_attr" or not _is_program(module, weight):
        return None
    nodes = _ancestors(module, [n for n in (weight, bias) if isinstance(n, fx.Node)])
    values = _evaluate(module, nodes)
    if values[weight].dim() < 2:  # F.linear also takes a vector, which no layer has
        return None
    return _Program(layer, quant, weight, bias, values)


def _fold(module: fx.GraphModule, p: _Program, replaced: list[nn.Module]) -> Merged:
    """Inserts a layer with the program's values.

    With a quantizer, the quantizer now reads the layer's weight; without one, the layer replaces
    the call."""
    weight = p.values[p.weight].detach().contiguous()
    bias = None if p.bias is None else p.values[p.bias].detach().contiguous()
    layer = _layer(p.layer, weight, bias).train(module.training)
    reads = p.reads(module)
    path = _path(module, p, layer, reads)
    old = put_module(module, path, layer)
    if old is not None:  # its quantizers are its children
        layer._modules.update(old._modules)
        replaced.append(old)
    with module.graph.inserting_before(p.quant or p.call):
        if p.quant is None:
            plain = module.graph.call_module(path, (p.layer.x,))
            plain.meta = dict(p.call.meta)
            p.call.replace_all_uses_with(plain)
            module.graph.erase_node(p.call)
        else:
            p.quant.args = (module.graph.get_attr(f"{path}.weight"),)
            if p.bias is not None:
                p.call.replace_input_with(p.bias, module.graph.get_attr(f"{path}.bias"))
    names, macs = tuple(str(n.target) for n in reads), float(weight.numel())
    params = sum(p.values[n].numel() for n in reads)
    return Merged(path, names, path, macs, macs, params, weight.numel(), 0.0)


def _path(module: fx.GraphModule, p: _Program, layer: nn.Module, reads: list[fx.Node]) -> str:
    """The path of the layer with the largest weight, unless something else reads that layer too."""
    path = _owner(max(reads, key=lambda n: p.values[n].numel()))
    mine = [n for n in module.graph.nodes if n.op == "get_attr" and _owner(n) == path]
    free = all(user in p.values or user is p.call for n in mine for user in n.users)
    if free and type(layer) is type(module.get_submodule(path)):
        return path
    return free_path(module, f"{path}.merged" if path else "merged")


def _owner(read: fx.Node) -> str:
    """The path of the module that owns the tensor of a get_attr node."""
    return str(read.target).rpartition(".")[0]


def _quantizer(module: fx.GraphModule, node: fx.Node) -> FakeQuant | None:
    found = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, FakeQuant) and found.of_weight else None


def _is_program(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is computed only from constants and KernelNorms."""
    return all(
        n.op in ("get_attr", "call_function", "call_method") or _calls(module, n)
        for n in _ancestors(module, [node])
    )


def _calls(module: fx.GraphModule, node: fx.Node, kinds: Any = KernelNorm) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), kinds)


def _ancestors(module: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, None]:
    """The nodes and everything they are computed from, inputs first.

    The moments that a KernelNorm reads are left out: in eval mode it does not use them."""
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in found:
            return
        for before in node.all_input_nodes[1:] if _calls(module, node) else node.all_input_nodes:
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
            values[node] = norm((None, None, None), *given)  # in eval mode it needs no moments
            norm.training = training
    return values


def _layer(call: Layer, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer with these values that computes the same as the call."""
    groups = call.rest.get("groups", 1)
    sizes = (weight.shape[1] * groups, weight.shape[0])
    if call.kind.name == "linear":
        layer: nn.Module = nn.Linear(*sizes, bias=False, device="meta")
    else:
        taps = weight.shape[2:]
        options = {k: call.rest[k] for k in ("stride", "padding", "dilation")}
        make: Any = CONV_LAYERS[len(taps)]
        layer = make(*sizes, tuple(taps), groups=groups, bias=False, device="meta", **options)
    layer._parameters["weight"] = nn.Parameter(weight)
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias)
    return layer
