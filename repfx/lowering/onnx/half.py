"""float16: layers, scales, weights and biases in half precision, as in a strongly typed engine.

The file's inputs and outputs stay float32, with a Cast each. QuantizeLinear divides in float32 and
rounds, as runtimes do."""

from __future__ import annotations

import copy
from operator import attrgetter

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from repfx.capture.model import graphs
from repfx.errors import InputError
from repfx.lowering.onnx.wide import LARGEST, WORST, cast_edges, is_wide, kept, off
from repfx.quant import FakeQuant

OPSET = 19  # the first with QuantizeLinear in float16


def constants(model: nn.Module) -> nn.Module:
    """A float32 copy with constants rounded to float16; quantized weights keep their values.

    Of a quantized weight only the scale is rounded, and nothing of what stays in float32 (`wide`).
    Raises InputError for a part with a graph of its own that has such a number."""
    _check(model)
    model = copy.deepcopy(model)
    coded = set()
    for _, module in graphs(model):
        coded |= {id(getattr(holder, name)) for holder, name in kept(module)}
        for node in module.graph.nodes:
            quant = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(quant, FakeQuant) and quant.of_weight and node.args[0].op == "get_attr":
                coded.add(id(attrgetter(str(node.args[0].target))(module)))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in coded:
                to_half(tensor)
    return model


def operators(model: nn.Module) -> nn.Module:
    """A float32 copy in which the output of each operator is rounded to float16.

    Those of operators that stay in float32 are rounded where another operator reads them."""
    model = copy.deepcopy(model)
    for _, module in graphs(model):
        graph = module.graph
        plain = [n for n in graph.nodes if n.op not in ("output", "get_attr") and not is_wide(n)]
        cast_edges(module, FakeQuant, copied_half)
        for node in plain:
            with graph.inserting_before(node.next):
                call = graph.call_function(
                    copied_half if node.op == "placeholder" else to_half, (node,)
                )
            node.replace_all_uses_with(call, delete_user_cb=lambda user, c=call: user is not c)
        module.recompile()
    return model


def to_half(value: object) -> object:
    """Rounds float32 tensors to float16 values in place, so that views stay views.

    An expanded tensor stays unchanged: its values were rounded before it was expanded."""

    def rounded(t: Tensor) -> Tensor:
        return t if t.dtype != torch.float32 or 0 in t.stride() else t.copy_(t.half())

    return tree_map_only(Tensor, rounded, value)


def copied_half(value: object) -> object:
    return tree_map_only(
        Tensor, lambda t: t.half().float() if t.dtype == torch.float32 else t, value
    )


def in_half(model: nn.Module) -> nn.Module:
    """Converts the model to float16 in place, the constants of its graphs included.

    What float16 cannot hold stays in float32 (`wide`)."""
    held = [
        (holder, name, getattr(holder, name))
        for _, module in graphs(model)
        for holder, name in kept(module)
    ]
    held = [
        (holder, name, value.detach().clone())
        for holder, name, value in held
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    model = model.half()
    for _, module in graphs(model):
        for node in module.graph.nodes:
            if node.op == "get_attr":
                parent, _, name = str(node.target).rpartition(".")
                value = getattr(holder := module.get_submodule(parent), name)
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    setattr(holder, name, value.half())
    for holder, name, value in held:
        old = getattr(holder, name)
        again = nn.Parameter(value, False) if isinstance(old, nn.Parameter) else value
        setattr(holder, name, again)
    return model


def _check(model: nn.Module) -> None:
    """Raises InputError for a number in a part of the model that float16 does not hold."""
    for path, part in graphs(model):
        if not path:  # the whole model: there `wide` marks what stays in float32
            continue
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            large = tensor.is_floating_point() and tensor.numel()
            if large and float(tensor.detach().abs().max()) > LARGEST:
                raise InputError(
                    f"{path}.{name} holds values beyond float16's {LARGEST:g}: lower the model in "
                    "float32"
                )
        for name, quant in part.named_modules():
            if isinstance(quant, FakeQuant) and (error := off(quant)) > WORST:
                small = float(quant.step.detach().min())
                raise InputError(
                    f"a scale of {path}.{name}, {small:.2g}, is {error:.1%} off in float16: lower "
                    "the model in float32"
                )


def cast_ends(proto: onnx.ModelProto) -> None:
    """Makes the file's float16 inputs and outputs float32, with a Cast beside each."""
    graph = proto.graph
    for info in graph.input:
        if info.type.tensor_type.elem_type == TensorProto.FLOAT16:
            inner = f"{info.name}.float16"
            for node in graph.node:
                for i, name in enumerate(node.input):
                    if name == info.name:
                        node.input[i] = inner
            graph.node.insert(
                0, helper.make_node("Cast", [info.name], [inner], to=TensorProto.FLOAT16)
            )
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for info in graph.output:
        if info.type.tensor_type.elem_type == TensorProto.FLOAT16:
            inner = f"{info.name}.float16"
            for node in graph.node:
                for names in (node.input, node.output):
                    for i, name in enumerate(names):
                        if name == info.name:
                            names[i] = inner
            graph.node.append(helper.make_node("Cast", [inner], [info.name], to=TensorProto.FLOAT))
            info.type.tensor_type.elem_type = TensorProto.FLOAT
