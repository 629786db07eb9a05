"""lower: torch -> ONNX Q/DQ.

    FakeQuant of an activation   ->   QuantizeLinear, DequantizeLinear
    FakeQuant of a weight        ->   constant int8 codes, DequantizeLinear along the axis
    bias                         ->   a float constant

With `float16` everything that is not an integer is float16 (`half`). The batch dimension is
dynamic, and with `dynamic` so are height and width (`sizes`). The graph is checked by onnx.checker,
run in ONNX Runtime and compared with the torch model before a file is written."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from repfx.capture.model import capture, graphs
from repfx.capture.running import as_args, describe, run_eval
from repfx.data.preprocessing import Preprocessing
from repfx.errors import CheckError, InputError
from repfx.files.store import write_whole
from repfx.graph.effects import is_dead
from repfx.graph.inputs import noted_preprocessing
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of
from repfx.lowering.onnx import finish, half, older, sizes, wide
from repfx.lowering.onnx.biases import IntegerBias, WrittenBias
from repfx.lowering.onnx.check import How, checked, reference
from repfx.lowering.onnx.exporter import ExportError, export
from repfx.lowering.onnx.parity import Parity
from repfx.lowering.runtimes.run import installed
from repfx.placement.formats import has_offset
from repfx.placement.stored import leave_out
from repfx.quant import FakeQuant, Target, quantizers_of, target_named

OPSET = 20
PREPROCESSING = "repfx.preprocessing"  # the name of its JSON in the metadata of the file


@dataclass(frozen=True)
class Artifact:
    """A written file and how it compares with the model.

    `onnx`: the file. `parity`: how it compares with the torch model on the example in ONNX Runtime.
    `there`: the same in the target's own runtime, where that is a different one and is installed;
    None otherwise. `float32`: the operators of a float16 file that stay in float32, because float16
    does not hold their numbers. `batch`: the number of images that the file takes, where the model
    fixes it; None: any."""

    onnx: Path
    parity: Parity
    there: Parity | None = None
    float32: tuple[str, ...] = ()
    batch: int | None = None


def lower(
    model: nn.Module | torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    example: Any,
    target: str = "tensorrt",
    opset: int = OPSET,
    float16: bool = False,
    dynamic: bool = False,
) -> Artifact:
    """Writes the model as ONNX, runs the file in ONNX Runtime and compares it with the torch model.

    A model without quantizers gives a float file.

    `example`: a tensor (N, ...), a tuple of them, or a dict of them by the names of the arguments,
    without NaN. The first dimension of each is dynamic in the file; where the model computes with
    its size, or cannot be exported so, it is that of the example (`Artifact.batch`). `target`: the
    one the model was quantized for. `float16`: scales, biases and layers that are not quantized are
    float16 in the file. Its inputs and outputs stay float32, and it is compared with the torch
    model rounded to float16 after each operator. `opset`: 13 to 23, with `float16` 19 to 23. From
    21 on, weights of 4 bits or fewer are int4, but not for TensorRT, which multiplies int8 by int8
    only. `dynamic`: the height and width of each input are dynamic too, and larger ones are
    compared as well. How images become inputs, where the model records it, is JSON in the metadata
    `repfx.preprocessing`. Numbers and texts that the model returns are not in the file.

    Raises InputError where quantizers are not calibrated, a format or an operator has no ONNX form,
    the model does not accept the example, the model fixes a size that `dynamic` frees, it returns
    no tensor or something unknown, or the path cannot be written; CheckError where the file is not
    valid or a runtime does not compute what the model computes."""
    form, images = _Form(target, opset, float16, dynamic), noted_preprocessing(model)
    args = _inputs(as_args(example, model) or ())
    bare = float16 and isinstance(model, nn.Module) and next(graphs(model), None) is None
    if bare or isinstance(model, torch.export.ExportedProgram):
        model = capture(model, args).model
    _check_formats(model, target)
    if any(m.optional for m in quantizers_of(model).values()):
        model = copy.deepcopy(model)
        leave_out(model)
    _check_types(model)
    _check_outputs(model, args)
    if float16:
        model = copy.deepcopy(model)
        float32 = wide.mark(model, args)
    else:
        float32 = ()
    model = reference(model, target, float16)
    proto = _export(model, args, form)
    if images is not None:
        _note(proto, images, args)
    _check_valid(proto)
    how = How(float16)
    parity = checked("onnxruntime", model, proto, args, how)
    own = target_named(target).runtime
    # In float16, an optimized ONNX Runtime session rounds where it likes, so it is not compared.
    fair = own in installed() and (own == "openvino" or not float16)
    there = checked(own, model, proto, args, How(float16, deployed=True)) if fair else None
    if dynamic:
        sizes.check(model, args, lambda other: checked("onnxruntime", model, proto, other, how))
    write_whole(path, lambda part: onnx.save(proto, part))
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None
    return Artifact(Path(path), parity, there, float32, batch)


@dataclass(frozen=True)
class _Form:
    """The options of `lower` that shape the file. Raises InputError for an unsupported opset."""

    target: str
    opset: int
    float16: bool
    dynamic: bool

    def __post_init__(self) -> None:
        least = half.OPSET if self.float16 else older.OLDEST
        if not isinstance(self.opset, int) or not least <= self.opset <= 23:
            raise InputError(
                f"opset must be a whole number from {least} to "
                f"23{' with float16' if self.float16 else ''}, not {self.opset!r}"
            )


def _note(proto: onnx.ModelProto, images: Preprocessing, args: tuple[Tensor, ...]) -> None:
    """Writes how images become inputs into the file, with the size that the file takes."""
    if images.size is not None and args and args[0].dim() == 4:
        images = replace(images, size=(args[0].shape[2], args[0].shape[3]))
    onnx.helper.set_model_props(proto, {PREPROCESSING: images.json()})


def _check_valid(proto: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise CheckError(f"the exported graph is not valid ONNX: {error}") from error


def _inputs(example: Any) -> tuple[Tensor, ...]:
    args = example if isinstance(example, tuple) else (example,)
    if not all(isinstance(a, Tensor) and a.dim() > 0 and a.shape[0] > 0 for a in args):
        raise InputError(
            "the example must be a tensor with a batch dimension, or a tuple or dict of them"
        )
    if any(a.isnan().any() for a in args):
        raise InputError("the example holds NaN, so comparing outputs would prove nothing")
    return args


def _check_types(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InputError(
                f"{name} is {tensor.dtype}: lower the model in float32, with float16=True "
                "for a float16 file"
            )


def _check_outputs(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    try:
        result = run_eval(model, args)
    except Exception as error:
        raise InputError(
            f"the model does not accept the example {describe(args)}: {error}"
        ) from error
    leaves = tree_leaves(result)
    for leaf in leaves:
        known = leaf is None or isinstance(leaf, (Tensor, int, float, str))
        if not known or (isinstance(leaf, float) and math.isnan(leaf)):
            raise InputError(
                f"outputs of an ONNX file must be tensors, but the model gives {repr(leaf)[:60]}"
            )
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise InputError(f"the model gives no tensor, but {repr(result)[:60]}")


class _Activation(nn.Module):
    """QuantizeLinear and DequantizeLinear of an activation.

    A note on each QuantizeLinear gives the name that its codes get in the file, one for each call.
    With `offset` a signed grid is written as unsigned codes around 128 (`Target`)."""

    scale: Tensor
    wide: Tensor  # the same in float32, in a float16 file

    def __init__(self, quant: FakeQuant, path: str) -> None:
        super().__init__()
        self.path, self.calls, self.signed = path, 0, quant.grid.signed
        self.register_buffer("scale", quant.step.detach().clone())
        for offset in (False, True):
            dtype = torch.int8 if self.signed and not offset else torch.uint8
            zero = torch.tensor(
                128 if self.signed and offset else 0, dtype=dtype, device=quant.step.device
            )
            self.register_buffer(f"zero_{offset}", zero)

    def forward(self, x: Tensor, offset: bool) -> Tensor:
        name, self.calls = finish.codes_name(self.path, self.calls), self.calls + 1
        zero = self.get_buffer(f"zero_{offset}")
        # In a float16 file, what it reads may be in float32.
        scale = self.scale if x.dtype == self.scale.dtype else self.wide
        inputs, note = (x, scale, zero), {finish.CALL: name}
        q = torch.onnx.ops.symbolic(
            "QuantizeLinear", inputs, dtype=zero.dtype, shape=x.shape, metadata_props=note
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (q, self.scale, zero), dtype=self.scale.dtype, shape=x.shape
        )


class _Weight(nn.Module):
    """A weight as the file holds it: integer codes and a DequantizeLinear."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, quant: FakeQuant, weight: Tensor) -> None:
        super().__init__()
        self.axis = quant.grid.axis
        self.register_buffer("codes", quant.codes(weight.detach()).to(torch.int8))
        self.register_buffer("scale", quant.step.detach().clone())
        self.register_buffer("zero", torch.zeros_like(quant.step, dtype=torch.int8))

    def forward(self) -> Tensor:
        attrs: dict[str, Any] = {} if self.axis is None else {"axis": self.axis}
        inputs = (self.codes, self.scale, self.zero)
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", inputs, attrs, dtype=self.scale.dtype, shape=self.codes.shape
        )


