"""Lint rules about places: where Q and DQ must be for layers to fuse and run in INT8."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from repfx.graph.traits import Trait
from repfx.graph.vocabulary import with_trait
from repfx.lowering.lint.rulebook import (
    ONNXRUNTIME,
    OPENVINO,
    RTX,
    SLOW_ELSEWHERE,
    TENSORRT,
    Hit,
    everywhere,
    rule,
)
from repfx.lowering.onnx.index import (
    DQ,
    IDENTITY,
    MOVES,
    WEIGHTED,
    Index,
    Layer,
    Q,
    arg,
    attribute,
    called,
    out,
)

_ACTIVATIONS = with_trait(Trait.ACTIVATION)
_CONVS = frozenset({"Conv", "ConvTranspose"})
_LINEAR = IDENTITY | {"BatchNormalization"}  # these fold into the layer before them
_NOT_ONNXRUNTIME = {k: v for k, v in SLOW_ELSEWHERE.items() if k != ONNXRUNTIME}


def _quantized(index: Index, layer: Layer) -> bool:
    return (
        index.dq(layer.x) is not None and bool(layer.weight) and index.dq(layer.weight) is not None
    )


def _to_q(index: Index, name: str) -> bool:
    return any(n.op_type == Q for n in index.readers(name, MOVES))


def _conv_of(index: Index, name: str) -> NodeProto | None:
    """The quantized convolution that makes a tensor, past a batch norm, if it has one reader."""
    node = index.maker(name, _LINEAR)
    if node is None or node.op_type not in _CONVS or index.dq(arg(node, 0)) is None:
        return None
    return node if len([*index.readers(out(node), _LINEAR)]) == 1 else None


@rule(
    "Q10",
    SLOW_ELSEWHERE,
    "put Q/DQ on both the activation and the weight, or on neither",
    "builds it; the layer runs in float",
)
def both_or_neither(index: Index) -> Iterator[Hit]:
    """Every layer with a constant weight has both input and weight quantized, or neither."""
    for layer in index.layers:
        x, w = index.dq(layer.x), index.dq(layer.weight) if layer.weight else None
        if layer.weight and (x is None) != (w is None):
            has, lacks = ("weight", "activation") if x is None else ("activation", "weight")
            # ONNX Runtime has no integer kernel for a transposed convolution, and the convolution
            # before it needs the Q/DQ (Q26).
            exempt = layer.node.op_type == "ConvTranspose"
            yield Hit(
                layer.node,
                f"the {has} is quantized, but the {lacks} is not",
                _NOT_ONNXRUNTIME if exempt else None,
            )
        elif x is not None and _is_cast(index.maker(layer.x, MOVES)):
            yield Hit(
                layer.node,
                "a Cast stands between its DequantizeLinear and it",
                {ONNXRUNTIME: "W", OPENVINO: "W"},
                "dequantize to the type that the layer reads",
            )


@rule("Q11", {TENSORRT: "W"}, "quantize after the activation, not before")
def nothing_after_conv(index: Index) -> Iterator[Hit]:
    """No Q/DQ stands between a layer with a weight and its batch norm, activation or bias."""
    for q in index.quantizes:
        made = index.maker(arg(q, 0), _LINEAR)
        if made is None or made.op_type not in WEIGHTED:
            continue
        for dq in index.readers(out(q)):
            for after in index.readers(out(dq)) if dq.op_type == DQ else ():
                bias = after.op_type == "Add" and any(i in index.fixed for i in after.input)
                if bias or after.op_type == "BatchNormalization" or after.op_type in _ACTIVATIONS:
                    yield Hit(
                        q,
                        f"stands between {made.op_type} and {after.op_type}, which keeps "
                        "them from fusing",
                    )


@rule("Q12", everywhere("I"), "merge it into a neighbouring convolution, if there is one")
def lone_batch_norms(index: Index) -> Iterator[Hit]:
    """Every batch norm directly follows a convolution; otherwise it runs as a layer of its own."""
    for node in index.nodes:
        if node.op_type != "BatchNormalization":
            continue
        made = index.maker(arg(node, 0), {*IDENTITY, Q, DQ})
        if (
            made is None
            or made.op_type not in WEIGHTED
            or sum(1 for _ in index.readers(out(made))) > 1
        ):
            yield Hit(node, "BatchNormalization does not directly follow a convolution")


@rule(
    "Q13",
    {TENSORRT: "W"},
    "put Q/DQ on the skip input of the Add and leave the convolution's output as it is",
)
def residual_adds(index: Index) -> Iterator[Hit]:
    """A residual Add after a quantized convolution has Q/DQ on its skip input, and only there."""
    for node in index.nodes:
        inputs = list(node.input)
        if node.op_type != "Add" or len(inputs) != 2 or any(i in index.fixed for i in inputs):
            continue
        if index.source(inputs[0]) == index.source(inputs[1]) or any(_parallel(index, node)):
            continue
        dqs = [index.dq(i) for i in inputs]
        if any(_conv_of(index, i) for i in inputs):
            if dqs == [None, None]:
                yield Hit(
                    node,
                    "adds a convolution and a skip in float: the skip has no Q/DQ",
                )
            continue
        for dq in dqs:
            q = index.q(dq) if dq is not None else None
            conv = _conv_of(index, arg(q, 0)) if q is not None else None
            # With another reader it is an earlier linear convolution, and the skip of this Add.
            if (
                q is not None
                and conv is not None
                and dq is not None
                and len([*index.readers(out(dq), MOVES)]) == 1
            ):
                yield Hit(
                    node,
                    f"Q/DQ stands between {conv.name or out(conv)} and the Add, which keeps "
                    "them from fusing",
                )
                break


def _parallel(index: Index, add: NodeProto) -> Iterator[list[NodeProto]]:
    """Groups of two or more convolutions that read the same tensor and end in one sum."""
    groups: dict[str, dict[int, NodeProto]] = defaultdict(dict)
    todo, seen = list(add.input), set(add.input)
    while todo:
        node = index.made.get(todo.pop())
        if node is None or sum(1 for _ in index.readers(out(node))) > 1:
            continue
        if node.op_type == "Conv":
            groups[index.source(arg(node, 0), {*IDENTITY, Q, DQ, "Cast"})][id(node)] = node
        elif node.op_type in IDENTITY or node.op_type in (
            Q,
            DQ,
            "BatchNormalization",
            "Add",
            "Sum",
        ):
            inputs = node.input if node.op_type in ("Add", "Sum") else node.input[:1]
            todo += [i for i in inputs if i not in seen]
            seen.update(inputs)
    yield from (list(g.values()) for g in groups.values() if len(g) > 1)


@rule(
    "Q14",
    {**everywhere("W"), RTX: "I"},
    "merge the block into one convolution before quantizing (repfx.transform)",
)
def unmerged_blocks(index: Index) -> Iterator[Hit]:
    """No sum adds several convolutions of one tensor: such a block was not merged.

    No runtime merges it by itself."""
    for node in index.nodes:
        if node.op_type not in ("Add", "Sum"):
            continue
        if any(n.op_type in ("Add", "Sum") for n in index.readers(out(node), {*IDENTITY, Q, DQ})):
            continue  # this is part of a longer sum
        for convs in _parallel(index, node):
            names = ", ".join(c.name or out(c) for c in convs[:3])
            yield Hit(node, f"adds {len(convs)} convolutions of one tensor ({names})")


@rule("Q15", everywhere("I"), "use one quantizer for all readers of the tensor")
def one_quantizer_a_tensor(index: Index) -> Iterator[Hit]:
    """Every tensor is quantized with one scale for all its readers."""
    groups: dict[str, list[NodeProto]] = defaultdict(list)
    for q in index.quantizes:
        groups[index.source(arg(q, 0))].append(q)
    for name, qs in groups.items():
        scales: list[NodeProto] = []
        for q in qs:
            if not any(index.one_scale(q, s) for s in scales):
                scales.append(q)
        if len(scales) > 1:
            yield Hit(name, f"is quantized with {len(scales)} different scales")


@rule(
    "Q16",
    everywhere("W"),
    "quantize all inputs of the Concat with one common scale, or none",
    "builds it; a convolution that reads two scales runs in float",
)
def concats(index: Index) -> Iterator[Hit]:
    """All inputs of a Concat are quantized with the same scale, or none is quantized.

    ONNX Runtime also needs Q/DQ on the output, where a layer reads it."""
    for node in index.nodes:
        inputs = [i for i in node.input if i and i not in index.fixed]
        if node.op_type != "Concat" or not inputs:
            continue
        found = [d for i in inputs if (d := index.dq(i)) is not None]
        direct = any(n.op_type in WEIGHTED for n in index.readers(out(node), MOVES))
        if found and len(found) < len(inputs):
            yield Hit(node, f"{len(found)} of {len(inputs)} inputs are quantized", {TENSORRT: "W"})
        elif any(not index.one_scale(found[0], d) for d in found[1:]):
            severity = {TENSORRT: "W"}
            if direct:
                severity |= {OPENVINO: "W", RTX: "W"}
            yield Hit(node, "the inputs are quantized with different scales", severity)
        if found and direct:
            yield Hit(
                node,
                "a layer reads its output, which is not quantized",
                {ONNXRUNTIME: "W"},
                "quantize the output of the Concat as well",
            )


@rule("Q17", {TENSORRT: "W"}, "put Q/DQ before the pool, and after it only for an average pool")
def pools(index: Index) -> Iterator[Hit]:
    """An average pool with Q/DQ after it also has it before; a max pool has it only before."""
    for node in index.nodes:
        y, fed = out(node), index.dq(arg(node, 0)) is not None
        if node.op_type in ("AveragePool", "GlobalAveragePool") or _spatial_mean(index, node):
            if not fed and _to_q(index, y):
                yield Hit(
                    node,
                    f"{node.op_type} runs in float: its output is quantized, but its input is not",
                )
        elif node.op_type in ("MaxPool", "GlobalMaxPool"):
            readers = [n.op_type for n in index.readers(y, MOVES)]
            if fed and Q in readers:
                yield Hit(
                    node,
                    f"the output of {node.op_type} is quantized again",
                    cure="remove the Q/DQ after the pool",
                )
            elif not fed and Q in readers and not {Q, "Concat"}.issuperset(readers):
                # Where Q is the only reader, TensorRT moves it before the pool by itself. A Concat
                # in float has to read floats.
                yield Hit(
                    node,
                    f"{node.op_type} runs in float: Q stands after it, and other layers "
                    "read the float output",
                )


def _is_cast(node: NodeProto | None) -> bool:
    return node is not None and node.op_type == "Cast"


def _spatial_mean(index: Index, node: NodeProto) -> bool:
    """Whether the node is a ReduceMean over every dimension but the first two."""
    if node.op_type != "ReduceMean":
        return False
    given = index.value(arg(node, 1)) if arg(node, 1) else attribute(node, "axes", ())
    if given is None:
        return False
    axes, shape = {int(a) for a in np.ravel(given)}, index.shape(arg(node, 0))
    if shape is None:
        return axes in ({2, 3}, {-1, -2})
    return len(shape) > 2 and {a % len(shape) for a in axes} == set(range(2, len(shape)))


@rule("Q18", {**everywhere("W"), RTX: "I"}, "remove one of the two quantizers")
def no_dq_to_q(index: Index) -> Iterator[Hit]:
    """No DequantizeLinear directly precedes a QuantizeLinear."""
    for q in index.quantizes:
        made = index.maker(arg(q, 0))
        if made is not None and made.op_type == DQ:
            yield Hit(q, "quantizes a value that was dequantized just before")


@rule("Q19", {TENSORRT: "W"}, "use a multiple of 4 channels per group, or leave the layer in float")
def grouped_convs(index: Index) -> Iterator[Hit]:
    """Every quantized grouped convolution but depthwise has a multiple of 4 channels per group."""
    for layer in index.layers:
        groups, shape = attribute(layer.node, "group", 1), index.shape(layer.weight)
        if (
            layer.node.op_type not in _CONVS
            or groups < 2
            or not shape
            or not _quantized(index, layer)
        ):
            continue
        first, inside = shape[0] or 0, shape[1] or 0
        inputs, outputs = (
            (inside, first // groups) if layer.node.op_type == "Conv" else (first // groups, inside)
        )
        if inputs != 1 and (inputs % 4 or outputs % 4):
            yield Hit(
                layer.node, f"has {groups} groups of {inputs} input and {outputs} output channels"
            )


@rule(
    "Q20",
    {TENSORRT: "W"},
    "write float types as FP16: scales, weights and biases (Q/DQ in FP16 needs opset 19)",
)
def float32_islands(index: Index) -> Iterator[Hit]:
    """A strongly typed engine runs FP32 layers in FP32, which only those of one position may be."""
    if not index.quantizes and not index.dequantizes:
        return
    if {TensorProto.FLOAT16, TensorProto.BFLOAT16} & set(index.types.values()):
        return
    plain = [
        x
        for x in index.layers
        if index.dq(x.x) is None
        and not (arg(x.node, 1) and index.dq(arg(x.node, 1)))
        and not _has_one_position(index, x.node)
    ]
    if plain:
        first = plain[0].node.name or out(plain[0].node)
        yield Hit(
            plain[0].node,
            f"{len(plain)} of {len(index.layers)} layers run in FP32, the first of them {first}",
        )


def _has_one_position(index: Index, node: NodeProto) -> bool:
    places = (index.shape(out(node)) or ())[2:]
    return bool(places) and all(size == 1 for size in places)


@rule("Q21", {TENSORRT: "W"}, "leave the graph's outputs in float")
def outputs_are_float(index: Index) -> Iterator[Hit]:
    """No Q/DQ stands directly before an output of the graph."""
    for name in index.outputs:
        made = index.maker(name, MOVES)
        if made is not None and made.op_type in (Q, DQ):
            yield Hit(name, f"this output of the graph comes from {made.op_type}")


@rule(
    "Q26",
    {ONNXRUNTIME: "W"},
    "quantize the output of the layer; after a ReLU, to uint8 with zero point 0",
)
def onnxruntime_gives_codes(index: Index) -> Iterator[Hit]:
    """The output of a quantized convolution is quantized directly, or after a ReLU the Q replaces.

    Outputs of the graph are exempt."""
    for layer in index.layers:
        y = out(layer.node)
        if layer.node.op_type != "Conv" or not _quantized(index, layer) or y in index.outputs:
            continue
        floats = [n for n in index.readers(y) if n.op_type != Q and not _rounded_away(index, n)]
        if floats:
            yield Hit(
                layer.node,
                f"its output goes to {called(floats[0])} in float; no integer kernel does "
                "that, so it runs in float",
            )


def _rounded_away(index: Index, node: NodeProto) -> bool:
    """Whether the node is a ReLU or Clip that does not keep the convolution in float.

    Either it makes an output of the graph, or the Q after it saturates at 0 just as the ReLU does,
    because the zero point is the smallest code."""
    qs = list(index.readers(out(node)))
    fine = out(node) in index.outputs or (
        bool(qs) and all(q.op_type == Q and _from_zero(index, q) for q in qs)
    )
    return node.op_type in ("Relu", "Clip") and fine


def _from_zero(index: Index, q: NodeProto) -> bool:
    zero = index.value(arg(q, 2)) if arg(q, 2) else np.zeros((), np.uint8)
    return (
        zero is not None
        and zero.dtype.kind in "iu"
        and bool(np.all(zero == np.iinfo(zero.dtype).min))
    )
