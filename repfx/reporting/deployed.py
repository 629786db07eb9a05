"""What the layers of the deployed net do on data: their inputs, their outputs and their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.progress import track
from torch import fx

from repfx.capture.running import run_eval
from repfx.data.batches import Batch
from repfx.graph.calls import layer_of
from repfx.graph.moves import passes_codes
from repfx.quant import FakeQuant, Observer, in_float, observing, quantizers_of
from repfx.reporting.numbers import Layer
from repfx.reporting.pairs import Pairs


def on_data(
    deployed: fx.GraphModule, layers: Sequence[Layer], batches: Sequence[Batch], progress: bool
) -> Iterator[Layer]:
    """The layers with everything that data tells; those that are not quantized as they are."""
    calls, inputs = _calls(deployed)
    pairs = Pairs(deployed, calls, _largest(deployed, batches))
    for batch in track(batches, "measuring", disable=not progress):
        pairs.add((batch.tensor,))
    for layer in layers:
        if layer.name not in calls.values():
            yield layer
            continue
        alone, together = pairs.sqnr(layer.name)
        mse_alone, mse_together = pairs.mse(layer.name)
        seen = pairs.seen.get(inputs.get(layer.name, ""))
        yield replace(
            layer,
            macs=float(pairs.positions[layer.name] * layer.params),
            alone=alone,
            together=together,
            mse_alone=mse_alone,
            mse_together=mse_together,
            output=pairs.outputs[layer.name].spread(),
            input=None if seen is None else seen.activation(),
        )


def _calls(deployed: fx.GraphModule) -> tuple[dict[fx.Node, str], dict[str, str]]:
    """The name of the layer that each node calls, and the quantizer of each layer's input."""
    calls: dict[fx.Node, str] = {}
    inputs: dict[str, str] = {}
    for node in deployed.graph.nodes:
        quantized = layer_of(node) if node.op == "call_function" else None
        if quantized is not None and _quantizer(deployed, quantized.weight):
            assert isinstance(quantized.weight, fx.Node)
            name = str(quantized.weight.target).rpartition(".")[0]
            calls[node] = name
            source = quantized.x
            while passes_codes(deployed, source):
                source = source.all_input_nodes[0]
            if _quantizer(deployed, source):
                inputs[name] = str(source.target)
    return calls, inputs


def _largest(deployed: fx.GraphModule, batches: Sequence[Batch]) -> dict[FakeQuant, float]:
    """The largest magnitude that each activation quantizer sees in the float net."""
    quants = quantizers_of(deployed, of_weight=False).values()
    with (
        in_float(quantizers_of(deployed, of_weight=True).values()),
        observing(quants, lambda quant: Observer(quant.grid, histogram=False)) as seen,
    ):
        for batch in batches:
            run_eval(deployed, (batch.tensor,))
    return {quant: observer.amax for quant, observer in seen.items()}


def _quantizer(module: fx.GraphModule, node: Any) -> bool:
    called = isinstance(node, fx.Node) and node.op == "call_module"
    return called and isinstance(module.get_submodule(str(node.target)), FakeQuant)
