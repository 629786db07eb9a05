"""Quantizers: the one way to insert quantizers, for `ptq`, `repq` and any other pass.

    for layer in quantizers:                       in graph order
        x = quantizers.input(layer)                Q(x), shared by all layers that read x
        w = quantizers.weight(layer, w, value)     Q(W)
        quantizers.put(layer, x, w, b)             replaces the layer by a call on these

The loop also inserts the quantizers that the target needs between layers (see
`repfx.placement.between`). It yields layers with FLOAT bits, and layers that the target cannot run
in integers, too; the latter are declined. The weights of both stay in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from repfx.algebra import Geometry
from repfx.errors import Declined, unknown
from repfx.graph.functional import call_layer
from repfx.graph.signs import non_negative
from repfx.graph.view import GraphView
from repfx.placement.between import Layers, find_places
from repfx.placement.formats import why_float
from repfx.placement.gates import WHY as GATE
from repfx.placement.gates import gate_layers
from repfx.quant import FakeQuant, Grid, Target, search_scale

FLOAT = 32
_POWERS = {"max": None, "mse": 2.0, "mae": 1.0}  # a weight's scale minimises |error| ** power


class Inserts(Protocol):
    """The part of a pass's `Work` that is needed here."""

    @property
    def target(self) -> Target: ...

    @property
    def inner(self) -> bool: ...

    def insert(self, before: fx.Node, value: fx.Node, wanted: str, layer: nn.Module) -> fx.Node: ...


@dataclass(frozen=True)
class IntegerLayer:
    """A layer to quantize: `node` is its output, `source` its input.

    `path` is the module under which its quantizers are put. `bits` are those of its input and
    `weight_bits` those of its weight; FLOAT leaves it in float. `inside`: all the nodes that the
    layer replaces, if there are several. `normed`: `node` is a batch norm, which stays behind the
    layer."""

    node: fx.Node
    source: fx.Node
    path: str
    geometry: Geometry
    bits: int = 8
    weight_bits: int = 8
    inside: tuple[fx.Node, ...] = ()
    normed: bool = False


@dataclass(frozen=True)
class Rounding:
    """How to quantize weights, and whether scales are `learned`.

    `per_channel`: one weight scale per output channel, else one per tensor. `weights`: how the
    scale is chosen, max, mse or mae. `every_code`: below 8 bits use all codes (see `Target`), but
    not in the weights of a layer with a norm behind it, whose gamma may turn their signs. Raises
    InputError for any other method."""

    per_channel: bool = True
    weights: str = "mse"
    learned: bool = False
    every_code: bool = False

    def __post_init__(self) -> None:
        if self.weights not in _POWERS:
            raise unknown("method for weights", self.weights, _POWERS)


