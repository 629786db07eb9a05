"""Which outputs of a file are values of a sigmoid or softmax: shares of 1, however small.

A runtime computes those with an error of some units in the last place of 1, not of the value."""

from __future__ import annotations

import onnx

SQUASHES = {"Sigmoid", "HardSigmoid", "Softmax"}
MOVES = {
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast", "Expand"),
    *("Slice", "Gather", "GatherElements", "GatherND", "TopK", "Mul", "Where", "Concat", "Split"),
}


def shares(proto: onnx.ModelProto) -> tuple[bool, ...]:
    """For each output, whether it is such a value, only moved, chosen or masked since."""
    makers = {out: node for node in proto.graph.node for out in node.output}
    return tuple(_is_share(output.name, makers) for output in proto.graph.output)


def _is_share(name: str, makers: dict[str, onnx.NodeProto]) -> bool:
    todo, seen = [name], {name}
    while todo:
        node = makers.get(todo.pop())
        if node is not None and node.op_type in SQUASHES:
            return True
        new = [n for n in node.input if n not in seen] if node and node.op_type in MOVES else []
        seen.update(new)
        todo += new
    return False
