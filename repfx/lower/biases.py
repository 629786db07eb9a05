"""Biases as ONNX Runtime's integer convolutions have them: 32-bit integers whose step is that of the products.

    round(b / (s_x s_w)) s_x s_w

It rounds the biases of a file to this itself, wherever they are float. Written so from the start, what it runs is what the
file says and what the torch model, with the same biases, is compared with.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.algebra import CONVS
from repfx.graph.capture import graphs
from repfx.graph.view import GraphView
from repfx.quant import FakeQuant
from repfx.rewrite.moves import moves


class IntegerBias(nn.Module):
    """codes * scale, both (channels,)."""

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
    """The same in ONNX."""

    def forward(self) -> Tensor:
        inputs, shape = (self.codes, self.scale), self.codes.shape
        return torch.onnx.ops.symbolic("DequantizeLinear", inputs, {"axis": 0}, dtype=self.scale.dtype, shape=shape)


def with_integer_biases(model: nn.Module) -> nn.Module:
    """A copy whose quantized convolutions have such biases. One that 32 bits do not hold stays in float."""
    model = copy.deepcopy(model)
    for _, module in graphs(model):
        view = GraphView(module)
        for node in view.nodes:
            bias = node.args[2] if node.target in CONVS.values() and len(node.args) > 2 else None
            if isinstance(bias, fx.Node) and bias.op == "get_attr":
                made = _of(view, node, view.tensor(str(bias.target)))
                if made is not None:
                    name = f"{node.name}_integer_bias"
                    module.add_submodule(name, made)
                    with module.graph.inserting_before(node):
                        node.replace_input_with(bias, module.graph.call_module(name))
        module.recompile()
    return model


def _of(view: GraphView, node: fx.Node, bias: Tensor) -> IntegerBias | None:
    x, weight = _quantizer(view, node.args[0]), _quantizer(view, node.args[1])
    if x is None or weight is None or not weight.of_weight:
        return None
    scale = (x.step * weight.step).detach().float().expand(bias.shape).clone()
    codes = torch.round(bias.detach() / scale)
    if not bool((codes.abs() < 2**31).all()):
        return None
    return IntegerBias(codes.to(torch.int32), scale)


def _quantizer(view: GraphView, value: Any) -> FakeQuant | None:
    """The quantizer of a value, perhaps before it was moved."""
    while isinstance(value, fx.Node):
        module = view.modules.get(str(value.target)) if value.op == "call_module" else None
        if isinstance(module, FakeQuant):
            return module
        inputs = view.data_inputs(value)
        if len(inputs) != 1 or not moves(view, value):
            return None
        (value,) = inputs
    return None
