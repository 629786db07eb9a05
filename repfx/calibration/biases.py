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
from repfx.graph.calls import Layer
from repfx.graph.view import GraphView
from repfx.quant import Affine, quantizers_of

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
    streams, view, left = TwoStreams(model, inputs), GraphView(model), list[str]()

    def visit(node: fx.Node) -> None:
        layer = view.layer(node)
        weight = None if layer is None else _weight_quantizer(view, layer)
        if layer is None or weight is None:
            return  # in float
        bias = _own_bias(view, layer)
        if bias is None:
            left.append(str(weight.target).rpartition(".")[0])
        else:
            _correct(streams, layer, bias)

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


def _weight_quantizer(view: GraphView, layer: Layer) -> fx.Node | None:
    """The call that rounds the layer's weight, before an affine where there is one."""
    affine = _affine(view, layer)
    weight = layer.weight if affine is None else affine.args[0]
    return weight if isinstance(weight, fx.Node) and view.quantizer(weight) else None


def _affine(view: GraphView, layer: Layer) -> fx.Node | None:
    """The call of the `Affine` that gives the layer its weight and bias."""
    weight = layer.weight
    if not isinstance(weight, fx.Node) or weight.op != "call_function":
        return None
    source = weight.args[0] if weight.args else None
    given = isinstance(source, fx.Node) and isinstance(view.module_of(source), Affine)
    return source if given and isinstance(source, fx.Node) else None


def _own_bias(view: GraphView, layer: Layer) -> Tensor | None:
    """What the layer adds, where no other reads it: what an affine adds, else its bias."""
    affine = _affine(view, layer)
    if affine is not None:
        module = view.module_of(affine)
        assert isinstance(module, Affine)
        return module.eps  # added to the bias, and to none where there is none
    tensor = _constant(view.module, layer.bias)
    if tensor is None or not isinstance(layer.bias, fx.Node) or len(layer.bias.users) > 1:
        return None
    reads = [n for n in view.nodes if _constant(view.module, n) is tensor]
    return tensor if len(reads) == 1 else None


def _correct(streams: TwoStreams, layer: Layer, bias: Tensor) -> None:
    """Takes the layer's mean error off its bias, and off what it gave on the rounded stream."""
    node, axis = layer.node, layer.channel_axis
    offs = [
        (e[node] - r[node]).movedim(axis, 0).flatten(1)
        for e, r in zip(streams.exact, streams.rounded, strict=True)
    ]
    off = sum(o.sum(1) for o in offs) / sum(o.shape[1] for o in offs)
    bias.add_(off)
    for values in streams.rounded:
        y = values[node]
        y += off if axis == -1 else off.reshape(-1, *(1,) * (y.dim() - 2))


def _constant(model: fx.GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that a node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = attrgetter(str(node.target))(model)
    return found if isinstance(found, Tensor) else None
