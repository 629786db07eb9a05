"""Running single nodes of a graph on values of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn


def call(node: fx.Node, value: Callable[[fx.Node], Any], module: nn.Module | None = None) -> Any:
    """What a node computes with its inputs from `value`: a function, a method, or `module`, which the node calls."""
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda v: value(v) if isinstance(v, fx.Node) else v)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    f: Any = node.target if module is None else module
    return f(*args, **kwargs)
