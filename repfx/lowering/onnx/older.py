"""Opsets 13 to 17: rewrites the finished graph, exported in opset 18, in older operators.

Most operators stay the same or only lose an attribute. (`onnx.version_converter` cannot convert
the axes of ReduceMean, Split or Pad down, and below 14 not even Add.) Tensors keep their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, defs, helper, numpy_helper

from repfx.errors import InputError
from repfx.lowering.onnx import finish
from repfx.lowering.onnx.index import Index, called, subgraphs

OLDEST, WRITTEN = 13, 18

# Newer attributes, each with the value at which the operator does what it did without it.
_AS_BEFORE: dict[str, Any] = {
    "allowzero": 0,
    "antialias": 0,
    "ceil_mode": 0,
    "keep_aspect_ratio_policy": b"stretch",
    "layout": 0,
    "noop_with_empty_axes": 0,
    "reduction": b"none",
    "training_mode": 0,
}


def to_opset(proto: onnx.ModelProto, opset: int) -> None:
    """Rewrites the graph in place in the operators of the opset and the file format of its time.

    Raises InputError naming an operator that has no form in that opset."""
    if opset < WRITTEN:
        _rewrite(proto.graph, Index(proto), opset)
        for entry in proto.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = opset
        finish.drop_unread(proto)
    proto.ir_version = helper.find_min_ir_version_for(list(proto.opset_import))


def _rewrite(graph: onnx.GraphProto, index: Index, opset: int) -> None:
    drafts = [_Draft(node, index, opset) for node in graph.node]
    nodes = [made for draft in drafts for made in draft.older()]
    graph.initializer.extend(constant for draft in drafts for constant in draft.constants)
    del graph.node[:]
    graph.node.extend(nodes)


class _Draft:
    """One node on its way to an older opset.

    It holds the node's new inputs and attributes, or the nodes that replace it, and their
    constants."""

    def __init__(self, node: NodeProto, index: Index, opset: int) -> None:
        self.node, self.index, self.opset = node, index, opset
        self.inputs = list(node.input)
        self.attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def older(self) -> list[NodeProto]:
        node, kind = self.node, self.node.op_type
        if next(subgraphs(node), None) is not None:
            raise self.error("with a graph inside it")
        young, old = _schema(kind, WRITTEN), _schema(kind, self.opset)
        if (
            node.domain
            or young is None
            or (old is not None and old.since_version == young.since_version)
        ):
            return [node]
        if kind in _WRITE:
            _WRITE[kind](self)
        if self.nodes:
            return self.nodes
        if old is None:
            first = min(
                s.since_version
                for s in defs.get_all_schemas_with_history()
                if (s.domain, s.name) == ("", kind)
            )
            raise self.error(f"came with opset {first} and")
        for name in set(young.attributes) - set(old.attributes):
            default = young.attributes[name].default_value
            value = self.attrs.pop(
                name, helper.get_attribute_value(default) if default.type else None
            )
            if value is not None and value != _AS_BEFORE.get(name):
                raise self.error(
                    f"with {name}={value.decode() if isinstance(value, bytes) else value}"
                )
        return [helper.make_node(kind, self.inputs, node.output, name=node.name, **self.attrs)]

    def error(self, what: str) -> InputError:
        return InputError(
            f"{self.node.op_type} {what} has no form in opset {self.opset} ({called(self.node)})"
        )

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        self.constants.append(
            numpy_helper.from_array(np.asarray(value, dtype), f"{self.node.output[0]}.{name}")
        )
        return self.constants[-1].name

    def op(self, kind: str, *inputs: str, to: str = "", **attrs: Any) -> str:
        """Adds a node that replaces this one, or, with `to`, a node before it that makes `to`."""
        dot = f".{to}" if to else ""
        made = f"{self.node.output[0]}{dot}"
        self.nodes.append(
            helper.make_node(kind, inputs, [made], name=called(self.node) + dot, **attrs)
        )
        return made

    def whole(self, i: int) -> list[int]:
        """The integers in a constant input."""
        value = self.index.value(self.inputs[i])
        if value is None:
            raise self.error(f"with a computed input {i}")
        return [int(v) for v in value.ravel()]

    def shape(self) -> tuple[int | None, ...]:
        shape = self.index.shape(self.inputs[0])
        if shape is None:
            raise self.error("on a tensor of unknown shape")
        return shape


def _schema(kind: str, opset: int) -> defs.OpSchema | None:
    try:
        return defs.get_schema(kind, opset, "")
    except defs.SchemaError:
        return None


def _reduce(draft: _Draft) -> None:
    """In older opsets the axes are an attribute."""
    if len(draft.inputs) > 1:
        draft.attrs["axes"] = draft.whole(1)
        draft.attrs.pop("noop_with_empty_axes", None)
        del draft.inputs[1:]


def _split(draft: _Draft) -> None:
    """In older opsets the sizes of the parts are written out."""
    count = draft.attrs.pop("num_outputs", None)
    if count is not None:
        size = draft.shape()[draft.attrs.get("axis", 0)]
        if size is None:
            raise draft.error("along a dynamic dimension")
        part = -(-size // count)
        draft.inputs[1:] = [
            draft.constant("sizes", [part] * (count - 1) + [size - part * (count - 1)])
        ]


def _pad(draft: _Draft) -> None:
    """In older opsets the pads cover every axis."""
    if len(draft.inputs) > 3:
        rank, axes, pads = len(draft.shape()), draft.whole(3), draft.whole(1)
        full = [0] * (2 * rank)
        for i, axis in enumerate(axes):
            full[axis % rank], full[axis % rank + rank] = pads[i], pads[i + len(axes)]
        draft.inputs[1] = draft.constant("pads", full)
        del draft.inputs[3:]


def _shape(draft: _Draft) -> None:
    """Some of the sizes are a slice of all sizes."""
    ends = [draft.attrs.get("start", 0)], [draft.attrs.get("end", 2**63 - 1)], [0]
    names = [
        draft.constant(name, value)
        for name, value in zip(("start", "end", "axis"), ends, strict=True)
    ]
    draft.op("Slice", draft.op("Shape", draft.inputs[0], to="all"), *names)


def _reshape(draft: _Draft) -> None:
    """In older opsets a 0 always copies a dimension; computed shapes of images have no 0."""
    value = draft.index.value(draft.inputs[1])
    if value is None or value.all():
        draft.attrs.pop("allowzero", None)


def _hard_swish(draft: _Draft) -> None:
    x = draft.inputs[0]
    draft.op("Mul", x, draft.op("HardSigmoid", x, to="gate", alpha=1 / 6, beta=0.5))


def _mish(draft: _Draft) -> None:
    x = draft.inputs[0]
    draft.op("Mul", x, draft.op("Tanh", draft.op("Softplus", x, to="softplus"), to="gate"))


def _layer_norm(draft: _Draft) -> None:
    """Written in the operators that older exporters used, which runtimes recognize."""
    if any(draft.node.output[1:]):
        raise draft.error("with more than one output")
    (x, scale, *bias), axis = draft.inputs, draft.attrs.get("axis", -1)
    axes = list(range(axis if axis < 0 else axis - len(draft.shape()), 0))
    deviation = draft.op("Sub", x, draft.op("ReduceMean", x, to="mean", axes=axes), to="deviation")
    square = draft.op("Pow", deviation, draft.constant("two", 2, np.float32), to="square")
    variance = draft.op("ReduceMean", square, to="variance", axes=axes)
    epsilon = draft.constant("epsilon", draft.attrs.get("epsilon", 1e-5), np.float32)
    norm = draft.op("Sqrt", draft.op("Add", variance, epsilon, to="above"), to="norm")
    y = draft.op("Div", deviation, norm, to="normal")
    if bias:
        y, scale = draft.op("Mul", y, scale, to="scaled"), bias[0]
    draft.op("Add" if bias else "Mul", y, scale)


_REDUCES = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_WRITE: dict[str, Callable[[_Draft], None]] = {
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCES), _reduce),
    "HardSwish": _hard_swish,
    "LayerNormalization": _layer_norm,
    "Mish": _mish,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": _shape,
    "Split": _split,
}
