"""Lint rules about numbers: the types, scales, zero points and axes that a runtime reads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from repfx.lowering.lint.rulebook import (
    ONNXRUNTIME,
    OPENVINO,
    REFUSED,
    RTX,
    SLOW_ELSEWHERE,
    TENSORRT,
    Hit,
    everywhere,
    rule,
)
from repfx.lowering.onnx.index import DQ, MOVES, Index, Layer, Q, arg, attribute, subgraphs

# 23 is FLOAT4E2M1, which older versions of onnx do not have.
_TYPES = (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, 23)
_BYTES = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
_BETWEEN = frozenset(
    {
        *(
            "Clip",
            "Cast",
            "Reshape",
            "Transpose",
            "Min",
            "Max",
            "Squeeze",
            "Unsqueeze",
            "Flatten",
            "Slice",
            "Pad",
        ),
        *("Concat", "Gather", "MaxPool", "Relu", "Round", "Add", "Sub", "Mul", "Where", "Split"),
    }
)
_INTEGER_OPS = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"})


def _formats(index: Index) -> Iterator[NodeProto]:
    """Every Q, and every DQ whose parameters differ from its Q's. Q08 checks quantized biases."""
    yield from index.quantizes
    for node in index.dequantizes:
        q = index.q(node)
        if not index.of_bias(node) and (q is None or list(q.input[1:]) != list(node.input[1:])):
            yield node


def _type_name(kind: int) -> str:
    return (
        TensorProto.DataType.Name(kind).lower()
        if kind in TensorProto.DataType.values()
        else f"type {kind}"
    )


def _per_channel(index: Index, node: NodeProto) -> bool:
    return (index.size(arg(node, 1)) or 1) > 1


@rule(
    "Q00",
    everywhere("E"),
    "quantize the model before exporting it, and keep the Q/DQ nodes",
    "builds it; every layer runs in float",
)
def nothing_quantized(index: Index) -> Iterator[Hit]:
    """The graph has at least one QuantizeLinear, or a DequantizeLinear of an integer constant."""
    constant = (n for n in index.dequantizes if arg(n, 0) in index.fixed and not index.of_bias(n))
    if index.quantizes or any(constant):
        return
    where = index.graph.name or "graph"
    holders = dict.fromkeys(n.op_type for n in index.graph.node if _quantized_inside(n))
    if holders:
        message = (
            f"all of its Q/DQ nodes are inside {', '.join(holders)}; subgraphs are not read, so "
            "nothing was checked"
        )
        yield Hit(
            where,
            message,
            cure="export without control flow, or check each branch in a file of its own",
        )
    else:
        yield Hit(where, "has no Q/DQ nodes, so no layer runs in integers")


def _quantized_inside(node: NodeProto) -> bool:
    inner = [n for graph in subgraphs(node) for n in graph.node]
    return any(n.op_type in (Q, DQ) or _quantized_inside(n) for n in inner)


@rule(
    "Q01",
    REFUSED,
    "quantize symmetrically: TensorRT supports no zero point but 0",
    "its parser rejects it",
)
def zero_points_are_zero(index: Index) -> Iterator[Hit]:
    """Every zero point is 0."""
    for node in _formats(index):
        zero = index.value(arg(node, 2)) if arg(node, 2) else None
        if zero is not None and np.any(zero.astype(np.float64) != 0):
            yield Hit(node, f"zero point {zero.ravel()[np.argmax(zero.ravel() != 0)]} is not 0")


@rule(
    "Q02",
    SLOW_ELSEWHERE,
    "quantize to int8 with a constant zero point",
    "reads uint8 as int8, with wrong numbers; its parser rejects other types, and its builder a "
    "computed zero point",
)
def codes_are_of_a_known_type(index: Index) -> Iterator[Hit]:
    """Every zero point is a constant of a type the runtime has integer layers for.

    That is int8, and for runtimes other than TensorRT also uint8."""
    for node in _formats(index):
        name = arg(node, 2)
        kind = (
            index.type(name) if name else attribute(node, "output_dtype", 0) or _codes(index, node)
        )
        if name and name not in index.fixed:
            severity = {**SLOW_ELSEWHERE, RTX: "E"}
            yield Hit(node, f"zero point {name} is computed; it must be a constant", severity)
        elif kind and kind not in _TYPES:
            yield Hit(
                node,
                f"the codes are {_type_name(kind)}, which the parser rejects or reads as int8",
                REFUSED,
            )
        if kind and kind not in _BYTES:
            elsewhere = {ONNXRUNTIME: "W", OPENVINO: "W"}
            yield Hit(
                node,
                f"the codes are {_type_name(kind)}, for which there are no integer layers",
                elsewhere,
            )


