"""Changes to the finished ONNX graph for one runtime or one opset, each a function."""

from __future__ import annotations

import math

import numpy as np
import onnx

from repfx.lowering.onnx.index import DQ, Index, Q, arg, attribute, captured

CALL = "repfx.quantizer"  # the key of a note on a QuantizeLinear that names the quantizer's call


def codes_name(path: str, call: int = 0) -> str:
    """The name in the file of the codes that one call of a quantizer makes; calls count from 0.

    >>> codes_name("conv1.input_quant"), codes_name("conv1.input_quant", 2)
    ('conv1.input_quant.codes', 'conv1.input_quant.codes_2')
    """
    return f"{path}.codes" + (f"_{call}" if call else "")


def name_codes(proto: onnx.ModelProto) -> None:
    """Names the codes of each quantizer call after the quantizer and drops the exporter's notes.

    Those notes hold stack traces with paths of the machine."""
    renamed = {
        node.output[0]: e.value
        for node in proto.graph.node
        for e in node.metadata_props
        if e.key == CALL
    }
    taken = {o for n in proto.graph.node for o in n.output}
    renamed = {old: new for old, new in renamed.items() if new not in taken}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed.get(name, name)
        del node.metadata_props[:]
        node.doc_string = ""
    for info in proto.graph.value_info:
        info.name = renamed.get(info.name, info.name)
    for entry in (
        *proto.graph.value_info,
        *proto.graph.initializer,
        *proto.graph.input,
        *proto.graph.output,
        proto.graph,
    ):
        del entry.metadata_props[:]


def round_once(proto: onnx.ModelProto) -> None:
    """Removes each Q/DQ pair that reads a DequantizeLinear with the same scale and zero point.

    It changes no value: Q(DQ(q)) = q. Such a pair is left where nothing stays in the file of what
    stood between two calls of a quantizer, such as a dropout."""
    index = Index(proto)
    instead: dict[str, str] = {}
    gone: set[int] = set()

    def now(name: str) -> str:
        while name in instead:
            name = instead[name]
        return name

    for dq in index.dequantizes:  # in order, so that the first of a row of pairs stays
        q = index.made.get(dq.input[0])
        first = index.made.get(q.input[0]) if q is not None and q.op_type == Q else None
        if q is None or first is None or first.op_type != DQ or q.output[0] in index.outputs:
            continue
        read = [index.users[node.output[0]] for node in (q, dq, first)]
        inner = any(captured(node) for readers in read for node in readers)
        if inner or not (_same_constants(index, first, q) and _same_constants(index, q, dq)):
            continue
        kept, name = now(q.input[0]), dq.output[0]
        if name not in index.outputs:
            instead[name] = kept
        elif kept not in index.outputs and id(first) not in gone:
            first.output[0] = instead[kept] = name  # an output of the model keeps its name
        else:
            continue
        gone |= {id(dq)} | ({id(q)} if len(read[0]) == 1 else set())
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = now(name)
    kept_nodes = [node for node in proto.graph.node if id(node) not in gone]
    del proto.graph.node[:]
    proto.graph.node.extend(kept_nodes)
    drop_unread(proto)


def _same_constants(index: Index, a: onnx.NodeProto, b: onnx.NodeProto) -> bool:
    """Whether two quantizing nodes have equal constants for scale and zero point."""
    pairs = [(index.value(arg(a, i)), index.value(arg(b, i))) for i in (1, 2)]
    return all(
        x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in pairs
    )


