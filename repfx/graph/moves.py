"""What gives the values of its input in other places, or fewer of them, and computes nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from repfx.graph.ops import Map, Sum
from repfx.graph.view import GraphView

aten = torch.ops.aten
_MAXIMA: set[Any] = {
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    torch.max_pool1d,
    torch.max_pool2d,
    torch.max_pool3d,
}
_MAXIMA |= {aten.max_pool2d.default, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d}

FLATTENS: set[Any] = {nn.Flatten, torch.flatten, "flatten"}
_MOVES: set[Any] = {
    nn.PixelShuffle,
    F.pixel_shuffle,
    nn.PixelUnshuffle,
    F.pixel_unshuffle,
    nn.UpsamplingNearest2d,
}
_MOVES |= FLATTENS
_RESIZES: set[Any] = {nn.Upsample, F.interpolate}
_JOINS: set[Any] = {
    torch.cat,
    torch.concat,
    torch.concatenate,
    torch.stack,
    torch.hstack,
    torch.vstack,
    torch.dstack,
}


def is_max_pool(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) in _MAXIMA
    return node.op == "call_function" and node.target in _MAXIMA


def kind_of(view: GraphView, node: fx.Node) -> Any:
    """What a node calls: a function, a method's name or the type of a module."""
    return type(view.modules[str(node.target)]) if node.op == "call_module" else node.target


def moves(view: GraphView, node: fx.Node) -> bool:
    """Whether it gives values of its input in other places."""
    op, kind = view.ops[node], kind_of(view, node)
    if kind in _RESIZES:
        module = view.modules.get(str(node.target)) if node.op == "call_module" else None
        mode = (
            getattr(module, "mode", None)
            or node.kwargs.get("mode")
            or (*node.args, *["nearest"] * 4)[3]
        )
        return mode in ("nearest", "nearest-exact")
    same = is_same(view, node) or (
        isinstance(op, Sum) and len(op.terms) == 1 and op.terms[0][1] == 1
    )
    return same or kind in _MOVES or is_max_pool(view.module, node)


def is_same(view: GraphView, node: fx.Node) -> bool:
    """Whether it gives its input as it is, in eval mode."""
    op = view.ops[node]
    return isinstance(op, Map) and op.kind in ("identity", "dropout")


def joins(view: GraphView, node: fx.Node) -> bool:
    """Whether it is a concatenation, of channels or along another axis."""
    op = view.ops[node]
    return (isinstance(op, Sum) and op.kind == "concat") or kind_of(view, node) in _JOINS


def moved_from(view: GraphView, value: fx.Node) -> fx.Node:
    """The value that this one was before it was moved, up to a concatenation."""
    while not joins(view, value):
        inputs = view.data_inputs(value)
        if len(inputs) != 1 or not moves(view, value):
            break
        (value,) = inputs
    return value


def joined(view: GraphView, value: fx.Node) -> fx.Node | None:
    """The concatenation whose values this one holds, if any."""
    value = moved_from(view, value)
    return value if joins(view, value) else None


def readers(view: GraphView, value: fx.Node) -> list[fx.Node]:
    """Who computes with a value, perhaps after it was moved."""
    found: list[fx.Node] = []
    for node in value.users:
        found += readers(view, node) if moves(view, node) else [node]
    return found