def _codes(index: Index, node: NodeProto) -> int:
    """The type of constant codes that have no zero point; 0 where they are not constant."""
    return index.type(arg(node, 0)) if node.op_type == DQ and arg(node, 0) in index.fixed else 0


@rule("Q03", {TENSORRT: "W"}, "give QuantizeLinear an int8 zero point of zeros")
def zero_points_are_given(index: Index) -> Iterator[Hit]:
    """Every QuantizeLinear has a zero point; without one ONNX means uint8, TensorRT int8."""
    for node in index.quantizes:
        if not arg(node, 2) and not attribute(node, "output_dtype", 0):
            yield Hit(node, "has no zero point, which means uint8 in ONNX and int8 in TensorRT")


@rule(
    "Q04",
    everywhere("E"),
    "write positive constant scales: one scalar, or one per channel",
    "its parser rejects a negative scale, its builder dies of a computed one, and a scale of shape "
    "(1,) leaves the layer in float",
)
def scales_are_numbers(index: Index) -> Iterator[Hit]:
    """Every scale is a finite, positive constant: a scalar, or 1-D with the size of the axis."""
    for node in _formats(index):
        name = arg(node, 1)
        scale = index.value(name)
        if name not in index.fixed:
            severity = {**SLOW_ELSEWHERE, RTX: "E"}
            yield Hit(node, f"scale {name} is computed; it must be a constant", severity)
            continue
        if scale is None:
            continue
        values = scale.astype(np.float64)
        if not np.all(np.isfinite(values) & (values > 0)):
            yield Hit(
                node,
                f"scale {values.ravel()[np.argmin(np.isfinite(values) & (values > 0))]:g} "
                "is not a positive number",
            )
        elif not attribute(node, "block_size", 0):
            yield from _scale_shape(index, node, scale)


def _scale_shape(index: Index, node: NodeProto, scale: np.ndarray) -> Iterator[Hit]:
    if scale.ndim == 0 or index.opset < 13:  # older opsets have no axis attribute, see Q07
        return
    shape, axis = index.shape(arg(node, 0)), attribute(node, "axis", 1)
    outside = shape is not None and not -len(shape) <= axis < len(shape)
    length = shape[axis] if shape and not outside else None
    if scale.ndim > 1:
        yield Hit(node, f"the scale has shape {scale.shape}")
    elif outside and scale.size != 1:
        yield Hit(node, f"{scale.size} scales for axis {axis} of a tensor of shape {shape}")
    elif scale.size == 1 and length != 1:
        yield Hit(
            node,
            "the scale has shape (1,), which prevents some fusions",
            {TENSORRT: "W", RTX: "W"},
            "write it as a scalar",
        )
    elif length is not None and scale.size != length:
        yield Hit(node, f"{scale.size} scales for axis {axis} of size {length}")


@rule(
    "Q05",
    {TENSORRT: "E", ONNXRUNTIME: "W", RTX: "W"},
    "quantize activations per tensor, with one scale",
    "builds it; the layer runs in float",
)
def channels_of_constants_only(index: Index) -> Iterator[Hit]:
    """Only constants are quantized per channel."""
    for node in _formats(index):
        if _per_channel(index, node) and arg(node, 0) not in index.fixed:
            yield Hit(node, f"activation {arg(node, 0)} has {index.size(arg(node, 1))} scales")


