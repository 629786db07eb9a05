"""Bias correction: removes the mean error of quantization from each bias (Nagel et al., 2019).

b' = b + mean over images and positions of (y - y^)

y^ is computed with every layer before it quantized and corrected.
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

IMAGES = 128  # how many images are used; their activations are in memory at the same time


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[Any]) -> tuple[str, ...]:
    """Corrects the biases of a calibrated model in place.

    Returns the names of the layers that it did not correct, because they have no bias of their
    own. `batches`: as for `calibrate`; the first 128 images are used. Make this the last step: if
    you train or reconstruct the model afterwards, the corrected biases count as those of the float
    net.

    Raises InputError if the model is not a GraphModule, has several inputs or is not calibrated,
    if there is no image, and for an image with NaN or of a shape that the model does not take."""
    name = input_of(model)
    assert isinstance(model, fx.GraphModule)
    raw = [path for path, m in quantizers_of(model).items() if m.missing]
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
        weight = None if layer is None else weight_quantizer(view, layer)
        if layer is None or weight is None:
            return  # not a layer, or one that stays in float
        bias = _own_bias(view, layer)
        if bias is None:
            left.append(str(weight.target).rpartition(".")[0])
        else:
            _correct(streams, layer, bias)

    streams.walk(visit)
    return tuple(left)


def input_of(model: nn.Module) -> str:
    """The name of the model's input.

    Raises InputError if the biases cannot be corrected, because the model has several inputs or
    was not traced as a whole.
    """
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    names = [str(n.target) for n in nodes if n.op == "placeholder"]
    if len(names) != 1:
        raise InputError(
            "biases can be corrected only in a model with one input that was traced whole"
        )
    return names[0]


def weight_quantizer(view: GraphView, layer: Layer) -> fx.Node | None:
    """The call that quantizes the layer's weight, before any affine."""
    affine = _affine(view, layer)
    weight = layer.weight if affine is None else affine.args[0]
    return weight if isinstance(weight, fx.Node) and view.quantizer(weight) else None


def _affine(view: GraphView, layer: Layer) -> fx.Node | None:
    """The call of the `Affine` that computes the layer's weight and bias, if there is one."""
    weight = layer.weight
    if not isinstance(weight, fx.Node) or weight.op != "call_function":
        return None
    source = weight.args[0] if weight.args else None
    given = isinstance(source, fx.Node) and isinstance(view.module_of(source), Affine)
    return source if given and isinstance(source, fx.Node) else None


def _own_bias(view: GraphView, layer: Layer) -> Tensor | None:
    """The tensor that the layer adds, if nothing else reads it: its bias, or that of its affine."""
    affine = _affine(view, layer)
    if affine is not None:
        module = view.module_of(affine)
        assert isinstance(module, Affine)
        return module.eps  # the affine adds it to the layer's bias, if there is one
    tensor = _constant(view.module, layer.bias)
    if tensor is None or not isinstance(layer.bias, fx.Node) or len(layer.bias.users) > 1:
        return None
    reads = [n for n in view.nodes if _constant(view.module, n) is tensor]
    return tensor if len(reads) == 1 else None


def _correct(streams: TwoStreams, layer: Layer, bias: Tensor) -> None:
    """Removes the layer's mean error from its bias and from its output on the rounded stream."""
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