def exact_averages(proto: onnx.ModelProto) -> None:
    """Makes average pools with ceil_mode count the values that are there and no others.

    A window that hangs over the end counts its padding, but not what lies beyond. With
    count_include_pad, the integer kernel of ONNX Runtime counts the whole window. So the padding
    becomes a Pad of its own, and then every value counts that is there. A window that would begin
    in the padding at the end is left out; that is what a pool without ceil_mode gives. Where the
    size is not known, the pool stays."""
    nodes, index = [], Index(proto)
    for node in proto.graph.node:
        if node.op_type == "AveragePool" and attribute(node, "ceil_mode", 0):
            pads, begins = attribute(node, "pads", []), _begins(index, node)
            whole = begins is not None and all(begins)
            if begins is not None and not any(begins):
                _drop(node, "ceil_mode")
            elif attribute(node, "count_include_pad", 0) and (whole or not any(pads)):
                _drop(node, "count_include_pad", "pads")
                if any(pads):
                    nodes.append(_padded(proto, node, pads))
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _begins(index: Index, node: onnx.NodeProto) -> list[bool] | None:
    """For each axis of a pool, whether its last window begins before the padding at the end."""
    sizes, kernel = (index.shape(node.input[0]) or ())[2:], attribute(node, "kernel_shape", [])
    pads, ones = attribute(node, "pads", [0] * 2 * len(kernel)), [1] * len(kernel)
    strides = attribute(node, "strides", ones)
    if len(sizes) != len(kernel) or attribute(node, "dilations", ones) != ones:
        return None
    found = []
    for i, (n, k, s) in enumerate(zip(sizes, kernel, strides, strict=True)):
        before, after = pads[i], pads[i + len(kernel)]
        if n is None:
            return None
        found.append(-(-(n + before + after - k) // s) * s < n + before)
    return found


def wider_kernels(proto: onnx.ModelProto, gathering: bool) -> None:
    """Strided 1x1 convolutions that OpenVINO runs wrongly or in float get one more tap, a zero.

    If nothing else reads a value, OpenVINO moves their stride up to where the codes are, and the
    layers run in float. `gathering`: the file is also for SSE4.1 and AVX2, whose integer kernels
    first gather the pixels that are read, a whole register of channels at a time. What is left over
    of the last register (16 does not divide the channels) is written over the next pixel, where
    another thread may have been first. Kernels of other sizes do neither."""
    index, found = Index(proto), dict[str, onnx.TensorProto]()
    for node in filter(_skips, proto.graph.node):
        x, weight = (index.made.get(name) for name in node.input[:2])
        codes = None if weight is None else index.tensors.get(weight.input[0])
        if x is None or x.op_type != DQ or codes is None:
            continue
        moved = all(_skips(n) for d in index.users[x.input[0]] for n in index.users[d.output[0]])
        if moved or (gathering and codes.dims[1] % 16 and attribute(node, "group", 1) == 1):
            found[codes.name] = codes
    for codes in found.values():
        values = onnx.numpy_helper.to_array(codes)
        grown = np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, 1)])
        codes.CopyFrom(onnx.numpy_helper.from_array(grown, codes.name))
        stale = {codes.name}
        for dq in index.users[codes.name]:
            stale.add(dq.output[0])
            for node in index.users[dq.output[0]]:  # more than one if the layer is shared
                _wider(node, values.ndim - 2)
        for info in [i for i in proto.graph.value_info if i.name in stale]:
            proto.graph.value_info.remove(info)