class Quantizers:
    """The quantizers of one run of a pass.

    `view` is the graph before the first one was inserted; `declined` lists the layers that the
    target cannot run in integers.
    """

    def __init__(
        self, work: Inserts, view: GraphView, layers: Iterable[IntegerLayer], how: Rounding
    ) -> None:
        self.work, self.view, self.how = work, view, how
        self.layers = {layer.node: layer for layer in layers}
        self._gates = self._find_gates()
        unfit = {node: why for node, layer in self.layers.items() if (why := self._unfit(layer))}
        self.declined = tuple(unfit.values())
        self._integer = {
            node: layer
            for node, layer in self.layers.items()
            if layer.bits != FLOAT and node not in unfit
        }
        self._values: dict[fx.Node, list[fx.Node]] = {}  # by reader: the values it reads quantized
        self._origin: dict[fx.Node, fx.Node] = {}  # by such a value: where its integers are made
        self._optional: frozenset[fx.Node] = frozenset()  # of those
        self._grids = self._find()
        self._quants: dict[fx.Node, FakeQuant] = {}  # by where the integers are made
        self._rounded: dict[fx.Node, fx.Node] = {}  # by value: the call that quantizes it
        self._moved: dict[fx.Node, fx.Node] = {}

    def __iter__(self) -> Iterator[IntegerLayer]:
        # In order, so that the first reader of a value makes the quantizer that the others share.
        for node in self.view.nodes:
            if node in self.layers:
                yield self.layers[node]
                continue
            for value in dict.fromkeys(self._values.get(node, ())):
                path = str(node.target) if node.op == "call_module" else node.name
                node.replace_input_with(self.now(value), self._round(node, value, path))

    def runs_in_integers(self, layer: IntegerLayer) -> bool:
        return layer.node in self._integer

    def now(self, value: fx.Node) -> fx.Node:
        """The node that has replaced a value of the view by now, or the value itself."""
        return self._moved.get(value, value)

    def input(self, layer: IntegerLayer) -> fx.Node:
        """The layer's quantized input.

        It is the input itself if that stays in float, or already has integer values, as after a
        pool."""
        if layer.source not in self._values.get(layer.node, ()):
            return self.now(layer.source)
        return self._round(layer.node, layer.source, layer.path)

    def weight(self, layer: IntegerLayer, weight: fx.Node, value: Tensor) -> fx.Node:
        """The layer's weight, quantized unless the layer stays in float.

        `value` is the current weight, (out, in / groups, ...)."""
        if not self.runs_in_integers(layer):
            return weight
        grid = self.work.target.weight(
            layer.weight_bits,
            self.how.per_channel,
            layer.geometry.depthwise,
            self.how.every_code and not layer.normed,
        )
        power = _POWERS[self.how.weights]
        if power is None and not grid.is_sign:
            scale = grid.amax(value) / grid.high
        else:
            scale = search_scale(value, grid, power or 2.0)
        if self.how.learned:  # zeros get the range of PyTorch's own initial weights
            fresh = value[0].numel() ** -0.5 / grid.high
            scale = torch.where(grid.amax(value) > 0, scale, fresh)
        quant = FakeQuant(grid, scale.detach(), of_weight=True, learned=self.how.learned)
        return self.work.insert(layer.node, weight, f"{layer.path}.weight_quant", quant)

    def put(self, layer: IntegerLayer, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
        """Replaces the layer's nodes by a call on this input, weight and bias."""
        graph = layer.node.graph
        with graph.inserting_before(layer.node):
            call = call_layer(graph, layer.geometry, x, weight, bias)
            if layer.normed:
                call.meta = dict(layer.node.meta)
                call = graph.call_module(str(layer.node.target), (call,))
        self._moved[layer.node] = call
        layer.node.replace_all_uses_with(call)
        call.meta = dict(layer.node.meta)
        for node in sorted(layer.inside or (layer.node,), reverse=True):
            graph.erase_node(node)

    def _unfit(self, layer: IntegerLayer) -> Declined | None:
        """Why the layer stays in float, or None."""
        if layer.bits == FLOAT:
            return None
        if not self.view.varies(layer.source):
            why = "what it reads is the same for every input, so runtimes compute it once, in float"
            return Declined(layer.path, why)
        signed = not non_negative(self.view, layer.source)
        if layer.node in self._gates:
            return Declined(layer.path, GATE)
        why, hint = why_float(layer.geometry, signed, self.work.target)
        return Declined(layer.path, why, hint) if why else None

    def _find_gates(self) -> set[fx.Node]:
        if self.work.target.runtime != "tensorrt":
            return set()
        layers = {n: layer.geometry for n, layer in self.layers.items() if layer.bits != FLOAT}
        return gate_layers(self.view, layers)

    def _find(self) -> dict[fx.Node, Grid]:
        """The number format of each value to quantize, with the most bits any reader asks for."""
        sources = {node: layer.source for node, layer in self._integer.items()}
        convolutions = {
            node for node, layer in self._integer.items() if layer.geometry.source_axis != -1
        }
        inside = {n: layer.node for layer in self.layers.values() for n in layer.inside}
        layers = Layers(sources, convolutions, inside, self._gates)
        places = find_places(
            self.view, layers, self.work.target, self.work.inner, optional=not self.how.learned
        )
        self._origin, self._optional = places.origins, places.optional
        bits: dict[fx.Node, int] = {}
        for reader, value, wants in places.all:
            self._values.setdefault(reader, []).append(value)
            made = self._origin[value]
            bits[made] = max(bits.get(made, 1), self.layers[wants].bits)
        return {
            value: self.work.target.activation(
                b, non_negative(self.view, value), self.how.every_code
            )
            for value, b in bits.items()
        }

    def _round(self, before: fx.Node, value: fx.Node, path: str) -> fx.Node:
        made, changed = self._origin[value], self.view.writes.changed(value)
        if value not in self._rounded or changed:
            if made not in self._quants or changed:
                self._quants[made] = FakeQuant(self._grids[made], learned=self.how.learned)
                if made in self._optional:
                    self._quants[made].optional = True
            else:
                self._quants[made].more += 1
            self._rounded[value] = self.work.insert(
                before, self.now(value), f"{path}.input_quant", self._quants[made]
            )
        return self._rounded[value]