def _check_formats(model: nn.Module, target: str) -> None:
    formats = target_named(target)
    raw, other = [], []
    for name, m in model.named_modules():
        if not isinstance(m, FakeQuant):
            continue
        if m.missing:
            raw.append(name)
        elif not m.calibrated:
            continue
        elif not m.of_weight and m.grid.bits != 8:
            raise InputError(
                f"{name} rounds activations to {m.grid.bits} bits, but integer layers in TensorRT "
                "and the ONNX runtimes take 8. Quantize with ptq(bits=8), or with ptq(bits=8, "
                "weight_bits=4), whose weights have 4 bits. This model still runs "
                "in torch"
            )
        elif m.of_weight and m.grid.bits > 8:
            raise InputError(
                f"{name} rounds weights to {m.grid.bits} bits; int8 constants hold at most 8"
            )
        elif not m.of_weight and not m.grid.signed and not formats.unsigned_after_relu:
            other.append(name)
    if raw:
        raise InputError(
            f"{len(raw)} quantizers are not calibrated ({', '.join(raw[:3])}): run "
            "repfx.calibrate first"
        )
    if other:
        raise InputError(
            f"{other[0]} is unsigned, which {target} does not run: transform the float model "
            f"with target={target!r}"
        )


def _export(model: nn.Module, args: tuple[Any, ...], form: _Form) -> onnx.ModelProto:
    """The ONNX graph of the model, exported from a copy whose quantizers are symbolic."""
    formats = target_named(form.target)
    symbolic = _symbolic(model, formats)
    two = tuple(torch.cat([a, a]) if a.shape[0] == 1 else a for a in args)
    given = tuple(a.cpu().contiguous() for a in two)
    if form.float16:
        half.in_half(symbolic)
        _cast(symbolic)
        given = _in_half(symbolic, given)
    try:
        if any(len(a) == 1 for a in args):  # torch.export takes a size of 1 for fixed
            _check_two(model, two)
        proto = export(symbolic, given, form.opset, "all" if form.dynamic else "batch")
    except ExportError:
        if form.dynamic:
            raise
        given = tuple(new[: len(a)] for new, a in zip(given, args, strict=True))
        proto = export(symbolic, given, form.opset, "none")
    finish.round_once(proto)
    finish.exact_averages(proto)
    if formats.runtime == "openvino":
        finish.wider_kernels(proto, gathering=formats.reduced)
        if not form.float16:
            finish.kept_scales(proto)
    if formats.between == "all":
        finish.keep_in_float(proto, every=form.float16)
    if form.float16:
        half.cast_ends(proto)
        finish.widen(proto)
    if form.opset >= 21 and formats.runtime != "tensorrt":  # TensorRT multiplies int8 by int8
        quants = {
            n: m for n, m in model.named_modules() if isinstance(m, FakeQuant) and m.of_weight
        }
        finish.narrow(proto, {n for n, m in quants.items() if m.grid.bits <= 4})
    return proto


