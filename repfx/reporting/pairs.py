"""The error of every layer, from one walk on a float and a quantized stream (QARepVGG, Fig. 6).

float       y  = f(x)
alone       y1 = Q(f)(x)      the layer quantized, on float inputs
together    y^ = Q(f)(x^)     the layer quantized, on the inputs of the quantized net

SQNR = 10 log10( sum y^2 / sum (y - y')^2 ),   y' = y1 or y^
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from repfx.calibration.streams import TwoStreams
from repfx.graph.moves import passes_codes
from repfx.graph.run_node import step
from repfx.graph.vocabulary import kind_of
from repfx.quant import FakeQuant
from repfx.reporting.numbers import Activation, Spread

SHOWN = 101  # the number of quantiles that a distribution is drawn from


class Pairs:
    """Sums over batches. `layers`: the calls of quantized layers, each with the layer's name."""

    def __init__(self, module: fx.GraphModule, layers: dict[fx.Node, str]) -> None:
        self.module, self.layers = module, layers
        self.signal: dict[str, float] = defaultdict(float)
        self.noise: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.seen: dict[str, Seen] = {}
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
                    self.seen.setdefault(str(node.target), Seen(called, axis)).add(exact[node])
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
        self.signal[name] += float(y.square().sum())
        for i, other in enumerate(others):
            self.noise[name][i] += float((y - other.double()).square().sum())

    def sqnr(self, name: str) -> tuple[float, float]:
        """The SQNR of a layer alone and together, in dB."""
        signal = max(self.signal[name], 1e-300)
        a, b = (
            math.inf if noise == 0 else 10 * math.log10(signal / noise)
            for noise in self.noise[name]
        )
        return a, b


class Seen:
    """Statistics of a quantizer's inputs over all batches."""

    def __init__(self, quant: FakeQuant, axis: int) -> None:
        self.quant, self.axis = quant, axis
        self.count = self.clipped = 0
        self.total = self.square = 0.0
        self.low, self.high = math.inf, -math.inf
        self.codes = torch.zeros(2**16, dtype=torch.bool, device="cpu")
        self.channels: Tensor | None = None
        self.sample: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        grid, flat = self.quant.grid, x.detach().flatten().float()
        self.count += flat.numel()
        self.total, self.square = (
            self.total + float(flat.double().sum()),
            self.square + float(flat.double().square().sum()),
        )
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        codes = self.quant.codes(flat)
        self.codes[codes.to(torch.int64).add_(2**15).unique()] = True
        over = flat / self.quant.step
        self.clipped += int(((over > grid.high + 0.5) | (over < grid.low - 0.5)).sum())
        if x.dim() > 1:
            top = x.abs().movedim(self.axis, 0).flatten(1).amax(1)
            self.channels = (
                top
                if self.channels is None or len(self.channels) != len(top)
                else self.channels.maximum(top)
            )
        self.sample.append(flat[:: max(1, flat.numel() // 4096)])

    def activation(self) -> Activation:
        mean = self.total / max(1, self.count)
        std = math.sqrt(max(0.0, self.square / max(1, self.count) - mean**2))
        values = Spread(self.low, self.high, mean, std, quantiles(torch.cat(self.sample)))
        grid = self.quant.grid
        used = int(self.codes.sum()) / (grid.high - grid.low + 1)
        wide, median = reach(self.channels)
        return Activation(
            values,
            0 if self.channels is None else len(self.channels),
            wide,
            median,
            self.clipped / self.count,
            used,
        )


def reach(top: Tensor | None) -> tuple[int, float]:
    """From each channel's largest magnitude: how many exceed half the largest, the median share."""
    if top is None or not len(top) or float(top.max()) == 0:
        return 0, 0.0
    share = top / top.max()
    return int((share > 0.5).sum()), float(share.median())


def quantiles(values: Tensor) -> tuple[float, ...]:
    ordered = values.detach().flatten().float().sort().values
    at = torch.linspace(0, len(ordered) - 1, min(SHOWN, len(ordered))).round().long()
    return tuple(ordered[at].tolist())


def spread(values: Tensor) -> Spread:
    v = values.detach().float()
    return Spread(
        float(v.min()), float(v.max()), float(v.mean()), float(v.std(correction=0)), quantiles(v)
    )
