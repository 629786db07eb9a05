"""The error of every layer, from one walk on a float and a quantized stream (QARepVGG, Fig. 6).

float       y  = f(x)
alone       y1 = Q(f)(x)      the layer quantized, on float inputs
together    y^ = Q(f)(x^)     the layer quantized, on the inputs of the quantized net

SQNR = 10 log10( sum y^2 / sum (y - y')^2 ),   MSE = mean (y - y')^2,   y' = y1 or y^
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, fx

from repfx.calibration.streams import TwoStreams
from repfx.graph.moves import passes_codes
from repfx.graph.run_node import step
from repfx.graph.vocabulary import kind_of
from repfx.quant import FakeQuant
from repfx.reporting.inputs import Inputs
from repfx.reporting.numbers import decibels
from repfx.reporting.spreads import Tally


class Pairs:
    """Sums over batches. `layers`: the calls of quantized layers, each with the layer's name.

    `largest`: the largest magnitude that each activation quantizer sees."""

    def __init__(
        self, module: fx.GraphModule, layers: dict[fx.Node, str], largest: dict[FakeQuant, float]
    ) -> None:
        self.module, self.layers, self.largest = module, layers, largest
        self.outputs: dict[str, Tally] = defaultdict(Tally)
        self.noise: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.seen: dict[str, Inputs] = {}
        self.positions: dict[str, int] = {}

    def add(self, args: tuple[Any, ...]) -> None:
        """Runs one batch."""
        streams = TwoStreams(self.module, [args])
        exact, rounded = streams.exact[0], streams.rounded[0]
        alone: dict[fx.Node, Any] = {}  # quantized values on float inputs, also after moves

        def visit(node: fx.Node) -> None:
            called = streams.called(node)
            if isinstance(called, FakeQuant):
                alone[node] = rounded[node] if called.of_weight else called(exact[node])
                if not called.of_weight:
                    linear = any(kind_of(n).name == "linear" for n in node.users)
                    axis = -1 if linear else 1
                    new = Inputs(called, axis, self.largest[called])
                    self.seen.setdefault(str(node.target), new).add(exact[node])
            elif node in self.layers:
                y = step(self.module, node, lambda n: alone.get(n, exact[n]))
                self._count(node, exact, (y, rounded[node]))
            elif passes_codes(self.module, node) and node.all_input_nodes[0] in alone:
                alone[node] = step(self.module, node, lambda n: alone.get(n, exact[n]))
            for done in streams.ends[node]:
                alone.pop(done, None)

        streams.walk(visit)

    def _count(self, node: fx.Node, exact: Any, others: tuple[Tensor, Tensor]) -> None:
        """Adds a layer's float output, and its errors alone and together."""
        name, y = self.layers[node], exact[node].double()
        outputs = len(exact[node.args[1]])
        self.positions.setdefault(name, y.numel() // max(1, len(y) * outputs))
        self.outputs[name].add(y)
        for i, other in enumerate(others):
            self.noise[name][i] += float((y - other.double()).square().sum())

    def sqnr(self, name: str) -> tuple[float, float]:
        """The SQNR of a layer alone and together, in dB."""
        alone, together = self.noise[name]
        signal = self.outputs[name].square
        return decibels(signal, alone), decibels(signal, together)

    def mse(self, name: str) -> tuple[float, float]:
        """The mean squared error of a layer's output alone and together."""
        alone, together = self.noise[name]
        count = max(1, self.outputs[name].count)
        return alone / count, together / count
