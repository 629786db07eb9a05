"""float16: layers, scales, weights and biases in half precision, as in a strongly typed engine.

The file's inputs and outputs stay float32, with a Cast each. QuantizeLinear divides in float32 and
rounds, as runtimes do."""

from __future__ import annotations

import copy
import math
from operator import attrgetter

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from repfx.capture.model import graphs
from repfx.errors import InputError
from repfx.graph.run_node import Interpreter
from repfx.quant import FakeQuant

OPSET = 19  # the first with QuantizeLinear in float16
# The largest relative error of a scale in float16: half a step at the end of an 8-bit grid.
WORST = 2**-8


def constants(model: nn.Module) -> nn.Module:
    """A float32 copy with constants rounded to float16; quantized weights keep their values.

    Of a quantized weight only the scale is rounded. Raises InputError where a constant is too large
    for float16 or a scale is too small."""
    _check(model)
    model = copy.deepcopy(model)
    coded = set()
    for _, module in graphs(model):
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
    """A float32 copy in which the output of each operator is rounded to float16."""
    model = copy.deepcopy(model)
    for _, module in graphs(model):
        graph = module.graph
        for node in list(graph.nodes):
            if node.op in ("output", "get_attr"):
                continue
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


def check_range(model: nn.Module, args: tuple[object, ...]) -> None:
    """Raises InputError naming the first operator whose result on this input overflows float16."""
    largest = torch.finfo(torch.float16).max
    beyond: list[str] = []

    class Halves(Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if (
                isinstance(result, Tensor)
                and result.is_floating_point()
                and result.numel()
                and n.op.startswith("call")
            ):
                top = float(result.abs().max())
                if math.isfinite(top) and top > largest:
                    beyond.append(f"{n.name} reaches {top:.3g}")
            return result

    if isinstance(model, fx.GraphModule):
        with torch.no_grad():
            Halves(model).run(*args)
    if beyond:
        raise InputError(
            f"{beyond[0]}, but float16 ends at {largest:g}: lower the model in float32"
        )


def copied_half(value: object) -> object:
    return tree_map_only(
        Tensor, lambda t: t.half().float() if t.dtype == torch.float32 else t, value
    )


def in_half(model: nn.Module) -> nn.Module:
    """Converts the model to float16 in place, the constants of its graphs included."""
    model = model.half()
    for _, module in graphs(model):
        for node in module.graph.nodes:
            if node.op == "get_attr":
                parent, _, name = str(node.target).rpartition(".")
                value = getattr(holder := module.get_submodule(parent), name)
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    setattr(holder, name, value.half())
    return model


def _check(model: nn.Module) -> None:
    largest = torch.finfo(torch.float16).max
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and float(tensor.detach().abs().max()) > largest
        ):
            raise InputError(
                f"{name} holds values beyond float16's {largest:g}: lower the model in float32"
            )
    for name, quant in model.named_modules():
        if not isinstance(quant, FakeQuant):
            continue
        step = quant.step.detach().float()
        off = float(((step.half().float() - step) / step).abs().max())
        if off > WORST:
            small = float(step.min())
            raise InputError(
                f"a scale of {name}, {small:.2g}, is {off:.1%} off in float16: lower the "
                "model in float32"
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
