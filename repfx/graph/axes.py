"""Follows the axes of values through a graph: where a node puts them, and which have one size."""

from __future__ import annotations

from typing import Any

from torch import fx

from repfx.graph.calls import call_of
from repfx.graph.ops import Map, Sum
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of, overrides
from repfx.graph.wiring import At, Size, Sizes, Wiring, reshape_as, same


def input_of(node: fx.Node) -> fx.Node | None:
    """The first argument of a call, if it is a value."""
    named = (node.kwargs[k] for k in ("input", "self") if k in node.kwargs)
    first = node.args[0] if node.args else next(named, None)
    return first if isinstance(first, fx.Node) else None


def wiring_of(
    view: GraphView,
    node: fx.Node,
    rank: int | None = None,
    channels: tuple[int, int] | None = None,
) -> Wiring | None:
    """How a node moves the axes of its first argument; None if unknown.

    The argument's rank may be given, and one of its axes with its size, as `channels`."""
    op, module, x = view.ops[node], view.module_of(node), input_of(node)
    rank = rank if x is None or view.rank(x) is None else view.rank(x)
    hooked = module is not None and bool(module._forward_hooks or module._forward_pre_hooks)
    dropped = isinstance(op, Map) and op.kind == "dropout"  # in eval mode it writes nothing
    if x is None or rank is None or hooked or (node in view.writes.by and not dropped):
        return None
    at = At(rank, lambda v: _size(view, v), lambda v: _sizes(view, v), channels)
    if isinstance(op, Map) and op.kind in ("identity", "dropout"):
        return same(at) if op.x is x else None
    called = call_of(node, module)
    if called is None or called.kind.wiring is None:
        return None
    try:
        return called.kind.wiring(at, *called.args, **called.kwargs)
    except (TypeError, ValueError, IndexError, ZeroDivisionError):  # arguments that are not static
        return None


def input_rank(view: GraphView, node: fx.Node, rank: int) -> int | None:
    """The rank of a node's first argument. `rank` is that of its output.

    It may be unknown to the view, and follow from the output's."""
    x = input_of(node)
    known = None if x is None else view.rank(x)
    if known is not None:
        return known
    wired = {n: wiring_of(view, node, n) for n in range(1, 7)}
    fits = [n for n, w in wired.items() if w is not None and len(w.sources) == rank]
    return fits[0] if len(fits) == 1 else None


def reads_size(view: GraphView, user: fx.Node, value: fx.Node) -> bool:
    """Whether a user of a value reads only its shape, its type or its device."""
    if Trait.MEASURES in view.traits(user):
        return True
    shaped = view.kind(user).wiring is reshape_as or user.target == "expand_as"
    return shaped and user.args[0] is not value and value in user.args[1:]


def joined_along(view: GraphView, node: fx.Node) -> int | None:
    """The axis along which a concatenation joins values; None for other nodes, or if unknown."""
    op, rank = view.ops[node], view.rank(node)
    if rank is None or not isinstance(op, Sum) or Trait.JOINS not in view.traits(node):
        return None
    given = [v for v in (*node.args[1:2], *node.kwargs.values()) if isinstance(v, int)]
    return (given or [0])[0] % rank


def layer_op(view: GraphView, node: fx.Node) -> Map | None:
    """The Map of a convolution or linear layer that may take an affine; None for other nodes.

    A transposed convolution that is told its output's size is opaque, but it takes one as well."""
    op, module = view.ops[node], view.module_of(node)
    if isinstance(op, Map):
        return op if op.own is not None and op.macs else None
    kind = view.kind(node)
    sized = kind.name == "conv_transpose" and len(node.args) == 2 - len(node.kwargs)
    sized = sized and set(node.kwargs) <= {"output_size"}
    if module is None or kind.leaf is None or kind.rule is None or not sized or overrides(module):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    found = kind.rule(view, node.args[0], **kind.leaf.arguments(str(node.target), module))
    return found if isinstance(found, Map) else None


def size_of(view: GraphView, node: fx.Node, axis: int) -> Size | None:
    """The size of an axis: a number, or the first node and axis that have it. None if unknown."""
    first = view.rank(node)
    if first is None or not -first <= axis < first:
        return None
    axis %= first
    while True:
        rank = view.rank(node) or 0
        op, layer = view.ops[node], layer_op(view, node)
        kind = op.kind if isinstance(op, Map) else ""
        x: fx.Node | None = None
        join = joined_along(view, node)
        if join is not None and isinstance(op, Sum):
            x = op.values[0]
            if axis == join:
                parts = [size_of(view, v, axis) for v in op.values]
                known = [n for n in parts if isinstance(n, int)]
                return sum(known) if len(known) == len(parts) else (node, axis)
        elif layer is not None and layer.own is not None:
            channels = rank - 1 if kind == "linear" else 1
            if axis == channels:
                return layer.own.outputs
            x = layer.x if kind == "linear" or axis == 0 else None
        elif kind == "bn" and axis == 1:
            return op.inputs  # type: ignore[union-attr]
        elif kind == "bn" or _is_activation(view, node):
            x = input_of(node)
        else:
            wired = wiring_of(view, node)
            if wired is not None and axis in wired.ones:
                return 1
            held = () if wired is None else wired.sources[axis]
            if wired is not None and len(held) == 1 and held[0] not in wired.mixed:
                x, axis = input_of(node), held[0]
        if x is None or view.rank(x) is None:
            return node, axis
        node = x


def _is_activation(view: GraphView, node: fx.Node) -> bool:
    return Trait.ACTIVATION in view.traits(node) and len(node.all_input_nodes) == 1


def _sizes(view: GraphView, v: Any) -> Sizes | None:
    """The sizes of a value, or of the value whose shape it is."""
    if not isinstance(v, fx.Node):
        return None
    owner = _shape_of(v) or v
    rank = view.rank(owner)
    return None if rank is None else tuple(size_of(view, owner, i) for i in range(rank))


def _size(view: GraphView, v: Any) -> Size | None:
    if isinstance(v, int) and not isinstance(v, bool):
        return v if v >= 0 else None
    if not isinstance(v, fx.Node) or v.kwargs or len(v.args) != 2:
        return None
    first, axis = v.args
    owner = _shape_of(first) if kind_of(v).name == "getitem" else first
    sized = v.target in ("size", "getitem") or kind_of(v).name in ("size", "getitem")
    if not sized or not isinstance(owner, fx.Node) or not isinstance(axis, int):
        return None
    return size_of(view, owner, axis)


def _shape_of(v: Any) -> fx.Node | None:
    """The value whose whole shape this is."""
    if not isinstance(v, fx.Node) or not v.args or v.kwargs:
        return None
    named = v.target is getattr and v.args[1] == "shape"
    sized = kind_of(v).name == "size" and len(v.args) == 1 and "size" in str(v.target)
    owner = v.args[0]
    return owner if (named or sized) and isinstance(owner, fx.Node) else None
