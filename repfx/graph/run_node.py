"""Runs single nodes of a graph on given values."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import fx, nn


def call(node: fx.Node, value: Callable[[fx.Node], Any], module: nn.Module | None = None) -> Any:
    """Runs the function, method or `module` that a node calls, on the inputs that `value` gives."""
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda v: value(v) if isinstance(v, fx.Node) else v
    )
    args, kwargs = mutable(args), mutable(kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    f: Any = node.target if module is None else module
    return f(*args, **kwargs)


def mutable(value: Any) -> Any:
    """The same lists, tuples and dicts, but none that fx keeps from being changed.

    A module that a graph calls may write into the list it gets."""
    if isinstance(value, list):
        return [mutable(v) for v in value]
    if type(value) is tuple:
        return tuple(map(mutable, value))
    if isinstance(value, dict):
        return {k: mutable(v) for k, v in value.items()}
    return value


class Interpreter(fx.Interpreter):
    """fx's, with lists that modules may write into."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_module(target, mutable(args), mutable(kwargs))


def step(module: fx.GraphModule, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """Runs a node of this module, any but an input or the output."""
    if node.op == "get_attr":
        return attrgetter(str(node.target))(module)
    return call(
        node, value, module.get_submodule(str(node.target)) if node.op == "call_module" else None
    )


def last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that no later node reads."""
    index = {n: i for i, n in enumerate(graph.nodes)}
    found: dict[fx.Node, list[fx.Node]] = {n: [] for n in index}
    for n in index:
        found[max(n.users, default=n, key=index.__getitem__)].append(n)
    return found
