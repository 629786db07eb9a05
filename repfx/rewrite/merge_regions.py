"""merge_regions: plans which regions to merge, by multiply-accumulates, before reading a weight.

A run of dominators d0 ... dn is cut into parts. Each part either becomes one convolution, if that
is exact, or stays as it is. The best cut has the fewest multiply-accumulates. Among equals it
leaves the fewest operators, and then removes the fewest dropouts, since training may continue.
Weights may become more only where that saves work: a 2x2 convolution in place of a 1x1 one and an
average pool takes as many multiply-accumulates and four times the memory.

    best(i) = min over j > i of  cost(i, j) + best(j),  cost = (MACs, operators left, ...)

So a block is merged as a whole if that pays off, and otherwise the blocks inside it are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from torch import fx

from repfx.algebra import Geometry
from repfx.errors import Declined, Inexact
from repfx.graph.edit import uneven
from repfx.graph.naming import described
from repfx.graph.ops import Map, Op, Opaque
from repfx.graph.regions import Region, Run, is_linear, is_value, region_of, run_to, why_alone
from repfx.graph.view import GraphView
from repfx.rewrite.kernel_of import geometries

Cost = tuple[Fraction, int, int]  # MACs, operators left, dropouts removed
Accept = Callable[[list[Op]], bool]
Refuse = Callable[[Region], str]  # why a region must not become one layer; empty if it may


@dataclass(frozen=True)
class Merge:
    """A region that will become one convolution of this `geometry`.

    MACs are per position of the region's source.
    """

    region: Region
    geometry: Geometry
    macs_before: Fraction
    params_before: int


@dataclass(frozen=True)
class Plan:
    """What to merge, and what is declined."""

    merges: tuple[Merge, ...]
    declined: tuple[Declined, ...]
    again: bool  # whether these merges may make room for more


def plan_merges(
    view: GraphView, accept: Accept = lambda ops: True, refuse: Refuse = lambda region: ""
) -> Plan:
    """Finds every region to merge.

    `accept` may reject a region by its operators, and `refuse` for a reason, which is told."""
    merges: list[Merge] = []
    told = _Told(view)
    taken: set[fx.Node] = set()
    needed: set[fx.Node] = set()  # the values that the planned merges will read
    blocked = False
    for sink in reversed(view.nodes):
        if sink in taken or not is_linear(view, sink) or not is_value(view, sink):
            continue
        if not sink.users:  # nothing is deployed of what nothing reads
            continue
        run = run_to(view, sink, taken)
        blocked |= run.blocked
        if len(run.ends) < 2:
            continue
        cut = _Cut(view, run, (accept, refuse), needed)
        parts = cut.best()
        _explain(cut, parts, told)
        for merge in (merge for _, _, merge in parts if merge is not None):
            merges.append(merge)
            needed.add(merge.region.source)
            taken.update(merge.region.removed)
    told.rest(taken)
    # A merge next to other linear values changes the cost of merging those, or may leave one of
    # them with a single reader, or takes a write in place away. Then it is worth planning again.
    again = bool(merges) and (blocked or any(_beside(view, m.region) for m in merges))
    return Plan(tuple(reversed(merges)), tuple(told.declined.values()), again)


def _beside(view: GraphView, region: Region) -> bool:
    near = (region.source, *region.sink.users)
    wrote = any(node in view.writes.by for node in region.removed)
    return wrote or bool(region.kept) or any(is_linear(view, node) for node in near)


Part = tuple[int, int, Merge | None]  # from one end of a run to another; None is not merged


class _Cut:
    """The search for the cheapest cut of one run."""

    def __init__(
        self, view: GraphView, run: Run, rules: tuple[Accept, Refuse], needed: set[fx.Node]
    ) -> None:
        self.view, self.run, self.needed = view, run, needed
        self.accept, self.refuse = rules
        self.rates = _rates(view, run.ends[0], self.between(0, len(run.steps)))
        # For each pair of ends: the one convolution between them, or why there is none.
        self.known: dict[tuple[int, int], Geometry | Inexact] = {}

    def between(self, i: int, j: int) -> tuple[fx.Node, ...]:
        return tuple(node for step in self.run.steps[i:j] for node in step)

    def best(self) -> list[Part]:
        """The parts of the cheapest cut, by the recurrence above, from the last end backwards."""
        n = len(self.run.steps)
        best: dict[int, tuple[Cost, int, Merge | None]] = {n: ((Fraction(0), 0, 0), n, None)}
        for i in reversed(range(n)):
            found = geometries(self.view, self.run.ends[i], self.between(i, n))
            choices: list[tuple[Cost, int, Merge | None]] = []
            for j in range(n, i, -1):
                nodes = self.between(i, j)
                self.known[i, j] = self._as_layer(i, j, nodes, found[self.run.ends[j]])
                offer = self._offer(i, j, nodes)
                if offer is not None:
                    choices.append((_plus(offer[0], best[j][0]), j, offer[1]))
                elif j == i + 1:
                    choices.append((_plus(self._alone(i), best[j][0]), j, None))
            best[i] = min(choices, key=lambda c: c[0])  # among equals, the first is the longest
        parts, i = [], 0
        while i < n:
            _, j, merge = best[i]
            parts.append((i, j, merge))
            i = j
        return parts

    def _alone(self, i: int) -> Cost:
        step = self.run.steps[i]
        return _macs(self.view, step, self.rates), _count(self.view, step), 0

    def _as_layer(
        self, i: int, j: int, nodes: tuple[fx.Node, ...], whole: Geometry | Inexact
    ) -> Geometry | Inexact:
        """The geometry between two ends, or Inexact if the graph or the layers do not allow it."""
        view, ends, kept = self.view, self.run.ends, frozenset[fx.Node]()
        if view.writes.of:
            kept = region_of(view, ends[i], ends[j], nodes, self.needed).kept
        if view.writes.disturb(ends[i], nodes, kept):
            return Inexact("a value inside it is changed in place between its readers")
        if isinstance(whole, Geometry) and whole.why_no_layer:
            return Inexact(whole.why_no_layer)
        return whole

    def _offer(self, i: int, j: int, nodes: tuple[fx.Node, ...]) -> tuple[Cost, Merge] | None:
        """The merge between two ends and its cost; None if there is nothing to gain.

        That is the case if it is not exact, has no convolution or removes no operator."""
        view, rates, geometry = self.view, self.rates, self.known[i, j]
        if isinstance(geometry, Inexact):
            return None
        region = region_of(view, self.run.ends[i], self.run.ends[j], nodes, self.needed)
        removed, kept = region.removed, tuple(region.kept)
        ops = [view.ops[node] for node in removed]
        if not any(isinstance(op, Map) and op.macs for op in ops) or not self.accept(ops):
            return None
        turned = geometry.turned * (1 + any(n.target == "contiguous" for n in removed))
        left = 1 + (len(geometry.pad_steps) if uneven(geometry) else 0) + turned
        rate = rates[region.source]
        before, merged = _macs(view, removed, rates), geometry.macs * rate
        params = _params(view, removed)
        grows = geometry.weights > params and merged >= before
        if left >= _count(view, removed) or merged > before or grows:
            return None
        why = self.refuse(region)
        if why:
            self.known[i, j] = Inexact(why)
            return None
        dropouts = len(removed) - _count(view, removed)
        cost = (merged + _macs(view, kept, rates), left + _count(view, kept), dropouts)
        return cost, Merge(region, geometry, before / rate, params)

    def why(self, i: int, j: int) -> tuple[str, str]:
        """Why the part between two ends is not merged, and a hint; empty if it needs no reason."""
        known = self.known[i, j]
        if isinstance(known, Inexact):
            return known.reason, known.cure
        region = region_of(self.view, self.run.ends[i], self.run.ends[j], self.between(i, j))
        before = _macs(self.view, region.removed, self.rates)
        merged = known.macs * self.rates[self.run.ends[i]]
        params = _params(self.view, region.removed)
        if merged < before or (merged == before and known.weights <= params):
            return "", ""
        if region.kept:
            last = described(self.view, max(region.kept, key=self.view.index.__getitem__))
            return f"{last} inside it is also read elsewhere and must stay", ""
        if merged == before:
            sizes = f"{known.params} parameters, the parts have {params}"
            return f"one convolution would have {sizes}, and would save no work", ""
        costs = (
            f"{float(merged):.6g} multiply-accumulates per pixel, "
            f"the parts take {float(before):.6g}"
        )
        return f"one convolution would take {costs}", ""


class _Told:
    """What is declined, by name, and the nodes that are accounted for."""

    def __init__(self, view: GraphView) -> None:
        self.view = view
        self.declined: dict[str, Declined] = {}
        self.nodes: set[fx.Node] = set()

    def add(self, at: fx.Node, reason: str, cure: str, nodes: Iterable[fx.Node] = ()) -> None:
        self.declined.setdefault(self.view.name(at), Declined(self.view.name(at), reason, cure))
        self.nodes.update(nodes)

    def rest(self, taken: set[fx.Node]) -> None:
        """Adds what is part of no run: sums, batch norms, and operators that only look linear."""
        accounted = taken | self.nodes
        for node in self.view.nodes:
            op = self.view.ops[node]
            if isinstance(op, Opaque):
                if op.reason and not op.reason.startswith(("a product", "a quotient")):
                    self.add(node, op.reason, op.cure)
            elif node not in accounted and op.kind in ("add", "bn"):
                self.add(node, *why_alone(self.view, node))


def _explain(cut: _Cut, parts: list[Part], told: _Told) -> None:
    """Notes why a part is not merged, and why two neighbours are not merged into one layer."""
    view, run = cut.view, cut.run
    for i, j, merge in parts:
        if merge is None and _macs(view, run.steps[i], cut.rates):
            reason, cure = cut.why(i, j)
            if reason:
                told.add(run.ends[j], reason, cure, run.steps[i])
    for (i, j, _), (_, k, _) in pairwise(parts):
        sides = [[view.ops[n] for n in cut.between(*ends)] for ends in ((i, j), (j, k))]
        if not all(any(isinstance(op, Map) for op in side) for side in sides):
            # These only move channels or add values: nobody expects a convolution there.
            continue
        reason, cure = cut.why(i, k)
        if reason:
            whole = f"not merged with {described(view, run.ends[k])}: {reason}"
            told.add(run.ends[j], whole, cure, cut.between(j, k))


def _count(view: GraphView, nodes: tuple[fx.Node, ...]) -> int:
    """How many operators there are, without those that do nothing in eval mode."""
    return sum(view.ops[node].kind != "dropout" for node in nodes)  # type: ignore[union-attr]


def _params(view: GraphView, nodes: tuple[fx.Node, ...]) -> int:
    return sum(view.ops[node].params for node in nodes)  # type: ignore[union-attr, misc]


def _plus(a: Cost, b: Cost) -> Cost:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def _rates(view: GraphView, source: fx.Node, nodes: Iterable[fx.Node]) -> dict[fx.Node, Fraction]:
    """How many positions each value has per position of the run's first value."""
    rates = {source: Fraction(1)}
    for node in nodes:
        op = view.ops[node]
        assert not isinstance(op, Opaque)
        rates[node] = rates[op.values[0]] / op.stride
    return rates


def _macs(view: GraphView, nodes: tuple[fx.Node, ...], rates: dict[fx.Node, Fraction]) -> Fraction:
    return sum((view.ops[node].macs * rates[node] for node in nodes), Fraction(0))  # type: ignore[union-attr]
