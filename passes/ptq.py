"""ptq: fake-quantizes the input and the (merged) weight of every convolution and linear layer.

    conv(x)       ->   F.conv2d(input_quant(x), weight_quant(conv.weight), conv.bias, ...)
    conv(x) + y   ->   conv(x) + input_quant(y)   a skip; also averages, if the target has them

Each tensor has one quantizer: layers that read the same value share it. Weight scales are set here,
activation scales by `calibrate`; until then the activation quantizers pass values through. Every
state_dict key stays; quantizers add `<layer>.input_quant.scale` and `<layer>.weight_quant.scale`.
Layers that are already quantized stay as they are."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from repfx.errors import Declined, InputError, unknown
from repfx.graph.functional import value_of
from repfx.graph.ops import Map
from repfx.graph.view import GraphView
from repfx.placement.between import spell_out
from repfx.placement.formats import TRANSPOSED
from repfx.placement.quantizers import FLOAT, IntegerLayer, Quantizers, Rounding
from repfx.quant import Grid
from repfx.rewrite.contract import Pass, Promise, Stage, register
from repfx.rewrite.results import Result
from repfx.rewrite.work import Work


@register
@dataclass(frozen=True)
class Ptq(Pass):
    """Quantizes activations to `bits`, and weights to `weight_bits` or else to `bits`.

    `per_channel`: one weight scale per output channel, else one per tensor. `weights`: how weight
    ranges are chosen, max, mse or mae. `wide`: one or more layers, by name or pattern ("head.*"),
    that get `wide_bits` instead; 32 leaves them in float. If several layers read a value, it gets
    the largest number of bits among them. `unsigned`: inputs of the model that are never negative,
    by name or pattern, such as images from 0 to 1. A target with unsigned codes then has 255 steps
    for them and not 127, enough for an image of 8 bits to lose nothing; `calibrate` checks it."""

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
    unsigned: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for bits in (
            self.bits,
            self.weight_bits or self.bits,
            *([] if self.wide_bits == FLOAT else [self.wide_bits]),
        ):
            Grid(bits)  # raises for an invalid number of bits
            if bits == 1:
                raise InputError("1 bit needs training: use repq(weight_bits=1, bn=live)")
        self._rounding()

    def run(self, work: Work) -> Result:
        spell_out(work.module, work.target)
        view = work.view(self.unsigned)
        quantizers = Quantizers(work, view, self._layers(view), self._rounding())
        weights: dict[Any, fx.Node] = {}  # quantized weights; layers may share one
        for layer in quantizers:
            node, x = layer.node, quantizers.input(layer)
            if not quantizers.runs_in_integers(layer):
                # Another layer may need the same input quantized.
                node.replace_input_with(quantizers.now(layer.source), x)
                continue
            own = view.layer(node)
            assert own is not None
            weight, bias = (value_of(ref, node) for ref in (own.weight, own.bias))
            assert weight is not None
            key = str(weight.target) if weight.op == "get_attr" else weight
            if key not in weights:
                weights[key] = quantizers.weight(layer, weight, view.tensor(key))
            if node.op == "call_module":
                quantizers.put(layer, x, weights[key], bias)
            else:
                node.replace_input_with(quantizers.now(layer.source), x)
                node.replace_input_with(weight, weights[key])
        left = tuple(
            Declined(view.name(node), TRANSPOSED)
            for node, op in view.ops.items()
            if isinstance(op, Map) and op.kind == "conv_transpose"
        )
        declined = (*quantizers.declined, *left)
        return Result(self.name, declined=declined, inserted=tuple(work.inserted))

    def _rounding(self) -> Rounding:
        return Rounding(self.per_channel, self.weights)

    def _layers(self, view: GraphView) -> list[IntegerLayer]:
        """The convolutions and linear layers, each with its bits.

        Raises InputError if a pattern in `wide` matches no layer."""
        found = {
            node: op
            for node, op in view.ops.items()
            if isinstance(op, Map) and op.kind in ("conv", "linear")
        }
        names = {n: getattr(view.layer(n), "path", "") or n.name for n in found}
        patterns = (self.wide,) if isinstance(self.wide, str) else self.wide
        for pattern in patterns:
            if not fnmatch.filter(names.values(), pattern):
                raise unknown("layer in wide", pattern, names.values())
        layers = []
        for node, op in found.items():
            assert op.own is not None
            bits, weight_bits = self.bits, self.weight_bits or self.bits
            if any(fnmatch.fnmatchcase(names[node], p) for p in patterns):
                bits = weight_bits = self.wide_bits
            layers.append(IntegerLayer(node, op.x, names[node], op.own, bits, weight_bits))
        return layers
