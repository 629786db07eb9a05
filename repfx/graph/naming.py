"""Names for reports: of a layer, by its shape, and of a node, by its name and operator."""

from __future__ import annotations

from torch import fx

from repfx.algebra import Geometry
from repfx.graph.ops import Map, Op, Opaque
from repfx.graph.view import GraphView


def layer(g: Geometry) -> str:
    """Describes a layer with its channels.

    >>> layer(Geometry.conv(64, 128, taps=(3, 3), stride=(2, 2), pad=(1, 1), groups=4))
    'conv 3x3, 64 → 128, stride 2, groups 4'
    """
    text = f"{short(g)}{' ' if g.source_axis == -1 else ', '}{g.inputs} → {g.outputs}"
    for word, values in (
        ("stride", [a.stride for a in g.axes]),
        ("dilation", [a.gap for a in g.axes]),
    ):
        if any(v != 1 for v in values):
            text += f", {word} {values[0] if len(set(values)) == 1 else 'x'.join(map(str, values))}"
    return (
        text
        + (f", groups {g.groups}" if g.groups > 1 else "")
        + (f", {g.mode}" if g.mode != "zeros" else "")
    )


def short(g: Geometry) -> str:
    """Describes a layer by its kind and kernel size."""
    if g.source_axis == -1:
        return "linear"
    depthwise = "depthwise " if 1 < g.groups == g.inputs == g.outputs else ""
    return (
        f"{depthwise}{'transposed ' if g.transposed else ''}conv "
        f"{'x'.join(str(len(a.places)) for a in g.axes)}"
    )


def operator(op: Op) -> str:
    """Describes an operator by its kind, a convolution with its kernel size too."""
    if isinstance(op, Opaque):
        return ""
    return short(op.own) if isinstance(op, Map) and op.own is not None else op.kind


def described(view: GraphView, node: fx.Node) -> str:
    """Describes a node for a report, with the reason why it has no place in a block, if any."""
    op = view.ops[node]
    if node.op == "placeholder":
        return f"the input {node.name!r}"
    what = (
        f"{operator(op)} {view.name(node)!r}"
        if isinstance(op, Map) and op.own is not None
        else f"{view.name(node)!r}"
    )
    return f"{what} ({op.reason})" if isinstance(op, Opaque) and op.reason else what
