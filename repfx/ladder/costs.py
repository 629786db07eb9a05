"""What a quantized net costs: layers in integers, bytes of weights, and an estimate of its latency.

latency = (float MACs + integer MACs / 4) / all MACs      1 is the float net"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.calibration.biases import weight_quantizer
from repfx.capture.model import graphs
from repfx.errors import Declined
from repfx.graph.calls import Layer
from repfx.graph.run_node import Interpreter
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of
from repfx.ladder.results import Placement
from repfx.quant import FakeQuant, in_eval, quantizers_of

FASTER = 4  # integer multiply-accumulates in the time of one in float
UNSAID = "the target has no integers for it here"
UNTRACED = "it is an operator without integers, or in code that was not traced"
LOSES = "it is one of those that lose most"
LAYERS = (
    *(nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)


@dataclass(frozen=True)
class Costs:
    """What a net costs; `latency` is None where the sizes inside it are unknown."""

    placement: Placement
    size: int
    latency: float | None


def costs(
    net: nn.Module,
    args: tuple[Any, ...],
    declined: Iterable[Declined],
    wide: Collection[str] = (),
) -> Costs:
    """The costs of a net.

    `args`: one image, which tells the sizes. `declined`: why layers stay in float. `wide`: the
    layers that were left wide."""
    why = {d.where: d for d in declined} | {name: Declined(name, LOSES) for name in wide}
    integer: list[str] = []
    floats: list[str] = []
    macs = {True: 0, False: 0}
    whole = isinstance(net, fx.GraphModule)
    for path, graph in graphs(net):
        view, prefix = GraphView(graph), f"{path}." if path else ""
        sizes = _Sizes(graph).of(args) if whole and not path else {}
        for node in view.nodes:
            layer = view.layer(node)
            if layer is None:
                products = node.target is F.scaled_dot_product_attention
                whole &= not products and kind_of(node).name != "product of matrices"
                continue
            quant = weight_quantizer(view, layer)
            (floats if quant is None else integer).append(prefix + _name(node, layer, quant))
            own = _macs(view, layer, sizes)
            whole &= own is not None
            macs[quant is not None] += own or 0
    others = _others(net, {*integer, *floats})
    whole &= not others
    total = sum(macs.values())
    latency = (macs[False] + macs[True] / FASTER) / total if whole and total else None
    left = [why.get(name) or Declined(name, UNSAID) for name in floats]
    left += [why.get(name) or Declined(name, UNTRACED) for name in others]
    wider = tuple(name for name in integer if name in wide)
    return Costs(Placement(tuple(integer), tuple(left), wider), size_of(net), latency)


def _others(net: nn.Module, known: Collection[str]) -> list[str]:
    """The layers that are in no graph: they run inside code that was not traced, or as one operator
    of several layers, such as an LSTM."""
    return [
        name
        for name, m in net.named_modules()
        if isinstance(m, LAYERS) and name not in known and any(p.dim() > 1 for p in m.parameters())
    ]


def size_of(net: nn.Module) -> int:
    """Bytes of the parameters, where a quantized weight takes its bits."""
    quants = quantizers_of(net)
    bits: dict[int, int] = {}
    for _, graph in graphs(net):
        view = GraphView(graph)
        for node in view.nodes:
            quant = view.modules.get(str(node.target)) if node.op == "call_module" else None
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            if isinstance(quant, FakeQuant) and quant.of_weight and source is not None:
                key = str(source.target) if source.op == "get_attr" else source
                bits[id(view.tensor(key))] = quant.grid.bits
    scales = {id(p) for q in quants.values() for p in q.parameters()}
    params = {id(p): p for p in net.parameters() if id(p) not in scales}
    return sum(p.numel() * bits.get(i, 8 * p.element_size()) for i, p in params.items()) // 8


def _name(node: fx.Node, layer: Layer, quant: fx.Node | None) -> str:
    return str(quant.target).rpartition(".")[0] if quant is not None else layer.path or node.name


def _macs(view: GraphView, layer: Layer, sizes: dict[fx.Node, tuple[int, ...]]) -> int | None:
    """Multiply-accumulates for one image, or None where the sizes are unknown."""
    transposed = "transpose" in layer.kind.name
    size = sizes.get(layer.x if transposed else layer.node)
    if size is None:
        return None
    positions = size[1:-1] if layer.channel_axis == -1 else size[2:]
    weight = layer.weight
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        weight = str(weight.target)
    count = sizes.get(weight) if isinstance(weight, fx.Node) else view.tensor(weight).shape
    return None if count is None else prod(positions) * prod(count)


class _Sizes(Interpreter):
    """The shape of every value in a graph, from one run; none where it does not run."""

    def of(self, args: tuple[Any, ...]) -> dict[fx.Node, tuple[int, ...]]:
        self.found: dict[fx.Node, tuple[int, ...]] = {}
        assert isinstance(self.module, nn.Module)
        try:
            with torch.no_grad(), in_eval(self.module):
                self.run(*args)
        except Exception:  # such as a net that takes batches of one size only
            return {}
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape)
        return value
