"""sensitivity: which layers quantization hurts most, by the output error (QARepVGG, Fig. 6).

alone      only this layer quantized                 together    this layer and all before it
SQNR = 10 log10( sum y^2 / sum (y^ - y)^2 )  in dB: lower is worse
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import track
from rich.table import Table
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from repfx.calibration.biases import weight_quantizer
from repfx.calibration.feed import feed
from repfx.capture.model import graphs
from repfx.data.batches import Batch, Batches
from repfx.data.share import Share
from repfx.errors import InputError
from repfx.graph.view import GraphView
from repfx.processes import agreed, gathered
from repfx.quant import FakeQuant, in_eval, in_float, quantizers_of


@dataclass(frozen=True)
class LayerError:
    """The SQNR of the model's output, in dB, with one layer quantized and with all up to it."""

    layer: str
    alone: float
    together: float


@dataclass(frozen=True)
class Sensitivity:
    """The errors of all layers, in the order in which they run. Prints as a table."""

    rows: tuple[LayerError, ...]

    def worst(self, count: int) -> tuple[str, ...]:
        """The `count` layers that hurt most alone, for `repfx.passes.Ptq(bits=6, wide=...)`."""
        if not 0 <= count <= len(self.rows):
            raise InputError(
                f"count is between 0 and {len(self.rows)}, the number of layers, not {count}"
            )
        return tuple(r.layer for r in sorted(self.rows, key=lambda r: r.alone)[:count])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("layer", title="SQNR of the output, dB")
        for name in ("alone", "with all before"):
            table.add_column(name, justify="right")
        for r in self.rows:
            table.add_row(r.layer, f"{r.alone:.1f}", f"{r.together:.1f}")
        yield table


@torch.no_grad()
def sensitivity(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> Sensitivity:
    """Measures the output error of every quantized layer of a calibrated model.

    A quantizer that several layers read counts for each of them. This takes 2 forwards per layer
    and batch; the model does not change. `batches`: as for `calibrate`, also with several
    processes; they stay in memory, so give only a few. Raises InputError for a model without
    quantizers or with one that is not calibrated, if there is no image, and for a batch that the
    model does not take or that gives NaN."""
    quants = quantizers_of(model)
    raw = [name for name, m in quants.items() if m.missing]
    if not quants or raw:
        raise InputError(
            f"{raw[0]} is not calibrated"
            if raw
            else "the model has no quantizers: run the pass ptq first"
        )
    rows: list[LayerError] = []
    with in_eval(model):
        with agreed():
            share = Share(Batches(batches))
            inputs = [batch for _, batch in share]
            order = _in_order(model, list(quants), inputs[0]) if inputs else []
            truth = _outputs(model, inputs, on=())
            if not all(bool(torch.isfinite(t).all()) for t in truth):
                raise InputError(
                    "the model gives NaN or infinity on a batch: check the batches and the model"
                )
        share.check()
        groups = _groups(model, quants, gathered(order)[0])
        before: set[FakeQuant] = set()
        for layer, own in track(groups.items(), "measuring", disable=not progress):
            before |= set(own)
            errors = (_sqnr(truth, _outputs(model, inputs, on)) for on in (own, before))
            rows.append(LayerError(layer, *errors))
    return Sensitivity(tuple(rows))


def _groups(
    model: nn.Module, quants: dict[str, FakeQuant], order: list[str]
) -> dict[str, list[FakeQuant]]:
    """The quantizers of each layer, in running order; others go with the layer before them.

    Those before the first layer go with it."""
    groups: dict[str, list[FakeQuant]] = {}
    layers = {name.rpartition(".")[0] for name, m in quants.items() if m.of_weight}
    readers = _readers(model)
    first = next((n.rpartition(".")[0] for n in order if n.rpartition(".")[0] in layers), None)
    for name in order:
        layer = name.rpartition(".")[0]
        if layer not in layers:
            layer = next(reversed(groups), first or layer)
        groups.setdefault(layer, [])
        for reader in readers.get(name, [layer]):
            groups.setdefault(reader, []).append(quants[name])
    return {layer: own for layer, own in groups.items() if own}


def _readers(model: nn.Module) -> dict[str, list[str]]:
    """The layers that read each quantizer of activations, if there are any."""
    found: dict[str, list[str]] = {}
    for path, graph in graphs(model):
        view, prefix = GraphView(graph), f"{path}." if path else ""
        for node in view.nodes:
            own = view.layer(node)
            weight = None if own is None else weight_quantizer(view, own)
            if weight is None:
                continue
            layer = f"{prefix}{weight.target}".rpartition(".")[0]
            for quant in _behind(view, [n for n in node.all_input_nodes if n is not weight]):
                readers = found.setdefault(f"{prefix}{quant.target}", [])
                readers.extend([] if layer in readers else [layer])
    return found


def _behind(view: GraphView, nodes: list[fx.Node]) -> list[fx.Node]:
    """The quantizers whose values reach these nodes without passing a layer or a quantizer."""
    found, seen, todo = list[fx.Node](), set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if view.quantizer(node):
            found.append(node)
        elif view.layer(node) is None:
            todo += node.all_input_nodes
    return found


def _in_order(model: nn.Module, names: list[str], batch: Batch) -> list[str]:
    """The quantizers in the order in which they run."""
    seen: dict[str, None] = {}
    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(lambda *_, n=n: seen.setdefault(n)) for n in names]
    try:
        feed(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen)


def _outputs(model: nn.Module, batches: Iterable[Batch], on: Collection[FakeQuant]) -> list[Tensor]:
    """The flattened output for each batch, with these quantizers on and all others off."""
    others = [quant for quant in quantizers_of(model).values() if quant not in on]
    with in_float(others):
        found = [tree_leaves(feed(model, batch)) for batch in batches]
    return [
        torch.cat([t.flatten().double() for t in leaves if isinstance(t, Tensor)])
        for leaves in found
    ]


def _sqnr(truth: list[Tensor], found: list[Tensor]) -> float:
    sums = [
        (float(t.square().sum()), float((t - y).square().sum()))
        for t, y in zip(truth, found, strict=True)
    ]
    signal, noise = (sum(p) for p in zip(*(p for ps in gathered(sums) for p in ps), strict=True))
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
