"""repq: quantization-aware training on the merged weight, for any block (RepQ, arXiv 2311.05317).

    y = conv3(x) + bn(conv1(x))   ->   y = F.conv2d(Q(x), Q(M(W3, W1, bn)), b(W3, W1, bn))

M applies the block to kernels instead of feature maps. It is written into the graph once as plain
tensor code, which you can run, print, differentiate and compile. Every key of the state_dict stays
and its tensor keeps training; the quantizers add keys. Batch norms inside a block keep their
statistics. They compute them from x and the kernel in front of them, in the way that `bn` selects
(see `KernelNorm`). With `bn=live` the norm at the end of a block stays a batch norm behind the
quantized convolution, as in plain training with learned steps; `fuse` folds it into the step, the
integer values and the bias of the layer. Norms inside the block are then measured as in `running`.

It covers every region that `fuse` would merge, all other convolutions and linear layers, and the
skips and averages that the target runs in integers. `bits=32` leaves out the rounding: float
training at about the cost of one convolution. Its norms are `sampled` then: the gradient of the
variance, which `running` leaves out, is what keeps a kernel from growing, and a net that is trained
from the start needs it. `fuse` afterwards gives the net to deploy, with the same integer values.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import fx

from repfx.algebra import Geometry, Moments
from repfx.algebra.norm import MODES
from repfx.errors import Declined, InputError, unknown
from repfx.graph.ops import Map
from repfx.graph.regions import Region
from repfx.graph.view import GraphView
from repfx.placement.between import spell_out
from repfx.placement.formats import TRANSPOSED
from repfx.placement.quantizers import FLOAT, IntegerLayer, Quantizers, Rounding
from repfx.quant import Grid
from repfx.rewrite.contract import Pass, Promise, Stage, register
from repfx.rewrite.kernel_of import geometries
from repfx.rewrite.merge_regions import Merge, plan_merges
from repfx.rewrite.program import program
from repfx.rewrite.results import Result
from repfx.rewrite.work import Names, Work

LIVE = "live"
CODES = ("all", "symmetric")
SAMPLE = 8  # the mode `sampled` measures variances on every eighth image


@dataclass(frozen=True)
class _Normed(Merge):
    """A region that a batch norm follows, which stays."""

    norm: fx.Node


@register
@dataclass(frozen=True)
class RepQ(Pass):
    """Quantizes activations to `bits`, and weights to `weight_bits` or else `bits`; 32 is float.

    `bn`: where batch norms get their statistics in training, one of running, batch, estimate,
    estimate_paper, sampled, frozen, live; live needs `per_channel`. None is running, and at 32 bits
    sampled. `ends`: the bits of the first
    and the last layer, None for the same as the others, 32 to leave them in float. `per_channel`:
    one weight scale per output channel, else one per tensor. `codes`: below 8 bits, `all` uses the
    whole grid, unsigned after ReLU and [-2, 1] for weights of 2 bits; `symmetric` has the formats
    of the target at 8 bits."""

    name: ClassVar[str] = "repq"
    stage: ClassVar[Stage] = Stage.TRAIN
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.NAMES})

    bits: int = 8
    weight_bits: int | None = None
    bn: str | None = None
    ends: int | None = 8
    per_channel: bool = True
    codes: str = "all"

    def __post_init__(self) -> None:
        if self.codes not in CODES:
            raise unknown("codes", str(self.codes), CODES)
        if self.bn is not None and self.bn not in (*MODES, LIVE):
            raise unknown("bn", str(self.bn), (*MODES, LIVE))
        if self.bn == LIVE and not self.per_channel:
            raise InputError(
                "bn=live: a batch norm folds only into weights with one scale per channel; leave "
                "out per_channel=False"
            )
        for bits in (self.bits, self.weight_bits, self.ends):
            if bits != FLOAT and bits is not None:
                Grid(bits)  # raises for an invalid number of bits
        if FLOAT in (self.bits, self.weight_bits) and (self.bits, self.weight_bits) not in (
            (FLOAT, None),
            (FLOAT, FLOAT),
        ):
            raise InputError(
                "bits=32 trains in float, weights and activations alike: weight_bits is then 32 "
                "or None"
            )

    @property
    def norms(self) -> str:
        """The mode of the norms inside a block."""
        if self.bn == LIVE:
            return "running"
        return self.bn or ("sampled" if self.bits == FLOAT else "running")

    def run(self, work: Work) -> Result:
        if self.bits == FLOAT and self.bn == "running":
            warnings.warn(
                "bn=running at 32 bits trains slower than batch norm does, because its variance "
                "has no gradient; leave bn out, or use bn=batch",
                stacklevel=2,
            )
        if self.bits != FLOAT:
            spell_out(work.module, work.target)
        view = work.view()
        merges, declined = _regions(view)
        if self.bn == LIVE:
            merges = [_without_its_norm(view, merge) for merge in merges]
        names = Names(view, work.module)
        layers = [self._layer(m, _place(names, m), m in (merges[0], merges[-1])) for m in merges]
        how = Rounding(self.per_channel, learned=True, every_code=self.codes == "all")
        quantizers = Quantizers(work, view, layers, how)
        writer = _Writer(self, work, quantizers)
        for layer, merge in zip(quantizers, merges, strict=True):
            writer.write(layer, merge)
        return Result(
            self.name,
            declined=(*declined, *quantizers.declined),
            inserted=tuple(work.inserted),
        )

    def _layer(self, merge: Merge, path: str, is_end: bool) -> IntegerLayer:
        region, wide = merge.region, self.ends if is_end and self.bits != FLOAT else None
        norm = merge.norm if isinstance(merge, _Normed) else None
        return IntegerLayer(
            norm or region.sink,
            region.source,
            path,
            merge.geometry,
            wide or self.bits,
            wide or self.weight_bits or self.bits,
            (*region.removed, *([norm] if norm else [])),
            norm is not None,
        )


class _Writer:
    """Replaces each region in the graph by its merged layer."""

    def __init__(self, rules: RepQ, work: Work, quantizers: Quantizers) -> None:
        self.rules, self.work, self.quantizers = rules, work, quantizers
        self.moments: dict[fx.Node, fx.Node] = {}

    def write(self, layer: IntegerLayer, merge: Merge) -> None:
        seen = partial(self._moments, layer)
        view, at = self.quantizers.view, layer.node
        weight, bias, now = program(self.work.module, view, merge, at, seen, self.rules.norms)
        x = self.quantizers.input(layer)
        weight = self.quantizers.weight(layer, weight, now)
        self.quantizers.put(layer, x, weight, bias)

    def _moments(self, layer: IntegerLayer) -> fx.Node:
        """The input moments that a layer's batch norms need; layers with one input share them."""
        source, mode = layer.source, self.rules.norms
        if source not in self.moments or self.quantizers.view.writes.changed(source):
            estimates = mode in ("estimate", "estimate_paper")
            needs = Moments(
                mode not in ("batch", "frozen"),
                estimates,
                runs=mode in ("running", "sampled"),
                sample=SAMPLE if mode == "sampled" else 1,
                axis=layer.geometry.source_axis,
            )
            self.moments[source] = self.work.insert(
                layer.node, self.quantizers.now(source), f"{layer.path}.moments", needs
            )
        return self.moments[source]