def _check_two(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    try:
        run_eval(model, args)
    except Exception as error:
        raise ExportError(f"the model takes batches of one size only: {error}") from error


def _in_half(model: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs in float16, but for those that it does not hold."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    stays = [wide.is_wide(n) for n in nodes if n.op == "placeholder"] or [False] * len(given)
    return tuple(
        a.half() if a.dtype == torch.float32 and not kept else a
        for a, kept in zip(given, stays, strict=False)
    )


def _cast(model: nn.Module) -> None:
    """Puts casts around what stays in float32 in a model in float16."""
    for _, module in graphs(model):
        wide.cast_edges(module, _Activation, wide.to_float16, wide.to_float)
        module.recompile()
    for layer in model.modules():
        if isinstance(layer, _Activation):
            layer.register_buffer("wide", layer.scale.float())


def _symbolic(model: nn.Module, formats: Target) -> nn.Module:
    """A copy in eval mode on the CPU, with ONNX operators in place of its quantizers."""
    # Contiguous, because the exporter writes views of channels-last tensors as Gathers over
    # computed indices.
    copied: Any = copy.deepcopy(model).eval().cpu()
    symbolic: nn.Module = copied.to(memory_format=torch.contiguous_format)
    rounding = [
        (n, m) for n, m in symbolic.named_modules() if isinstance(m, FakeQuant) and not m.of_weight
    ]
    activations = {id(m): _Activation(m, n) for n, m in rounding}
    for _, module in graphs(symbolic):
        _make_symbolic(module, activations, formats)

    def count_anew(*_: Any) -> None:
        for quantizer in activations.values():
            quantizer.calls = 0

    # The exporter may run the model more than once.
    symbolic.register_forward_pre_hook(count_anew)
    return symbolic


def _make_symbolic(
    module: fx.GraphModule, activations: dict[int, _Activation], target: Target
) -> None:
    graph, view = module.graph, GraphView(module)
    quants = {
        n: q for n in graph.nodes if isinstance(q := view.modules.get(str(n.target)), FakeQuant)
    }
    around = {
        n for n, q in quants.items() if not q.of_weight and has_offset(n, q.grid, view, target)
    }
    for node in list(graph.nodes):
        if target.between == "all" and kind_of(node).name == "linear":
            _split_bias(graph, node)
        if isinstance(bias := view.modules.get(str(node.target)), IntegerBias):
            module.add_submodule(str(node.target), WrittenBias(bias.codes, bias.scale))
        quant = quants.get(node)
        if quant is None:
            continue
        path = str(node.target)
        parent, _, name = path.rpartition(".")
        holder = module.get_submodule(parent)
        if quant.of_weight:
            holder._modules[name] = written = _Weight(quant, _constant(module, node.args[0], path))
            _check_reach(written.codes, node, path, target)
            node.args = ()
        else:
            holder._modules[name] = activations[id(quant)]
            node.args = (node.args[0], node in around)
    for node in reversed(graph.nodes):  # fx's own elimination removes in-place writes as dead
        if is_dead(node):
            graph.erase_node(node)
    module.recompile()


def _check_reach(codes: Tensor, node: fx.Node, path: str, target: Target) -> None:
    """Raises InputError where weights for another target would overflow on CPUs without VNNI."""
    most = target.weight().high
    groups = {u.args[6] for u in node.users if len(u.args) > 6}
    depthwise = (
        codes.dim() in (3, 4)
        and codes.shape[1] == 1 < codes.shape[0]
        and groups == {codes.shape[0]}
    )
    if not depthwise and codes.numel() and int(codes.abs().max()) > most:
        raise InputError(
            f"{path} has codes beyond {most}, whose products overflow on CPUs without VNNI: "
            f"transform the model with target={target.name!r}, or lower it with "
            f"target='{target.name}-vnni'"
        )


def _split_bias(graph: fx.Graph, node: fx.Node) -> None:
    """Adds a linear layer's bias after it: ONNX Runtime has no integer Gemm with a float bias."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if isinstance(bias, fx.Node):
        node.args, node.kwargs = (
            node.args[:2],
            {k: v for k, v in node.kwargs.items() if k != "bias"},
        )
        with graph.inserting_before(node.next):
            total = graph.call_function(torch.add, (node, bias))
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _constant(module: fx.GraphModule, node: Any, quantizer: str) -> Tensor:
    """The value of a constant expression in the graph: the weight that a quantizer rounds."""
    if node.op == "get_attr":
        value: Any = module
        for atom in str(node.target).split("."):
            value = getattr(value, atom)
        held: Tensor = value
        return held
    # repq puts these here: batch norms of a kernel, which may need the input.
    if node.op in ("placeholder", "call_module"):
        why = f"{quantizer} rounds a weight that is still computed at every call, as in training"
        raise InputError(
            f'{why}: run repfx.transform(model, ["fuse"]) first and lower the model it returns'
        )
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda v: _constant(module, v, quantizer) if isinstance(v, fx.Node) else v,
    )
    f = node.target if callable(node.target) else getattr(type(args[0]), str(node.target))
    computed: Tensor = f(*args, **kwargs)
    return computed
