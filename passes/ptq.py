"""ptq: fake quantization on the input and the (merged) weight of every convolution and linear
layer.

    conv(x)       ->   F.conv2d(input_quant(x), weight_quant(conv.weight), conv.bias, ...)
    conv(x) + y   ->   conv(x) + input_quant(y)   a skip; averages too where the target has them

One quantizer a tensor: layers that read the same value share it. Weights get their scale here,
activations from `calibrate`; until then the activation quantizers pass values through. Every
state_dict key stays; quantizers add `<layer>.input_quant.scale` and `<layer>.weight_quant.scale`.
Layers already quantized are left alone."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx, nn

from repfx.algebra import CONVS
from repfx.errors import Declined, unknown
from repfx.graph.ops import Map
from repfx.graph.signs import non_negative
from repfx.graph.view import GraphView
from repfx.placement.between import find_places, spell_out
from repfx.placement.formats import VNNI, why_float
from repfx.quant import FakeQuant, Grid, search_scale
from repfx.rewrite.contract import Pass, Promise, Result, Stage, register
from repfx.rewrite.work import Work

_POWERS = {"max": None, "mse": 2.0, "mae": 1.0}


@register
@dataclass(frozen=True)
class Ptq(Pass):
    """`bits` of activations, and of weights unless `weight_bits` says otherwise.

    `per_channel`: one weight scale per output channel, else per tensor. `weights`: how weight
    ranges are chosen, max, mse or mae. `wide`: layers, by name or pattern ("head.*"), one or
    several, that take `wide_bits` instead; 32 leaves them in float. A value that several layers
    read takes the most bits of theirs."""

    name: ClassVar[str] = "ptq"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[tuple[str, ...]] = ("fuse",)
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.NAMES})

    bits: int = 8
    weight_bits: int | None = None
    per_channel: bool = True
    weights: str = "max"
    wide: str | tuple[str, ...] = ()
    wide_bits: int = 8

    def __post_init__(self) -> None:
        for bits in (
            self.bits,
            self.weight_bits or self.bits,
            *([] if self.wide_bits == 32 else [self.wide_bits]),
        ):
            Grid(bits)  # raises for what no grid has
        if self.weights not in _POWERS:
            raise unknown("method for weights", self.weights, _POWERS)

    def run(self, work: Work) -> Result:
        spell_out(work.module, work.target)
        view = work.view()
        found = [
            (n, op)
            for n, op in view.ops.items()
            if isinstance(op, Map) and op.kind in ("conv", "linear")
        ]
        # Read the graph in full before the first change: the view is a snapshot.
        names = {n: str(n.target) if n.op == "call_module" else _owner(n) for n, _ in found}
        patterns = (self.wide,) if isinstance(self.wide, str) else self.wide
        for pattern in patterns:
            if not fnmatch.filter(names.values(), pattern):
                raise unknown("layer in wide", pattern, names.values())
        wide = {
            n for n, name in names.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)
        }
        bits: dict[fx.Node, int] = {}
        kept = wide if self.wide_bits == 32 else set()
        found = [(n, op) for n, op in found if n not in kept]
        unfit = {
            n: why
            for n, op in found
            if (why := why_float(op.own, not non_negative(view, op.x), work.target))
        }
        found = [(n, op) for n, op in found if n not in unfit]
        layers = {n: op.x for n, op in found}
        depthwise = {n: op.own is not None and op.own.depthwise for n, op in found}
        convolutions = {n for n, op in found if op.kind == "conv"}
        places, origin = find_places(view, layers, convolutions, work.target)
        for _, x, n in places:
            x = origin[x]
            bits[x] = max(bits.get(x, 2), self.wide_bits if n in wide else self.bits)
        readers: dict[fx.Node, list[fx.Node]] = {}  # of a node, its values to quantize
        for reader, value, _ in places:
            readers.setdefault(reader, []).append(value)
        grids = {x: work.target.activation(b, non_negative(view, x)) for x, b in bits.items()}
        quants: dict[fx.Node, FakeQuant] = {}
        inputs: dict[fx.Node, fx.Node] = {}
        weights: dict[Any, fx.Node] = {}
        moved: dict[fx.Node, fx.Node] = {}
        for node in view.nodes:
            for value in dict.fromkeys(readers.get(node, ())):
                plain, source, changed = (
                    moved.get(value, value),
                    origin[value],
                    view.writes.changed(value),
                )
                if plain not in inputs or changed:
                    named = names.get(node) or (
                        str(node.target) if node.op == "call_module" else node.name
                    )
                    if source not in quants or changed:
                        quants[source] = FakeQuant(grids[source])
                    inputs[plain] = work.insert(node, plain, f"{named}.input_quant", quants[source])
                if node not in layers:
                    node.replace_input_with(plain, inputs[plain])
            if node in layers:
                plain = moved.get(layers[node], layers[node])
                x = (
                    inputs[plain] if node in readers else plain
                )  # else it reads a pool of quantized values
                b = self.wide_bits if node in wide else self.weight_bits or self.bits
                grid = work.target.weight(b, self.per_channel, depthwise[node])
                moved[node] = self._quantize(work, view, node, plain, x, names[node], grid, weights)
        declined = tuple(Declined(names[n], why, VNNI) for n, why in unfit.items())
        return Result(self.name, declined=declined, inserted=tuple(work.inserted))

    def _quantize(
        self,
        work: Work,
        view: GraphView,
        node: fx.Node,
        plain: fx.Node,
        x: fx.Node,
        name: str,
        grid: Grid,
        weights: dict[Any, fx.Node],
    ) -> fx.Node:
        """Makes the layer's call read the quantized input x in place of the plain one, and a
        quantized weight.
        """
        graph = work.module.graph
        if node.op == "call_module":
            layer = work.module.get_submodule(name)
            with graph.inserting_before(node):
                call = _as_function(graph, name, layer, x)
            node.replace_all_uses_with(call)
            call.meta = dict(node.meta)
            graph.erase_node(node)
        else:
            call = node
            call.replace_input_with(plain, x)
        weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
        assert isinstance(weight, fx.Node)
        key = weight.target if weight.op == "get_attr" else weight
        if key not in weights:
            value = view.tensor(str(weight.target) if weight.op == "get_attr" else weight)
            power = _POWERS[self.weights]
            scale = (
                grid.amax(value) / grid.high if power is None else search_scale(value, grid, power)
            )
            quant = FakeQuant(grid, scale.detach(), of_weight=True)
            weights[key] = work.insert(call, weight, f"{name}.weight_quant", quant)
        call.replace_input_with(weight, weights[key])
        return call


def _owner(node: fx.Node) -> str:
    """A path for the quantizers of a functional layer: where its weight lives, or the node's own
    name.
    """
    weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    path = (
        str(weight.target).rpartition(".")[0]
        if isinstance(weight, fx.Node) and weight.op == "get_attr"
        else ""
    )
    return path or node.name


def _as_function(graph: fx.Graph, name: str, layer: Any, x: fx.Node) -> fx.Node:
    """The layer's call with its weight and bias as values of the graph."""
    weight = graph.get_attr(f"{name}.weight")
    bias = None if layer.bias is None else graph.get_attr(f"{name}.bias")
    if isinstance(layer, nn.Linear):
        return graph.call_function(F.linear, (x, weight, bias))
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = graph.call_function(
            F.pad, (x, list(layer._reversed_padding_repeated_twice), layer.padding_mode)
        )
        padding = (0,) * len(layer.kernel_size)
    args = (x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
    return graph.call_function(CONVS[len(layer.kernel_size)], args)