def _regions(view: GraphView) -> tuple[list[Merge], list[Declined]]:
    """The layers to train merged, in graph order.

    These are the regions that `fuse` would merge, or the largest parts of them that can be trained
    merged, and every other convolution or linear layer."""
    refused: dict[fx.Node, str] = {}

    def refuse(region: Region) -> str:
        why = _why_not(view, region)
        if why:
            refused.update(dict.fromkeys(_norms(view, region), why))
        return why

    plan = plan_merges(view, refuse=refuse)
    found = list(plan.merges)
    taken = {n for m in plan.merges for n in m.region.removed}
    declined = [Declined(view.name(n), why) for n, why in refused.items() if n not in taken]
    for node in view.nodes:
        op = view.ops[node]
        if isinstance(op, Map) and op.macs and node not in taken and op.own is not None:
            if op.own.transposed:
                declined.append(Declined(view.name(node), TRANSPOSED))
                continue
            geometry = geometries(view, op.x, [node])[node]
            if isinstance(geometry, Geometry):
                found.append(
                    Merge(
                        Region(op.x, node, (node,), frozenset()), geometry, geometry.macs, op.params
                    )
                )
    return sorted(found, key=lambda m: view.index[m.region.sink]), declined


def _without_its_norm(view: GraphView, merge: Merge) -> Merge:
    """The region without the batch norm that it ends with, if it does."""
    region, norm = merge.region, merge.region.sink
    if getattr(view.ops[norm], "kind", "") != "bn" or len(region.nodes) < 2:
        return merge
    (before,) = view.data_inputs(norm)
    nodes = tuple(n for n in region.nodes if n is not norm)
    geometry = geometries(view, region.source, nodes).get(before)
    if before not in nodes or not isinstance(geometry, Geometry):
        return merge
    rest = Region(region.source, before, nodes, region.kept)
    return _Normed(rest, geometry, merge.macs_before, merge.params_before, norm)


def _norms(view: GraphView, region: Region) -> list[fx.Node]:
    return [n for n in region.nodes if getattr(view.ops[n], "kind", "") == "bn"]


def _why_not(view: GraphView, region: Region) -> str:
    """Why a region cannot be trained on its merged weight."""
    norms = _norms(view, region)
    geometry = geometries(view, region.source, region.nodes).get(region.sink)
    if isinstance(geometry, Geometry) and geometry.transposed:
        return TRANSPOSED
    if any(n in region.kept for n in norms):
        return "a batch norm inside it is also read elsewhere"
    if any(n.op != "call_module" for n in norms):
        return "a batch norm inside it is not a module, so it has nowhere to keep statistics"
    if any(
        sum(m.op == "call_module" and m.target == n.target for m in view.nodes) > 1 for n in norms
    ):
        return "a batch norm inside it is called more than once"
    return ""


def _place(names: Names, merge: Merge) -> str:
    main = names.main(merge)
    return str(main.target) if main.op == "call_module" else names.view.name(main)
