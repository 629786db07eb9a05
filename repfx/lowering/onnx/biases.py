"""Integer biases, as ONNX Runtime's integer layers use them.

    round(b / (s_x s_w)) s_x s_w

They are 32-bit integers whose step is the product of the steps of the input and the weight. ONNX
Runtime rounds float biases to these integers anyway. Where they are written as integers from the
start, the runtime runs what the file says, and the torch model it is compared with has the same
biases. Those of linear layers are written as the floats that these integers stand for: a linear
layer of tokens is a product and a sum in the file, which the runtime fuses for a constant only."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from repfx.capture.model import graphs
from repfx.graph.moves import moves, passes_codes
from repfx.graph.view import GraphView
from repfx.quant import FakeQuant


class IntegerBias(nn.Module):
    """The bias codes * scale, both (channels,)."""

    is_graph_leaf = True
    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        return self.codes * self.scale


class WrittenBias(IntegerBias):
    """The same as a DequantizeLinear in ONNX."""

    def forward(self) -> Tensor:
        inputs, shape = (self.codes, self.scale), self.codes.shape
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", inputs, {"axis": 0}, dtype=self.scale.dtype, shape=shape
        )


class RoundedBias(nn.Module):
    """The floats that such integers stand for."""

    is_graph_leaf = True
    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        return self.value


def with_integer_biases(model: nn.Module) -> nn.Module:
    """A copy whose quantized layers have integer biases, and steps large enough for them.

    Where a channel's weights are tiny next to its bias, the step of its weights is made larger,
    because a 32-bit code reaches only 2^31 times the product of the two steps. A channel of zeros
    takes the smallest step of its layer."""
    model = copy.deepcopy(model)
    for _, module in graphs(model):
        view = GraphView(module)
        found = [(node, *parts) for node in view.nodes if (parts := _parts(view, node)) is not None]
        for _, x, weight, bias, codes in found:
            weight.set_scale(_large_enough(x.step, weight.step, bias, codes))
        for node, x, weight, bias, _ in found:
            scale = (x.step * weight.step).detach().expand(bias.shape).clone()
            name = f"{node.name}_integer_bias"
            layer = view.layer(node)
            assert layer is not None and isinstance(layer.bias, fx.Node)
            made = IntegerBias(torch.round(bias / scale).to(torch.int32), scale)
            written = made if layer.kind.name == "conv" else RoundedBias(made().detach())
            module.add_submodule(name, written)
            with module.graph.inserting_before(node):
                node.replace_input_with(layer.bias, module.graph.call_module(name))
        module.recompile()
    return model


def _parts(view: GraphView, node: fx.Node) -> tuple[FakeQuant, FakeQuant, Tensor, Tensor] | None:
    """The parts of a quantized layer with a bias; None for any other node.

    The quantizers of its input and of its weight, the bias, and the weight's codes."""
    layer = view.layer(node)
    if layer is None or layer.kind.name not in ("conv", "linear"):
        return None
    given, coded, bias = (
        a if isinstance(a, fx.Node) else None for a in (layer.x, layer.weight, layer.bias)
    )
    x, weight = _quantizer(view, given), _quantizer(view, coded)
    held = coded.all_input_nodes[0] if coded is not None and coded.all_input_nodes else None
    if x is None or weight is None or not weight.of_weight or held is None or bias is None:
        return None
    if held.op != "get_attr" or bias.op != "get_attr":
        return None
    codes = weight.codes(view.tensor(str(held.target))).detach()
    return x, weight, view.tensor(str(bias.target)).detach(), codes


def _large_enough(x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor) -> Tensor:
    used = codes.flatten(1).abs().amax(1) > 0
    most = 2**31 - 1 - 2**15 * codes[0].numel()  # leave room for the sum of the products
    least = bias.abs().double() / (x.double() * most)
    steps = weight.double().expand(bias.shape)
    zeros = steps[used].min() if bool(used.any()) else steps.min()
    steps = torch.where(used, steps, zeros) if weight.dim() else steps
    steps = torch.maximum(steps, least)
    return (steps if weight.dim() else steps.max()).to(weight)


def _quantizer(view: GraphView, value: fx.Node | None) -> FakeQuant | None:
    """The quantizer of a value, past moves, pads and max pools, which runtimes do on its integers.

    None where there is none."""
    while value is not None:
        module = view.modules.get(str(value.target)) if value.op == "call_module" else None
        if isinstance(module, FakeQuant):
            return module
        inputs = view.data_inputs(value)
        if len(inputs) != 1 or not (moves(view, value) or passes_codes(view.module, value)):
            return None
        (value,) = inputs
    return None
