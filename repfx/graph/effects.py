"""Operators that change a value they read, which data flow alone does not show."""

from __future__ import annotations

import torch
from torch import fx, nn

_WRITERS = {"iadd", "isub", "imul", "itruediv", "setitem"}


def writes(node: fx.Node, module: nn.Module | None = None) -> bool:
    """Whether the node overwrites its first argument. `module` is what a call_module node calls."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = str(getattr(node.target, "__name__", node.target))
    return (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True or name in _WRITERS


def is_dead(node: fx.Node) -> bool:
    """Whether taking the node out changes nothing. A module's call may have an effect in training, so it stays."""
    kinds = ("get_attr", "call_function", "call_method")
    return node.op in kinds and not node.users and not node.is_impure() and not writes(node)
