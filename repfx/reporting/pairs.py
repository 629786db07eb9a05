"""One walk through a quantized graph on two streams, float and quantized, for the error of every
layer (QARepVGG, Fig. 6).

float       y  = f(x)                     alone     y1 = Q(f)(x)   a layer rounded, on float inputs
together    y^ = Q(f)(x^)                 SQNR = 10 log10( sum y^2 / sum (y - y.)^2 )
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from repfx.capture.running import quiet
from repfx.graph.moves import passes_codes
from repfx.graph.run_node import last_readers, step
from repfx.quant import FakeQuant
from repfx.reporting.numbers import Activation, Spread

SHOWN = 101  # quantiles of a distribution


class Pairs:
    """Sums over batches. `layers`: the calls of quantized layers, by the name they are known by."""

    def __init__(self, module: fx.GraphModule, layers: dict[fx.Node, str]) -> None:
        self.module, self.layers = module, layers
        self.ends = last_readers(module.graph)
        self.signal: dict[str, float] = defaultdict(float)
        self.noise: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.seen: dict[str, Seen] = {}
        self.positions: dict[str, int] = {}

    @torch.no_grad()
    def add(self, args: tuple[Any, ...]) -> Any:
        """Runs one batch; the float output."""
        rounded, exact, given = {}, {}, iter(args)
        alone: dict[fx.Node, Any] = {}
        with quiet():
            for node in self.module.graph.nodes:
                if node.op == "placeholder":
                    x: Any = next(given, node.args[0] if node.args else None)
                    exact[node], rounded[node] = x, x.clone() if isinstance(x, Tensor) else x
                elif node.op == "output":
                    return fx.node.map_arg(node.args[0], exact.__getitem__)
                else:
                    self._step(node, exact, rounded, alone)
                for done in self.ends[node]:
                    for values in (exact, rounded, alone):
                        values.pop(done, None)
        return None

    def _step(self, node: fx.Node, exact: Any, rounded: Any, alone: Any) -> None:
        called = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, FakeQuant):
            source = node.all_input_nodes[0]
            exact[node] = exact[source]
            rounded[node] = called(rounded[source])
            alone[node] = rounded[node] if called.of_weight else called(exact[source])
            if not called.of_weight:
                axis = -1 if any(n.target is F.linear for n in node.users) else 1
                self.seen.setdefault(str(node.target), Seen(called, axis)).add(exact[source])
            return
        exact[node] = step(self.module, node, exact.__getitem__)
        rounded[node] = (
            exact[node] if node.op == "get_attr" else step(self.module, node, rounded.__getitem__)
        )
        mixed = {
            **{n: exact[n] for n in node.all_input_nodes},
            **{n: alone[n] for n in node.all_input_nodes if n in alone},
        }
        if node in self.layers:
            name, y = self.layers[node], exact[node].double()
            outputs = len(exact[node.args[1]])
            self.positions.setdefault(name, y.numel() // max(1, len(y) * outputs))
            self.signal[name] += float(y.square().sum())
            for i, other in enumerate((step(self.module, node, mixed.__getitem__), rounded[node])):
                self.noise[name][i] += float((y - other.double()).square().sum())
        elif passes_codes(self.module, node) and node.all_input_nodes[0] in alone:
            alone[node] = step(self.module, node, mixed.__getitem__)

    def sqnr(self, name: str) -> tuple[float, float]:
        """Alone and together, in dB."""
        signal = max(self.signal[name], 1e-300)
        a, b = (
            math.inf if noise == 0 else 10 * math.log10(signal / noise)
            for noise in self.noise[name]
        )
        return a, b


class Seen:
    """What a quantizer was given, over batches."""

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
    """Of the largest magnitudes of channels: how many are over half of the largest, and the
    median's share of it.
    """
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
