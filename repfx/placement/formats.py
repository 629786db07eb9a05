"""Which integers a value is written in, where a runtime does not run all of them right on every
CPU.

OpenVINO moves the rounding of a concatenation to what goes into it. On a CPU without AMX it writes
signed codes as unsigned ones around 128, and there it loses their scale on the way, and so where
signed codes go through a pool to convolutions whose outputs are concatenated. Codes that are around
128 from the start it leaves alone. An average pool that counts its padding takes the 0 it pads with
for a code, so it must not read those."""

from __future__ import annotations

from torch import fx

from repfx.algebra import Geometry
from repfx.graph.moves import joined, joins, moves, readers
from repfx.graph.ops import Map, Op
from repfx.graph.view import GraphView
from repfx.quant import Grid, Target

VNNI = 'target="openvino-vnni" quantizes it, for CPUs with VNNI'


def has_offset(rounding: fx.Node, grid: Grid, view: GraphView, target: Target) -> bool:
    """Whether the codes that this call of a quantizer with `grid` gives are unsigned, around
    128."""
    if not grid.signed or target.offset == "none":
        return False
    if target.offset == "all":
        return True
    pooled = any(moves(view, n) for n in rounding.users)
    if not pooled and joined(view, view.data_inputs(rounding)[0]) is None:
        return False
    # A part of a larger concatenation goes on in float there.
    return not all(joins(view, n) or pads_average(view.ops[n]) for n in readers(view, rounding))


def pads_average(op: Op) -> bool:
    """Whether it is an average pool whose padding counts."""
    if not (isinstance(op, Map) and op.kind == "avgpool" and op.space[0]):
        return False
    return op.geometry(Geometry.identity(1, op.space[0])).pads


def why_float(geometry: Geometry | None, signed: bool, target: Target) -> str:
    """Why a layer of this geometry that reads signed values or not stays in float; empty where it
    does not.
    """
    grouped = geometry is not None and geometry.groups > 1 and len(geometry.axes) == 3
    if target.runtime == "openvino" and target.reduced and grouped and signed:
        return (
            "on CPUs without VNNI, OpenVINO halves the weights of grouped 3-D convolutions "
            "that read signed values"
        )
    return ""
