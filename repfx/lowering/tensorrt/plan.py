"""What an engine consists of, read from the list of layers that the builder of TensorRT logs.

Without a GPU there is no inspector, but a verbose builder logs the same list, a line a kernel:

    Name: ..., LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,3,96,96], ...,
    Datatype: Int8, ... } ], Constants: [...], Outputs: [...], ..., Metadata: [ONNX Layer: conv]"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from repfx.lowering.tensorrt.inspector import precision_named

POINTWISE = "kgen"
LAYERS = frozenset({"correlation", "deconv", "gemm", "runtime_fusion"})
# They order the streams or compute shapes, and touch no tensor.
_NO_WORK = frozenset({"shape_call", "signal", "wait"})
_BYTES = {"FP32": 4, "FP16": 2, "BF16": 2, "INT64": 8, "INT32": 4, "FP8": 1, "INT4": 0.5}


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    `kind`: the builder's word for it, such as correlation. `precision`: of both factors for a
    convolution or matrix product, or the one that is not INT8, else of its output. `reads`,
    `writes`: bytes of activations for one image. `nodes`: the ONNX nodes that it computes, as far
    as the builder says."""

    name: str
    kind: str
    precision: str
    reads: int
    writes: int
    nodes: tuple[str, ...]

    @property
    def is_layer(self) -> bool:
        """Whether it is a convolution or a matrix product."""
        return self.kind in LAYERS

    @property
    def is_reformat(self) -> bool:
        return "reformat" in self.kind.lower()


@dataclass(frozen=True)
class Plan:
    """The kernels of an engine, in order."""

    kernels: tuple[Kernel, ...]

    @property
    def layers(self) -> dict[str, int]:
        """The convolutions and matrix products by precision."""
        return dict(sorted(Counter(k.precision for k in self.kernels if k.is_layer).items()))

    def precisions(self, nodes: Iterable[str]) -> dict[str, str]:
        """The precision in which each of these ONNX layers is computed; "?" if no kernel names it.

        A small one may be computed in a pointwise kernel, which is always in float."""
        found: dict[str, str] = {}
        for node in nodes:
            mine = [k for k in self.kernels if node in k.nodes]
            kinds = [k.precision for k in mine if k.is_layer]
            floats = [k.precision for k in mine if k.precision != "INT8"]
            found[node] = next(iter([*kinds, *floats]), "?")
        return found

    @property
    def pointwise(self) -> int:
        """The kernels that compute each value on its own."""
        return sum(k.kind == POINTWISE for k in self.kernels)

    @property
    def reformats(self) -> int:
        return sum(k.is_reformat for k in self.kernels)

    @property
    def traffic(self) -> int:
        """Bytes of activations that all kernels read and write for one image."""
        return sum(k.reads + k.writes for k in self.kernels)


def plan_from(lines: Iterable[str]) -> Plan:
    """The plan in the lines of a builder's log. Other lines are passed over.

    >>> line = ("Name: c, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,4,2,2], "
    ...     "Datatype: Int8, Format: (NHWC) }], Constants: [ { Name: w, Dimensions: [8,4,1,1], "
    ...     "Datatype: Int8 }], Outputs: [ { Name: y, Dimensions: [-1,8,2,2], Datatype: Float } ], "
    ...     "TacticName: , Metadata: [ONNX Layer: conv]")
    >>> (kernel,) = plan_from([line]).kernels
    >>> kernel.precision, kernel.reads, kernel.writes, kernel.nodes
    ('INT8', 16, 128, ('conv',))
    """
    return Plan(tuple(kernel for line in lines if (kernel := _kernel(line)) is not None))


def _kernel(line: str) -> Kernel | None:
    head = re.search(r"Name: (.*?), LayerType: (\w+)", line)
    if head is None or head[2] in _NO_WORK:
        return None
    inputs, constants, outputs = (
        _tensors(line, word) for word in ("Inputs", "Constants", "Outputs")
    )
    # A layer runs in integers if both its factors are: the input, and a constant or a second input.
    factors = [*inputs[:1], *(constants or inputs[1:])[:1]] if head[2] in LAYERS else outputs[:1]
    kinds = [kind for _, kind in factors]
    kind = next((k for k in kinds if k != "INT8"), next(iter(kinds), "?"))
    return Kernel(
        head[1],
        head[2],
        kind,
        sum(map(_size, inputs)),
        sum(map(_size, outputs)),
        tuple(re.findall(r"\[ONNX Layer: (.*?)\]", line)),
    )


def _tensors(line: str, word: str) -> list[tuple[tuple[int, ...], str]]:
    """The shape and type of each tensor in one of the lists of a line."""
    start = line.find(f"{word}: [")
    if start < 0:
        return []
    text = line[start:].split("}]")[0] if f"{word}: [ {{" in line else ""
    found = re.findall(r"Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)", text)
    return [
        (tuple(int(d) for d in dims.split(",") if d), precision_named(kind)) for dims, kind in found
    ]


def _size(tensor: tuple[tuple[int, ...], str]) -> int:
    shape, kind = tensor
    return math.ceil(math.prod(1 if d < 0 else d for d in shape) * _BYTES.get(kind, 1))
