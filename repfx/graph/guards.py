"""Guards: what a graph takes for granted about the sizes of its inputs, checked at every call.

    if x.shape[2] % 32: raise ...      ->      holds(x.size(2) % 32, "==", 0, "...")

A model's Python may look at a size and decide what to do. The graph has the operators of one
decision, so it is right only for inputs that lead to the same one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from repfx.errors import InputError

RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_SIGNS = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
}


def holds(left: Any, relation: str, right: Any, fact: str) -> None:
    """Raises InputError unless left and right are related as they were when the model was traced.

    `fact` says the same in words. A number may be in a tensor that is computed from sizes, such as
    a mask. Compilers cannot look into tensors, but they know the sizes that they compile for."""
    if isinstance(left, Tensor) and torch.compiler.is_compiling():
        return
    if not RELATIONS[relation](left, right):
        raise InputError(
            f"this graph was traced with {fact}, but here {left} {relation} {right} does not hold: "
            "transform the model again with an example of this size"
        )


fx.node.has_side_effect(holds)  # so that nothing takes it for dead code


def is_guard(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is holds


def facts_of(graph: fx.Graph) -> list[str]:
    """What the guards of a graph check, in words."""
    return [str(node.args[3]) for node in graph.nodes if is_guard(node)]


def in_words(value: Any) -> str:
    """A size as a reader would write it.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> in_words(graph.call_function(operator.mod, (graph.call_method("size", (x, 2)), 32)))
    'x.size(2) % 32'
    """
    if not isinstance(value, fx.Node) or value.op == "placeholder":
        return str(value)
    if value.op == "call_method" and value.target in ("size", "numel"):
        rest = ", ".join(map(in_words, value.args[1:]))
        return f"{value.args[0]}.{value.target}({rest})"
    number = value.target in _SIGNS or getattr(value.target, "__module__", "") == "math"
    number = number or value.target is len
    if value.op != "call_function" or not number:
        return value.name
    parts = [in_words(a) for a in value.args]
    if value.target not in _SIGNS:
        return f"{getattr(value.target, '__name__', value.target)}({', '.join(parts)})"
    inner = [
        f"({text})" if isinstance(a, fx.Node) and a.target in _SIGNS else text
        for a, text in zip(value.args, parts, strict=True)
    ]
    return f" {_SIGNS[value.target]} ".join(inner)
