"""Bias correction: what rounding adds to a layer's output on average is taken off its bias (Nagel
et al., 2019).

b' = b + mean over pictures and places of (y - y^),

y^ with every layer before it rounded and corrected
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.calibration.feed import device_of
from repfx.calibration.streams import TwoStreams
from repfx.data.batches import Batches
from repfx.errors import InputError
from repfx.graph.calls import Layer, layer_of
from repfx.quant import Affine, FakeQuant, quantizers_of

IMAGES = 128  # activations of so many are held at a time


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[Any]) -> tuple[str, ...]:
    """Corrects the biases of a calibrated model in place and names the layers it left alone:
    without a bias of their own.

    `batches`: as `calibrate` takes them; the first 128 images are used. It is the last step: a
    model learned on afterwards would take the corrected biases for those of the float net.

    Raises InputError for a model that is no GraphModule, has several inputs or is not calibrated,
    where there is no image, and for one with NaN or of a shape the model does not take."""
    name = input_of(model)
    assert isinstance(model, fx.GraphModule)
    raw = [path for path, m in quantizers_of(model).items() if not m.calibrated]
    if raw:
        raise InputError(f"{raw[0]} is not calibrated: run repfx.calibrate first")
    inputs: list[tuple[Tensor]] = []
    room, device = IMAGES, device_of(model)
    for batch in Batches(batches, finite=True).first(IMAGES):
        x = batch.of_inputs([name])[0][:room].to(device)
        inputs.append((x,))
        room -= len(x)
    streams = TwoStreams(model, inputs)
    left: list[str] = []

    def visit(node: fx.Node) -> None:
        layer = layer_of(node) if node.op == "call_function" else None
        if layer is not None:
            _correct(streams, layer, left)

    streams.walk(visit)
    return tuple(left)


def input_of(model: nn.Module) -> str:
    """The name of the model's input. Raises InputError for a model whose biases cannot be
    corrected: one of several inputs, or not traced whole.
    """
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    names = [str(n.target) for n in nodes if n.op == "placeholder"]
    if len(names) != 1:
        raise InputError("biases are corrected in a model of one input that was traced whole")
    return names[0]


def _correct(streams: TwoStreams, layer: Layer, left: list[str]) -> None:
    """Corrects the bias of one layer, and what the layer gave on the rounded stream."""
    model, exact, rounded = streams.module, streams.exact, streams.rounded
    node, axis = layer.node, layer.channel_axis
    weight: Any = layer.weight
    bias: Any = layer.bias
    tensor: Tensor | None
    affine = streams.called(weight.args[0]) if weight.op == "call_function" else None
    if isinstance(affine, Affine):
        weight, tensor = (
            weight.args[0].args[0],
            affine.eps,
        )  # what is added to the bias, and to none where there is none
    else:
        tensor = _constant(model, bias)
        shared = [
            n for n in model.graph.nodes if tensor is not None and _constant(model, n) is tensor
        ]
        tensor = None if len(shared) > 1 or (tensor is not None and len(bias.users) > 1) else tensor
    if not isinstance(streams.called(weight), FakeQuant):
        return  # in float
    if tensor is None:
        left.append(str(weight.target).rpartition(".")[0])
        return
    offs = [
        (e[node] - r[node]).movedim(axis, 0).flatten(1) for e, r in zip(exact, rounded, strict=True)
    ]
    off = sum(o.sum(1) for o in offs) / sum(o.shape[1] for o in offs)
    tensor.add_(off)
    for r in rounded:
        y = r[node]
        y += off if axis == -1 else off.reshape(-1, *(1,) * (y.dim() - 2))


def _constant(model: fx.GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that a node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = attrgetter(str(node.target))(model)
    return found if isinstance(found, Tensor) else None
