"""Which nodes make and read each tensor of an ONNX graph, and what is known without running it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from repfx.graph.traits import Trait
from repfx.graph.vocabulary import with_trait

Q, DQ = "QuantizeLinear", "DequantizeLinear"
IDENTITY = with_trait(Trait.SAME)
# Codes pass through these unchanged, so runtimes move Q and DQ across them.
MOVES = with_trait(Trait.SAME | Trait.MOVES | Trait.PADS)
WEIGHTED = with_trait(Trait.LAYER)


class Layer(NamedTuple):
    """A convolution or linear node and its tensors; `weight` is "" if no operand is constant."""

    node: NodeProto
    x: str
    weight: str
    bias: str


class Index:
    """A model's main graph by tensor name. What an incomplete graph lacks is None or empty."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.nodes: list[NodeProto] = [n for n in model.graph.node if n.domain in ("", "ai.onnx")]
        self.opset = max(
            (o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1
        )
        self.outputs = {o.name for o in self.graph.output}
        self.made: dict[str, NodeProto] = {}
        self.users: dict[str, list[NodeProto]] = defaultdict(list)
        self.tensors: dict[str, TensorProto] = {t.name: t for t in self.graph.initializer}
        self.fixed: set[str] = set(self.tensors) | {
            s.values.name for s in self.graph.sparse_initializer
        }
        self._values: dict[str, np.ndarray | None] = {}
        self._dqs: dict[str, NodeProto | None] = {}
        for node in self.graph.node:
            read = [*node.input, *captured(node)]
            for name in dict.fromkeys(read):
                self.users[name].append(node)
            for name in node.output:
                self.made[name] = node
            given = [i for i in read if i]
            if node.op_type == "Constant" or (given and self.fixed.issuperset(given)):
                self.fixed.update(node.output)
            if node.op_type == "Constant" and node.output:
                self._add_constant(node)
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.types: dict[str, int] = {}
        self._infer()
        self.layers = [
            layer for n in self.nodes if n.op_type in WEIGHTED and (layer := self._layer(n))
        ]
        self.quantizes = [n for n in self.nodes if n.op_type == Q]
        self.dequantizes = [n for n in self.nodes if n.op_type == DQ]

    def _add_constant(self, node: NodeProto) -> None:
        for a in node.attribute:
            if a.name == "value":
                self.tensors[node.output[0]] = a.t
            elif a.name in ("value_float", "value_floats"):
                self._values[node.output[0]] = np.array(
                    onnx.helper.get_attribute_value(a), np.float32
                )
            elif a.name in ("value_int", "value_ints"):
                self._values[node.output[0]] = np.array(
                    onnx.helper.get_attribute_value(a), np.int64
                )

    def _infer(self) -> None:
        try:
            graph = onnx.shape_inference.infer_shapes(self.model).graph
        except Exception:  # an odd graph: rules that need shapes find nothing
            graph = self.graph
        for info in (*graph.input, *graph.value_info, *graph.output):
            if info.type.HasField("tensor_type"):
                tensor = info.type.tensor_type
                self.types[info.name] = tensor.elem_type
                if tensor.HasField("shape"):
                    self.shapes[info.name] = known(tensor.shape)
        for name, t in self.tensors.items():
            self.types[name], self.shapes[name] = t.data_type, tuple(t.dims)

    def _layer(self, node: NodeProto) -> Layer | None:
        x, w = arg(node, 0), arg(node, 1)
        if not x or not w or (x in self.fixed and w in self.fixed):
            return None
        if node.op_type == "MatMul" and x in self.fixed:
            x, w = w, x
        return Layer(node, x, w if w in self.fixed else "", arg(node, 2))

    def source(self, name: str, through: Collection[str] = IDENTITY) -> str:
        """The tensor that the named one comes from, looking up past nodes of kinds in `through`."""
        seen = set()
        while name in self.made and self.made[name].op_type in through and name not in seen:
            seen.add(name)
            name = arg(self.made[name], 0)
        return name

    def maker(self, name: str, through: Collection[str] = IDENTITY) -> NodeProto | None:
        return self.made.get(self.source(name, through))

    def dq(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that feeds the tensor, directly or past moves and casts of values.

        TensorRT runs a layer behind such a cast in INT8. Every input of a Concat must have one; the
        first is returned."""
        name = self.source(name, {*MOVES, "Cast"})
        if name not in self._dqs:
            self._dqs[name] = None  # ends the search where the graph has a cycle
            node = self.made.get(name)
            if node is not None and node.op_type == "Concat":
                found = [self.dq(i) for i in node.input]
                node = found[0] if found and None not in found else None
            self._dqs[name] = node if node is not None and node.op_type == DQ else None
        return self._dqs[name]

    def q(self, dq: NodeProto) -> NodeProto | None:
        """The QuantizeLinear before a DequantizeLinear."""
        node = self.maker(arg(dq, 0))
        return node if node is not None and node.op_type == Q else None

    def readers(self, name: str, through: Collection[str] = IDENTITY) -> Iterator[NodeProto]:
        """The nodes that read the tensor, looking past nodes of the kinds in `through`."""
        todo, seen = [name], {name}
        while todo:
            for node in self.users.get(todo.pop(), ()):
                if node.op_type not in through:
                    yield node
                    continue
                todo += [o for o in node.output if o not in seen]
                seen.update(node.output)

    def value(self, name: str) -> np.ndarray | None:
        """The value of a constant; None where the tensor is computed or cannot be read."""
        name = self.source(name)
        if name not in self._values:
            tensor, value = self.tensors.get(name), None
            if tensor is not None:
                try:
                    value = numpy_helper.to_array(tensor)
                except Exception:  # a type that numpy does not know, or truncated data
                    value = None
            self._values[name] = value
        return self._values[name]

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        return self.shapes.get(name) or self.shapes.get(self.source(name))

    def size(self, name: str) -> int | None:
        """The number of elements, None where it is not known."""
        shape = self.shapes.get(self.source(name))
        if shape is None:
            value = self.value(name)
            return None if value is None else value.size
        return None if None in shape else int(np.prod([d or 0 for d in shape]))

    def type(self, name: str) -> int:
        return self.types.get(name) or self.types.get(self.source(name), 0)

    def one_scale(self, a: NodeProto, b: NodeProto) -> bool:
        """Whether two Q or DQ nodes have the same scale: the same tensor, or equal constants."""
        first, second = self.source(arg(a, 1)), self.source(arg(b, 1))
        if first == second:
            return True
        one, two = self.value(first), self.value(second)
        return (
            one is not None
            and two is not None
            and one.size == two.size
            and bool(np.all(one.ravel() == two.ravel()))
        )

    def of_bias(self, dq: NodeProto) -> bool:
        """Whether a DQ has int32 codes, which tools that also quantize the bias write."""
        return TensorProto.INT32 in (self.type(arg(dq, 0)), self.type(arg(dq, 2)))


def arg(node: NodeProto, i: int) -> str:
    """The name of an input, "" where the node leaves it out."""
    return node.input[i] if i < len(node.input) else ""


def out(node: NodeProto) -> str:
    return node.output[0] if node.output else ""


def called(node: NodeProto) -> str:
    """The node's name, or else that of its output or operator."""
    return node.name or out(node) or node.op_type


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """An attribute that is a whole number, or a list of them where `default` is a sequence.

    Raises ValueError naming the node where it is anything else."""
    for a in node.attribute:
        if a.name == name:
            value = onnx.helper.get_attribute_value(a)
            whole = [value] if isinstance(default, int) else value
            if not isinstance(whole, list) or not all(isinstance(v, int) for v in whole):
                wanted = "a whole number" if isinstance(default, int) else "a list of whole numbers"
                raise ValueError(
                    f"{name} of {called(node)} ({node.op_type}) is {value!r}, not {wanted}"
                )
            return value
    return default


def known(shape: onnx.TensorShapeProto) -> tuple[int | None, ...]:
    """The dimensions, with None for a dynamic one: a name, -1 or nothing in the file."""
    return tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in shape.dim
    )


def subgraphs(node: NodeProto) -> Iterator[onnx.GraphProto]:
    """The branches of an If, or the body of a Loop or Scan."""
    for a in node.attribute:
        if a.HasField("g"):
            yield a.g
        yield from a.graphs


def captured(node: NodeProto) -> list[str]:
    """The tensors of the outer graph that a node's subgraphs read."""
    found: set[str] = set()
    for graph in subgraphs(node):
        inside = (
            {i.name for i in graph.input}
            | {t.name for t in graph.initializer}
            | {o for n in graph.node for o in n.output}
        )
        read = {i for n in graph.node for i in (*n.input, *captured(n))} | {
            o.name for o in graph.output
        }
        found |= read - inside - {""}
    return sorted(found)
