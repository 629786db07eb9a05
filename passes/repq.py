"""repq: quantization-aware training on the merged weight, for any block (RepQ, arXiv 2311.05317).

    y = conv3(x) + bn(conv1(x))   ->   y = F.conv2d(Q(x), Q(M(W3, W1, bn)), b(W3, W1, bn))

M is the block run on kernels, written into the graph once as straight tensor code; it is what runs,
prints, differentiates and compiles. Every key of the state_dict stays and trains on; quantizers add
keys. Batch norms inside a block keep their statistics, computed from x and the kernel of what they
normalise, as `bn` says (`KernelNorm`).

Cases: every region that `fuse` would merge, every convolution and linear besides, and the skips and
averages that the target runs in integers. `bits=32` leaves the rounding out: float training at
about the cost of the one convolution. `fuse` after it gives the deployed net, with the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from repfx.algebra import CONVS, Geometry, Moments
from repfx.algebra.norm import MODES
from repfx.errors import Declined, InputError, unknown
from repfx.graph.ops import Map
from repfx.graph.regions import Region
from repfx.graph.signs import non_negative
from repfx.graph.view import GraphView
from repfx.placement.between import find_places, spell_out
from repfx.placement.formats import VNNI, why_float
from repfx.quant import FakeQuant, Grid, search_scale
from repfx.rewrite.contract import Pass, Promise, Result, Stage, register
from repfx.rewrite.kernel_of import geometries
from repfx.rewrite.merge_regions import Merge, plan_merges
from repfx.rewrite.program import program
from repfx.rewrite.work import Names, Work


@register
@dataclass(frozen=True)
class RepQ(Pass):
    """`bits` of activations, and of weights unless `weight_bits` says otherwise; 32 does not round.

    `bn`: how batch norms see their statistics in training, one of running, batch, estimate,
    estimate_paper, sampled, frozen. `ends`: the bits of the first and the last layer, None for
    those of all. `per_channel`: one weight scale per output channel."""

    name: ClassVar[str] = "repq"
    stage: ClassVar[Stage] = Stage.TRAIN
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.NAMES})

    bits: int = 8
    weight_bits: int | None = None
    bn: str = "running"
    ends: int | None = 8
    per_channel: bool = True

    def __post_init__(self) -> None:
        if self.bn not in MODES:
            raise unknown("bn", str(self.bn), MODES)
        for bits in (self.bits, self.weight_bits, self.ends):
            if bits != 32 and bits is not None:
                Grid(bits)  # raises for what no grid has
        if 32 in (self.bits, self.weight_bits) and (self.bits, self.weight_bits) not in (
            (32, None),
            (32, 32),
        ):
            raise InputError("bits=32 trains in float: weights and activations alike")

    def run(self, work: Work) -> Result:
        if self.bits != 32:
            spell_out(work.module, work.target)
        merges, declined = _regions(work.view())
        rewrite = _Rewrite(self, work, merges)
        rewrite.all()
        return Result(
            self.name, declined=(*declined, *rewrite.unfit), inserted=tuple(work.inserted)
        )


class _Rewrite:
    """One run of the pass over the regions it trains; what was made so far is in the four maps."""

    def __init__(self, rules: RepQ, work: Work, merges: list[Merge]) -> None:
        self.rules, self.work, self.view = rules, work, work.view()
        self.names = Names(self.view, work.module)
        self.merges = {m.region.sink: m for m in merges}
        self.ends = {merges[i].region.sink for i in (0, -1) if merges and rules.ends is not None}
        self.readers: dict[
            fx.Node, list[fx.Node]
        ] = {}  # of a node or region, its values to quantize
        self.bits: dict[
            fx.Node, int
        ] = {}  # of a quantized value: the most that one of its readers wants
        self.unfit: list[Declined] = []
        self.quantizes: set[fx.Node] = set()  # the layers, by their last node
        if rules.bits != 32:
            self.quantizes = {sink for sink, m in self.merges.items() if not self._in_float(m)}
            inside = {n: m.region.sink for m in merges for n in m.region.removed}
            convolutions = {
                sink for sink in self.quantizes if self.merges[sink].geometry.source_axis != -1
            }
            layers = {
                sink: m.region.source for sink, m in self.merges.items() if sink in self.quantizes
            }
            places, self.origin = find_places(self.view, layers, convolutions, work.target, inside)
            for reader, value, layer in places:
                self.readers.setdefault(reader, []).append(value)
                wide, value = rules.ends if layer in self.ends else None, self.origin[value]
                self.bits[value] = max(self.bits.get(value, 2), wide or rules.bits)
        self.grids = {
            value: work.target.activation(b, non_negative(self.view, value))
            for value, b in self.bits.items()
        }
        self.quants: dict[fx.Node, FakeQuant] = {}  # by where the integers are made
        self.moved: dict[fx.Node, fx.Node] = {}
        self.quantized: dict[fx.Node, fx.Node] = {}
        self.moments: dict[fx.Node, fx.Node] = {}

    def _in_float(self, merge: Merge) -> bool:
        """Whether the target cannot run this layer in integers, which the report then says."""
        signed = not non_negative(self.view, merge.region.source)
        why = why_float(merge.geometry, signed, self.work.target)
        if why:
            self.unfit.append(Declined(_place(self.names, merge), why, VNNI))
        return bool(why)

    def all(self) -> None:
        for (
            node
        ) in self.view.nodes:  # in order: the first reader of a value makes what the others share
            if node in self.merges:
                self.layer(self.merges[node])
            for value in () if node in self.merges else dict.fromkeys(self.readers.get(node, ())):
                path = str(node.target) if node.op == "call_module" else node.name
                source = self.moved.get(value, value)
                node.replace_input_with(source, self.quant(node, value, path))

    def quant(self, before: fx.Node, value: fx.Node, path: str) -> fx.Node:
        """The quantized value, one for all that read it."""
        source, changed = self.origin[value], self.view.writes.changed(value)
        if value not in self.quantized or changed:
            if source not in self.quants or changed:
                self.quants[source] = FakeQuant(self.grids[source], learned=True)
            plain = self.moved.get(value, value)
            self.quantized[value] = self.work.insert(
                before, plain, f"{path}.input_quant", self.quants[source]
            )
        return self.quantized[value]

    def layer(self, merge: Merge) -> None:
        rules, work, region, graph = self.rules, self.work, merge.region, self.work.module.graph
        path = _place(self.names, merge)
        source = self.moved.get(region.source, region.source)

        def seen() -> fx.Node:
            if region.source not in self.moments or self.view.writes.changed(region.source):
                estimates, whole = rules.bn in ("estimate", "estimate_paper"), rules.bn == "running"
                needs = Moments(rules.bn not in ("batch", "frozen"), estimates, whole)
                self.moments[region.source] = work.insert(
                    region.sink, source, f"{path}.moments", needs
                )
            return self.moments[region.source]

        weight, bias, now = program(work.module, self.view, merge, seen, rules.bn)
        x = source
        if region.sink in self.quantizes:
            if region.source in self.readers.get(
                region.sink, ()
            ):  # or it reads a pool of quantized values
                x = self.quant(region.sink, region.source, path)
            wide = rules.ends if region.sink in self.ends else None
            bits = wide or rules.weight_bits or rules.bits
            grid = work.target.weight(bits, rules.per_channel, merge.geometry.depthwise)
            scale = search_scale(now, grid, 2.0)
            weight = work.insert(
                region.sink, weight, f"{path}.weight_quant", FakeQuant(grid, scale, True, True)
            )
        with graph.inserting_before(region.sink):
            y = _call(graph, merge.geometry, x, weight, bias)
        y.meta = dict(region.sink.meta)
        self.moved[region.sink] = y
        region.sink.replace_all_uses_with(y)
        for node in sorted(region.removed, reverse=True):
            graph.erase_node(node)


def _regions(view: GraphView) -> tuple[list[Merge], list[Declined]]:
    """What to train merged: the plan of `fuse`, and each convolution or linear that it leaves, in
    the graph's order.
    """
    plan = plan_merges(view)
    found, declined = [], []
    taken = {n for m in plan.merges for n in m.region.removed}
    for merge in plan.merges:
        why = _why_not(view, merge.region)
        if why:
            declined.append(Declined(view.name(merge.region.sink), why))
            taken -= set(merge.region.removed)
        else:
            found.append(merge)
    for node in view.nodes:
        op = view.ops[node]
        if (
            isinstance(op, Map)
            and op.macs
            and node not in taken
            and op.own is not None
            and not op.own.transposed
        ):
            geometry = geometries(view, op.x, [node])[node]
            if isinstance(geometry, Geometry):
                found.append(
                    Merge(
                        Region(op.x, node, (node,), frozenset()), geometry, geometry.macs, op.params
                    )
                )
    return sorted(found, key=lambda m: view.index[m.region.sink]), declined


def _why_not(view: GraphView, region: Region) -> str:
    """Why a region cannot be trained on its merged weight."""
    norms = [n for n in region.nodes if getattr(view.ops[n], "kind", "") == "bn"]
    if any(n in region.kept for n in norms):
        return "a batch norm inside it is also read elsewhere"
    if any(n.op != "call_module" for n in norms):
        return "a batch norm inside it is no module, so its statistics have no place"
    if any(
        sum(m.op == "call_module" and m.target == n.target for m in view.nodes) > 1 for n in norms
    ):
        return "a batch norm inside it is called more than once"
    return ""


def _place(names: Names, merge: Merge) -> str:
    main = names.main(merge)
    return str(main.target) if main.op == "call_module" else names.view.name(main)


def _call(
    graph: fx.Graph, g: Geometry, x: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    """The call of one convolution or linear of this geometry, on nodes."""
    if g.source_axis == -1:
        y = graph.call_function(F.linear, (x, weight, bias))
    else:
        even = all(a.before == a.after >= 0 for a in g.axes) and g.mode == "zeros"
        for step in [] if even else g.pad_steps:
            x = graph.call_function(F.pad, (x, *step))
        pads = tuple(a.before if even else 0 for a in g.axes)
        args = (
            x,
            weight,
            bias,
            tuple(a.stride for a in g.axes),
            pads,
            tuple(a.gap for a in g.axes),
            g.groups,
        )
        y = graph.call_function(CONVS[len(g.axes)], args)
    return graph.call_function(torch.permute, (y, list(g.turn))) if g.turned else y