@rule(
    "Q06",
    SLOW_ELSEWHERE,
    "quantize the weight along its output channels, or per tensor",
    "builds it; the layer runs in float, and so does every transposed convolution",
)
def weight_axes(index: Index) -> Iterator[Hit]:
    """Weights are quantized along the output axis; a ConvTranspose is best quantized per tensor.

    The output axis of a Conv is 0; that of a Gemm or MatMul depends on how its weight is stored."""
    for layer in index.layers:
        dq = index.dq(layer.weight) if layer.weight else None
        if (
            dq is None
            or index.opset < 13
            or not _per_channel(index, dq)
            or attribute(dq, "block_size", 0)
        ):
            continue
        axis, wanted = _axis_at(index, layer, dq), _output_axis(index, layer)
        if axis is None or wanted is None:
            continue
        kind = layer.node.op_type
        if kind == "ConvTranspose":
            yield from _transposed(layer.node, axis)
        elif axis != wanted:
            # ONNX Runtime does not run such a MatMul at all.
            severity = {**SLOW_ELSEWHERE, ONNXRUNTIME: "E"} if kind == "MatMul" else None
            yield Hit(
                layer.node,
                f"the {kind} weight is quantized along axis {axis}; it has to be axis {wanted}",
                severity,
            )


def _transposed(node: NodeProto, axis: int) -> Iterator[Hit]:
    """A ConvTranspose quantized per channel: TensorRT takes axis 0, OpenVINO axis 1."""
    cure = "quantize it per tensor, or leave it in float"
    if axis != 0:
        yield Hit(
            node,
            f"the ConvTranspose weight is quantized along axis {axis}; it has to be axis 0",
            {TENSORRT: "E"},
        )
    else:
        yield Hit(node, "a ConvTranspose quantized per channel is fragile", {TENSORRT: "W"}, cure)
    yield Hit(node, "a ConvTranspose runs in float", {RTX: "W"}, "leave it in float")
    if axis != 1:
        yield Hit(
            node,
            f"a ConvTranspose quantized along axis {axis} runs in float",
            {OPENVINO: "W"},
            cure,
        )


def _axis_at(index: Index, layer: Layer, dq: NodeProto) -> int | None:
    """The quantization axis as the layer sees it, past Transposes; None where that is unknown."""
    shape = index.shape(arg(dq, 0))
    if not shape:
        return None
    axis: int = attribute(dq, "axis", 1) % len(shape)
    path: list[NodeProto] = []
    name = layer.weight
    while (node := index.made.get(name)) is not None and node is not dq and len(path) < 100:
        path.append(node)
        name = arg(node, 0)
    for node in reversed(path):
        if node.op_type == "Transpose":
            axis = list(attribute(node, "perm", range(len(shape))[::-1])).index(axis)
        elif node.op_type != "Identity":
            return None
    return axis


def _output_axis(index: Index, layer: Layer) -> int | None:
    if layer.node.op_type == "Gemm":
        return 0 if attribute(layer.node, "transB", 0) else 1
    if layer.node.op_type == "MatMul":
        shape = index.shape(layer.weight)
        first = arg(layer.node, 0) == layer.weight
        return None if not shape or len(shape) < 2 else len(shape) - (2 if first else 1)
    return 0


@rule("Q07", {**everywhere("E"), RTX: "I"}, "export with opset 13 or later")
def opsets(index: Index) -> Iterator[Hit]:
    """The opset is at least 13 for per-channel scales, at most 20 for TensorRT 10.0 and 10.1."""
    if index.opset < 13:
        for node in (*index.quantizes, *index.dequantizes):
            if _per_channel(index, node):
                yield Hit(node, f"has per-channel scales; opset {index.opset} has no axis for them")
                return
    if index.opset > 20:
        yield Hit(
            index.graph.name or "graph",
            f"uses opset {index.opset}; TensorRT 10.0 and 10.1 read opset 20 at most",
            {TENSORRT: "I"},
            "export with opset 20 for those versions",
        )


@rule(
    "Q08",
    REFUSED,
    "keep the bias a float initializer without Q/DQ (ONNX Runtime: QuantizeBias=False)",
    "its parser rejects int32; a bias in int8 it takes",
)
def biases_are_float(index: Index) -> Iterator[Hit]:
    """Every bias is a float constant: TensorRT has no DequantizeLinear for int32."""
    told = set()
    for layer in index.layers:
        dq = index.dq(layer.bias) if layer.bias else None
        if dq is not None:
            told.add(id(dq))
            yield Hit(
                layer.node,
                f"the bias {layer.bias} is dequantized from {_type_name(index.type(arg(dq, 0)))}",
            )
    for node in index.dequantizes:
        if index.of_bias(node) and id(node) not in told:
            yield Hit(node, "dequantizes int32 codes")


