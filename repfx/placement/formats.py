"""Integer formats for values where a runtime gets some of them wrong on some CPUs.

OpenVINO moves the quantizer of a concatenation to its inputs. On a CPU without AMX it then rewrites
signed values as unsigned ones with zero point 128 and loses their scale. The same happens when
signed values go through a pool to convolutions whose outputs are concatenated. OpenVINO does not
touch values that have zero point 128 from the start. An average pool that counts its padding would
read its padding 0 as an integer value, so it must not get values with a zero point."""

from __future__ import annotations

from torch import fx

from repfx.algebra import Geometry
from repfx.graph.moves import joined, joins, moved_from, moves, readers
from repfx.graph.ops import Map, Op
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.quant import FakeQuant, Grid, Target

TRANSPOSED = "transposed convolutions stay in float: few runtimes have them in integers"
VNNI = 'target="openvino-vnni" quantizes it, for CPUs with VNNI'


def has_offset(rounding: fx.Node, grid: Grid, view: GraphView, target: Target) -> bool:
    """Whether this call of a quantizer with `grid` gives unsigned values with zero point 128."""
    if not grid.signed or target.offset == "none":
        return False
    if target.offset == "all":
        return True
    if any(joins(view, n) and len(_quantizers(view, n)) == 1 for n in readers(view, rounding)):
        return True  # one scale for all of the concatenation
    pooled = any(moves(view, n) and Trait.JOINS not in view.traits(n) for n in rounding.users)
    if not pooled and joined(view, view.data_inputs(rounding)[0]) is None:
        return False
    # A part of a larger concatenation stays in float there.
    return not all(joins(view, n) or pads_average(view.ops[n]) for n in readers(view, rounding))


def _quantizers(view: GraphView, value: fx.Node) -> set[FakeQuant | None]:
    """The quantizers of the values that are joined; None for those without one."""
    source = moved_from(view, value)
    if not joins(view, source):
        return {view.quantizer(source)}
    return {quant for part in view.data_inputs(source) for quant in _quantizers(view, part)}


def pads_average(op: Op) -> bool:
    """Whether the operator is an average pool that counts its padding."""
    if not (isinstance(op, Map) and op.kind == "avgpool" and op.space[0]):
        return False
    return op.geometry(Geometry.identity(1, op.space[0])).pads


def why_float(geometry: Geometry, signed: bool, target: Target) -> tuple[str, str]:
    """Why a layer of this geometry stays in float, and a hint; empty if it does not.

    `signed`: whether the layer reads signed values."""
    g = geometry
    if g.groups == 1:
        return "", ""
    width = g.inputs // g.groups
    if target.runtime == "tensorrt" and width < 16 and g.outputs % 8:
        return (
            f"it has few channels a group, and {g.outputs} output channels, which 8 does not "
            "divide; NVIDIA's own quantizer leaves such convolutions in float"
        ), ""
    if target.runtime != "openvino" or not target.reduced:
        return "", ""
    if signed and len(g.axes) == 3:
        return (
            "on CPUs without VNNI, OpenVINO halves the weights of grouped 3-D convolutions "
            "that read signed values"
        ), VNNI
    widths = width, g.outputs // g.groups
    if widths != (1, 1) and any(width % 4 for width in widths):
        return (
            "on CPUs without AVX2, OpenVINO crashes on grouped convolutions in integers "
            "if 4 does not divide the channels of a group"
        ), VNNI
    return "", ""