def kept_scales(proto: onnx.ModelProto) -> None:
    """Quantized convolutions without a bias that several nodes read get one, of 1e-30.

    If a layer in float reads what such a convolution returns, and a quantized concatenation, too,
    OpenVINO loses its scale on the way to the concatenation. With a bias it does not, unless that
    is zero. The number changes no value."""
    index = Index(proto)
    for node in proto.graph.node:
        weight = index.made.get(node.input[1]) if node.op_type == "Conv" else None
        codes = None if weight is None else index.tensors.get(weight.input[0])
        if codes is None or len(index.users[node.output[0]]) < 2:
            continue
        given = index.value(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        if given is None or given.any():
            continue
        bias = np.zeros(codes.dims[0], np.float32)
        bias[0] = 1e-30
        name = f"{node.output[0]}.bias"
        proto.graph.initializer.append(onnx.numpy_helper.from_array(bias, name))
        node.input[2:] = [name]
    drop_unread(proto)


def _skips(node: onnx.NodeProto) -> bool:
    """Whether it is a 1x1 convolution that leaves pixels out."""
    kernel = attribute(node, "kernel_shape", [])
    return (
        node.op_type == "Conv"
        and set(kernel) == {1}
        and set(attribute(node, "strides", [1] * len(kernel))) != {1}
    )


def _wider(node: onnx.NodeProto, axes: int) -> None:
    """Makes room for another tap at the end of a 1x1 convolution's last axis."""
    pads = attribute(node, "pads", [0] * 2 * axes)
    _drop(node, "kernel_shape", "pads")
    for name, numbers in (
        ("kernel_shape", [*[1] * (axes - 1), 2]),
        ("pads", [*pads[:-1], pads[-1] + 1]),
    ):
        node.attribute.append(onnx.helper.make_attribute(name, numbers))


def _drop(node: onnx.NodeProto, *names: str) -> None:
    kept = [a for a in node.attribute if a.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _padded(proto: onnx.ModelProto, node: onnx.NodeProto, pads: list[int]) -> onnx.NodeProto:
    """A Pad with zeros, whose output the node reads now."""
    x, name, half = node.input[0], f"{node.output[0]}.padded", len(pads) // 2
    ends = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(ends, f"{name}.pads"))
    node.input[0] = name
    return onnx.helper.make_node("Pad", [x, f"{name}.pads"], [name], name=name)


def widen(proto: onnx.ModelProto) -> None:
    """Makes each Cast of dequantized codes to float32 a DequantizeLinear with a float32 scale.

    A layer that stays in float32 in a float16 file reads its codes so. With a Cast between them it
    would not run in integers."""
    index = Index(proto)
    for node in proto.graph.node:
        dq = index.made.get(node.input[0]) if node.op_type == "Cast" else None
        if dq is None or dq.op_type != DQ or attribute(node, "to", 0) != onnx.TensorProto.FLOAT:
            continue
        scale = index.value(dq.input[1])
        if scale is None or scale.dtype != np.float16:
            continue
        name = f"{node.output[0]}.scale"
        proto.graph.initializer.append(onnx.numpy_helper.from_array(scale.astype(np.float32), name))
        wide = onnx.helper.make_node(
            DQ, [dq.input[0], name, *dq.input[2:]], list(node.output), name=node.name
        )
        wide.attribute.extend(dq.attribute)
        node.CopyFrom(wide)
    read = {i for node in proto.graph.node for i in node.input} | index.outputs
    kept = [n for n in proto.graph.node if n.op_type != DQ or not read.isdisjoint(n.output)]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    drop_unread(proto)


def narrow(proto: onnx.ModelProto, names: set[str]) -> None:
    """Stores the codes of these weights as int4, two per byte, with an int4 zero point."""
    held = {t.name: t for t in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in {
            f"{n}.codes" for n in names
        } & set(held):
            codes, zero = held[node.input[0]], held[node.input[2]]
            values = onnx.numpy_helper.to_array(codes)
            for info in proto.graph.value_info:
                if info.name == codes.name:
                    info.type.tensor_type.elem_type = onnx.TensorProto.INT4
            codes.CopyFrom(
                onnx.helper.make_tensor(
                    codes.name, onnx.TensorProto.INT4, values.shape, values.ravel()
                )
            )
            shape, node.input[2] = tuple(zero.dims), f"{node.input[0]}.zero"
            zeros = [0] * math.prod(shape)
            proto.graph.initializer.append(
                onnx.helper.make_tensor(node.input[2], onnx.TensorProto.INT4, shape, zeros)
            )
    drop_unread(proto)


def drop_unread(proto: onnx.ModelProto) -> None:
    """Removes constants that no node reads, and that are no outputs."""
    read = {output.name for output in proto.graph.output}
    for node in proto.graph.node:
        read.update(node.input, captured(node))
    kept = [t for t in proto.graph.initializer if t.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def keep_in_float(proto: onnx.ModelProto, every: bool) -> None:
    """Writes the biases of layers with float weights, or of `every` layer, as sign(b) * |b|.

    The sign is an integer and |b| its scale. Otherwise ONNX Runtime rounds the float weights of a
    layer between two quantizers to int8, with one scale per tensor, and in half precision it rounds
    biases to integers whose step is too small for float16. It leaves a layer alone whose bias is an
    integer already."""
    held = {t.name: t for t in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and (every or node.input[1] in held):
            given = held.get(node.input[2]) if len(node.input) > 2 else None
            if given is not None or (
                len(node.input) == 2 and node.input[1] in held and node.op_type != "Gemm"
            ):
                nodes.append(_signed_bias(proto, node, given, held))
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    drop_unread(proto)


def _signed_bias(
    proto: onnx.ModelProto,
    node: onnx.NodeProto,
    given: onnx.TensorProto | None,
    held: dict[str, onnx.TensorProto],
) -> onnx.NodeProto:
    if given is None:
        weight = onnx.numpy_helper.to_array(held[node.input[1]])
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        width = weight.shape[0] if node.op_type == "Conv" else weight.shape[1] * groups
        bias = np.zeros(width, weight.dtype)
    else:
        bias = onnx.numpy_helper.to_array(given)
    name = f"{node.output[0]}.bias"
    scale = np.where(bias == 0, np.ones_like(bias), np.abs(bias))
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.sign(bias).astype(np.int32), f"{name}.sign")
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}.scale"))
    node.input[2:] = [name]
    return onnx.helper.make_node(
        "DequantizeLinear", [f"{name}.sign", f"{name}.scale"], [name], name=name, axis=0
    )