@rule(
    "Q09",
    {TENSORRT: "E", RTX: "I"},
    "feed DequantizeLinear directly from its Q or integer constant",
    "its builder refuses a transposition of codes; a Clip between Q and DQ does no harm",
)
def nothing_between(index: Index) -> Iterator[Hit]:
    """Nothing stands between a QuantizeLinear or an integer constant and its DequantizeLinear."""
    for dq in index.dequantizes:
        name = index.source(arg(dq, 0))
        node = index.made.get(name)
        if node is None or node.op_type in (Q, "Constant") or node.op_type not in _BETWEEN:
            continue
        root = index.maker(name, {*_BETWEEN, "Identity"})
        if name in index.fixed or (root is not None and root.op_type == Q):
            moves = node.op_type in MOVES and name in index.fixed
            yield Hit(
                dq,
                f"{node.op_type} stands between the codes and DequantizeLinear",
                REFUSED if moves else None,
            )


@rule(
    "Q22",
    {**REFUSED, OPENVINO: "W"},
    "export the model as Q/DQ (ONNX Runtime: quant_format=QuantFormat.QDQ)",
    "its parser rejects it",
)
def operators_of_other_runtimes(index: Index) -> Iterator[Hit]:
    """No operator is one that only ONNX Runtime runs well.

    Such are QLinearConv, ConvInteger, DynamicQuantizeLinear and those of com.microsoft."""
    for node in index.graph.node:
        foreign, integer = node.domain == "com.microsoft", node.op_type in _INTEGER_OPS
        if foreign or integer or node.op_type.startswith("QLinear"):
            name = f"{node.domain + '.' if node.domain else ''}{node.op_type}"
            yield Hit(node, f"TensorRT does not know {name}", REFUSED)
        if foreign:
            yield Hit(
                node,
                f"com.microsoft.{node.op_type}: OpenVINO supports few operators of this domain",
                {OPENVINO: "W"},
            )
        elif integer:
            yield Hit(node, f"{node.op_type} runs in float", {OPENVINO: "W"})


@rule(
    "Q24",
    {TENSORRT: "I", RTX: "I"},
    "give the builder an optimization profile: the smallest, the usual and the largest shape",
)
def dynamic_inputs(index: Index) -> Iterator[Hit]:
    """Every input has a fixed shape; a dynamic one needs an optimization profile for the build."""
    for info in index.graph.input:
        shape = index.shapes.get(info.name)
        if info.name not in index.tensors and shape and None in shape:
            where = ", ".join(str(i) for i, d in enumerate(shape) if d is None)
            yield Hit(info.name, f"dimension {where} is dynamic: a build without a profile fails")


@rule(
    "Q27",
    REFUSED,
    "write the weight as int8 codes, which hold 4 bits as well",
    "its builder refuses a convolution, and computes a matrix product in float",
)
def int4_weights(index: Index) -> Iterator[Hit]:
    """No layer between Q/DQ has a weight in int4: TensorRT multiplies only float by int4."""
    four = (TensorProto.INT4, TensorProto.UINT4)
    for layer in index.layers:
        dq = index.dq(layer.weight) if layer.weight else None
        if dq is None or index.type(arg(dq, 0)) not in four:
            continue
        if "Conv" in layer.node.op_type:
            yield Hit(layer.node, "a convolution's weight is int4")
        elif index.dq(layer.x) is not None:
            says = "a weight is int4 and its input in int8, so it is computed in float"
            yield Hit(layer.node, says, {TENSORRT: "W", RTX: "W"})


@rule(
    "Q25",
    everywhere("E"),
    "give both the same scale",
    "builds it without a word, though its numbers are wrong",
)
def one_scale_a_pair(index: Index) -> Iterator[Hit]:
    """A QuantizeLinear and its DequantizeLinear have the same scale."""
    for dq in index.dequantizes:
        q = index.q(dq)
        if q is not None and not index.one_scale(q, dq):
            yield Hit(dq, f"its scale differs from that of {q.name or q.output[0]} before it")
