"""slide: plans how a batch norm, scale or shift moves along the graph into the layers that take it.

    linear(mean(bn(x)))          ->   linear'(mean(x))
    bn(flatten(linear(x)))       ->   flatten(linear'(x))
    bn(cat(conv_a(x), conv_b(y)) ->   cat(conv_a'(x), conv_b'(y))

A merge needs a region from one source to one sink. Here the affine alone moves, through whatever
treats all channels alike, and the layers at the end stay what they are. So nothing costs more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from repfx.algebra import Geometry
from repfx.errors import Declined, Inexact
from repfx.graph.axes import (
    input_of,
    input_rank,
    joined_along,
    layer_op,
    reads_size,
    size_of,
    wiring_of,
)
from repfx.graph.naming import described
from repfx.graph.ops import Map, Op, Opaque, Sum
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.wiring import Wiring
from repfx.rewrite.merge_regions import Accept, Merge


@dataclass(frozen=True)
class Layout:
    """The channels of a value of `rank` axes are on one of `axes`; the others of them have size 1.

    With `outer` or `inner`, that axis also holds positions: the channels as a whole are repeated,
    or each of them is. `ones` are axes of size 1, and `needs` must turn out to be. `shifts`: the
    affine adds a constant."""

    rank: int
    axes: tuple[int, ...]
    outer: bool = False
    inner: bool = False
    ones: frozenset[int] = frozenset()
    needs: frozenset[int] = frozenset()
    shifts: bool = True

    def through(self, w: Wiring) -> Layout | None:
        """The layout after a node; None if it mixes the channels with something else."""
        (axis,) = self.axes
        at = next((j for j, held in enumerate(w.sources) if axis in held), None)
        if at is None or axis in w.mixed or not w.needs <= self.ones or self.shifts > w.shifts:
            return None
        held = w.sources[at]
        here = held.index(axis)
        outer = any(i not in self.ones for i in held[:here])
        inner = any(i not in self.ones for i in held[here + 1 :])
        ones = {
            j
            for j, held in enumerate(w.sources)
            if held and self.ones.difference(w.mixed) >= set(held)
        }
        return replace(
            self,
            rank=len(w.sources),
            axes=(at,),
            outer=self.outer or outer,
            inner=self.inner or inner,
            ones=w.ones | ones,
        )

    def before(self, w: Wiring, rank: int) -> Layout | None:
        """The layout of the input of a node, from that of its output."""
        axes = {i for j in self.axes for i in w.sources[j] if not (i in w.mixed and j in w.ones)}
        needs = {i for j in self.needs - w.ones for i in w.sources[j]} | w.needs
        if not axes or axes & w.mixed or needs & w.mixed or self.shifts > w.shifts:
            return None
        return replace(self, rank=rank, axes=tuple(sorted(axes)), needs=frozenset(needs))


@dataclass(frozen=True)
class Take:
    """A layer that takes the affine: its channel i takes that of channel rows[i].

    `shifts`: it takes the constant, too."""

    layer: fx.Node
    rows: tuple[int, ...]
    shifts: bool


@dataclass(frozen=True)
class Slide:
    """An affine per channel, the layers that take it, and the nodes that it moves through.

    `forward`: towards the output, into the layers that read it."""

    affine: fx.Node
    takes: tuple[Take, ...]
    nodes: tuple[fx.Node, ...]
    forward: bool


def plan_slides(
    view: GraphView, accept: Accept, merges: Sequence[Merge] = ()
) -> tuple[list[Slide], dict[fx.Node, Inexact]]:
    """The affines to move, and why others cannot move.

    No two of them touch the same node, or what a layer of the other reads: the next plan has those.

    `merges`: regions that will be layers by then."""
    sinks = {m.region.sink: m.geometry for m in merges}
    gone = {n for m in merges for n in m.region.removed}
    slides: list[Slide] = []
    failed: dict[fx.Node, Inexact] = {}
    taken: set[fx.Node] = set()
    reads: set[fx.Node] = set()
    for node in view.nodes:
        if node in gone:
            continue
        try:
            found = _slide(view, node, sinks)
        except Inexact as why:
            failed[node] = why
            continue
        if found is not None:
            layers = [t.layer for t in found.takes]
            touched = [node, *found.nodes, *layers]
            linear: list[Op] = [op for n in touched if not isinstance(op := view.ops[n], Opaque)]
            read = [n for layer in layers for n in view.data_inputs(layer)]
            apart = taken.isdisjoint([*touched, *read]) and reads.isdisjoint(touched)
            if apart and accept(linear):
                slides.append(found)
                taken.update(touched)
                reads.update(read)
    return slides, failed


def explained(declined: Sequence[Declined], why: dict[str, Inexact]) -> tuple[Declined, ...]:
    """What is declined; an affine that no region takes with the reason why it cannot move."""
    return tuple(
        Declined(d.where, why[d.where].reason, why[d.where].cure)
        if d.where in why and d.reason.startswith("no convolution leads to it")
        else d
        for d in declined
    )


def _slide(view: GraphView, node: fx.Node, sinks: dict[fx.Node, Geometry]) -> Slide | None:
    op = view.ops[node]
    layout = _layout(view, node, op) if isinstance(op, Map) else None
    if layout is None or not isinstance(op, Map) or op.inputs is None:
        return None
    walk = _Backward(view, node, sinks)
    try:
        takes = tuple(walk.into(op.x, node, layout, tuple(range(op.inputs))))
        layers = {t.layer for t in takes}
        return Slide(node, takes, tuple(n for n in walk.seen if n not in layers), False)
    except Inexact as why:
        back = why
    ahead = _Forward(view, node, op.x, op.inputs)
    try:
        return Slide(node, tuple(ahead.into(node, layout)), tuple(ahead.passed), True)
    except Inexact as why:
        raise Inexact(f"{back.reason}, and {why.reason}", why.cure or back.cure) from None


def _layout(view: GraphView, node: fx.Node, op: Map) -> Layout | None:
    """The layout of the input of an affine per channel; None for other nodes, or if unknown."""
    rank = view.rank(op.x)
    if op.kind == "bn":
        rank = op.space[0] + 2 if rank is None and op.space[0] is not None else rank
        return None if rank is None or rank < 2 else Layout(rank, (1,))
    if op.kind not in ("scale", "shift") or rank is None:
        return None
    operand = next((v for v in node.all_input_nodes if view.is_constant(v)), None)
    shape = () if operand is None else tuple(view.tensor(operand).shape)
    wide = [i for i, n in enumerate(shape) if n > 1]
    if len(wide) != 1 or len(shape) > rank:
        return None
    axis = wide[0] - len(shape) + rank
    spreads = view.channels(op.x, axis) != op.inputs  # a value of one channel becomes several
    return None if spreads else Layout(rank, (axis,), shifts=op.kind == "shift")


@dataclass
class _Backward:
    """The walk from an affine to the layers that its input is computed by."""

    view: GraphView
    affine: fx.Node
    sinks: dict[fx.Node, Geometry]
    seen: list[fx.Node] = field(default_factory=list)

    def into(
        self, value: fx.Node, reader: fx.Node, layout: Layout, rows: tuple[int, ...]
    ) -> Iterator[Take]:
        view, op, layer = self.view, self.view.ops[value], layer_op(self.view, value)
        own = self.sinks.get(value, None if layer is None else layer.own)
        others = [u for u in value.users if u is not reader and not reads_size(view, u, value)]
        if others or value in self.seen:
            raise Inexact(f"{described(view, value)} before it is also read elsewhere")
        self.seen.append(value)
        if own is not None:
            at = _channel_axis(own, layout.rank)
            if at not in layout.axes or layout.needs or own.outputs != len(rows):
                raise Inexact(f"its channels are not those of {described(view, value)}")
            if own.why_no_layer:
                raise Inexact(own.why_no_layer)
            yield Take(value, rows, layout.shifts)
        elif isinstance(op, Sum) and Trait.JOINS in view.traits(value):
            yield from self._joined(value, op, layout, rows)
        elif isinstance(op, Sum) and op.kind == "add" and op.arrange is None:
            yield from self._summed(value, op, layout, rows)
        else:
            x, rank = input_of(value), input_rank(view, value, layout.rank)
            wired = None if rank is None else wiring_of(view, value, rank)
            before = None if wired is None or rank is None else layout.before(wired, rank)
            if x is None or before is None:
                raise Inexact(f"no convolution leads to it: its input is {described(view, value)}")
            yield from self.into(x, value, before, rows)

    def _joined(
        self, value: fx.Node, op: Sum, layout: Layout, rows: tuple[int, ...]
    ) -> Iterator[Take]:
        join = joined_along(self.view, value)
        if join is None or len(layout.axes) > 1 or layout.needs:
            raise Inexact(f"its channels are not those of {described(self.view, value)}")
        at, start = layout.axes[0], 0
        for term in op.values:
            here = rows
            if join == at:
                size = size_of(self.view, term, at)
                if not isinstance(size, int):
                    raise Inexact("the channels of what is joined are unknown", "pass an example")
                here, start = rows[start : start + size], start + size
            yield from self.into(term, value, layout, here)

    def _summed(
        self, value: fx.Node, op: Sum, layout: Layout, rows: tuple[int, ...]
    ) -> Iterator[Take]:
        """Every term takes the scale, and one of them the shift."""
        holder = next((i for i, (_, factor) in enumerate(op.terms) if factor == 1), None)
        same = all(self.view.rank(term) in (None, layout.rank) for term in op.values)
        if not same or (layout.shifts and holder is None):
            raise Inexact(f"{described(self.view, value)} before it adds values of other shapes")
        for i, term in enumerate(op.values):
            each = replace(layout, shifts=layout.shifts and i == holder)
            yield from self.into(term, value, each, rows)


@dataclass
class _Forward:
    """The walk from an affine of x to the layers that read it."""

    view: GraphView
    affine: fx.Node
    x: fx.Node
    channels: int
    passed: list[fx.Node] = field(default_factory=list)
    layers: list[fx.Node] = field(default_factory=list)

    def into(self, value: fx.Node, layout: Layout) -> Iterator[Take]:
        view = self.view
        self._check(value)
        users = [user for user in value.users if not reads_size(view, user, value)]
        for user in users:
            if user.op == "output":
                raise Inexact("it is a result of the model")
            one = None if layout.outer or layout.inner else (layout.axes[0], self.channels)
            reads = input_of(user) is value
            wired = wiring_of(view, user, layout.rank, one) if reads else None
            after = None if wired is None else layout.through(wired)
            layer = layer_op(view, user)
            again = user in self.passed or user in self.layers
            if layer is not None and layer.own is not None and layer.x is value and not again:
                self.layers.append(user)
                yield Take(user, self._rows(user, layer, layout), layout.shifts)
            elif after is None or again:
                raise Inexact(f"it cannot move behind {described(view, user)}, which reads it")
            else:
                self.passed.append(user)
                yield from self.into(user, after)
        if not users:
            raise Inexact("nothing reads it")

    def _check(self, value: fx.Node) -> None:
        """Raises Inexact if x, read where `value` is read now, would be another value."""
        view, now = self.view, self.view.index[self.affine]
        late = any(view.index[w] >= now for w in view.writes.of.get(self.x, ()))
        wrote = view.writes.of.get(value, ())
        only_dropouts = all(getattr(view.ops[w], "kind", "") == "dropout" for w in wrote)
        if late or not only_dropouts or (wrote and len(self.x.users) > 1):
            raise Inexact(f"{described(view, value)} is changed in place")

    def _rows(self, user: fx.Node, op: Map, layout: Layout) -> tuple[int, ...]:
        """The channel of the affine for each channel of a layer's input."""
        assert op.own is not None
        own, n, c = op.own, op.own.inputs, self.channels
        whole = n == c or ((layout.outer != layout.inner) and n % c == 0)
        if _channel_axis(own, layout.rank) != layout.axes[0] or not whole:
            raise Inexact(f"its channels are not those of {described(self.view, user)}")
        if own.why_no_layer:
            raise Inexact(own.why_no_layer)
        start = Geometry.identity(n, len(own.axes), own.channel_axis)
        replace(start, bias=layout.shifts).then(own)  # raises Inexact if it pads
        return tuple(i // (n // c) if layout.inner else i % c for i in range(n))


def _channel_axis(g: Geometry, rank: int) -> int | None:
    """The channel axis of a layer's values, of `rank` axes; None if it takes others."""
    if g.channel_axis == -1:
        return rank - 1 if rank >= 2 else None
    return 1 if rank == len(g.axes) + 2 else None
