"""merge_regions: which stretches of a model to merge, decided by multiply-accumulates before any
weight is read.

A run of dominators d0 ... dn is cut into parts; each part is one merged convolution where that is
exact, or what it was. The cut with the fewest multiply-accumulates wins, then the one that leaves
the fewest operators, then the one that takes out the fewest dropouts, since training may go on:

    best(i) = min over j > i of  cost(i, j) + best(j),  cost = (MACs, operators left, ...)

so a block merges as a whole where that pays, and its inner blocks do where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

Cost = tuple[Fraction, int, int]  # MACs, operators left, dropouts taken out
Accept = Callable[[list[Op]], bool]


@dataclass(frozen=True)
class Merge:
    """A region that will become one convolution of `geometry`. MACs are per position of the
    region's source.
    """

    region: Region
    geometry: Geometry
    macs_before: Fraction
    params_before: int


@dataclass(frozen=True)
class Plan:
    """What to merge and what was left alone."""

    merges: tuple[Merge, ...]
    declined: tuple[Declined, ...]
    again: bool  # whether these merges may make room for more


def plan_merges(view: GraphView, accept: Accept = lambda ops: True) -> Plan:
    """Finds every region to merge. `accept` may narrow the choice by the operators a region
    holds."""
    merges: list[Merge] = []
    declined: dict[str, Declined] = {}
    taken: set[fx.Node] = set()
    needed: set[fx.Node] = set()  # what the planned merges read, whatever reads it now
    explained: set[fx.Node] = set()
    blocked = False
    for sink in reversed(view.nodes):
        if sink in taken or not is_linear(view, sink) or not is_value(view, sink):
            continue
        run = run_to(view, sink, taken)
        blocked |= run.blocked
        if len(run.ends) < 2:
            continue
        for merge in _cut(view, run, accept, needed, declined, explained):
            merges.append(merge)
            needed.add(merge.region.source)
            taken.update(merge.region.removed)
    accounted = taken | explained
    for node in view.nodes:
        op = view.ops[node]
        if isinstance(op, Opaque):
            if op.reason and not op.reason.startswith(("a product", "a quotient")):
                declined.setdefault(view.name(node), Declined(view.name(node), op.reason, op.cure))
        elif node not in accounted and op.kind in ("add", "bn"):
            declined.setdefault(view.name(node), Declined(view.name(node), *why_alone(view, node)))
    # A merge beside linear values has changed what merging those would cost, or left one with a
    # single reader.
    again = bool(merges) and (blocked or any(_beside(view, m.region) for m in merges))
    return Plan(tuple(reversed(merges)), tuple(declined.values()), again)


def _beside(view: GraphView, region: Region) -> bool:
    near = (region.source, *region.sink.users)
    return bool(region.kept) or any(is_linear(view, node) for node in near)


def _cut(
    view: GraphView,
    run: Run,
    accept: Accept,
    needed: set[fx.Node],
    declined: dict[str, Declined],
    explained: set[fx.Node],
) -> Iterator[Merge]:
    """The cheapest cut of a run, as the merges in it; its reasons go to `declined`, what they are
    for to `explained`.
    """
    n = len(run.steps)
    nodes = [node for step in run.steps for node in step]
    rates = _rates(view, run.ends[0], nodes)
    alone: list[Cost] = [(_macs(view, step, rates), _count(view, step), 0) for step in run.steps]
    best: list[tuple[Cost, int, Merge | None]] = [((Fraction(0), 0, 0), n, None)]
    known: list[dict[fx.Node, Geometry | Inexact]] = []
    for i in reversed(range(n)):
        after = tuple(node for step in run.steps[i:] for node in step)
        known.insert(0, geometries(view, run.ends[i], after))
        choices: list[tuple[Cost, int, Merge | None]] = []
        for j in range(n, i, -1):
            stretch = tuple(node for step in run.steps[i:j] for node in step)
            kept = (
                region_of(view, run.ends[i], run.ends[j], stretch, needed).kept
                if view.writes.of
                else frozenset()
            )
            if view.writes.disturb(run.ends[i], stretch, kept):
                known[0][run.ends[j]] = Inexact(
                    "a value in it is changed in place between its readers"
                )
            whole = known[0][run.ends[j]]
            if isinstance(whole, Geometry) and whole.why_no_layer:
                known[0][run.ends[j]] = Inexact(whole.why_no_layer)
            offer = _offer(
                view,
                run.ends[i],
                run.ends[j],
                stretch,
                known[0][run.ends[j]],
                rates,
                accept,
                needed,
            )
            rest = best[j - i - 1][0]
            if offer is not None:
                choices.append((_plus(offer[0], rest), j, offer[1]))
            elif j == i + 1:
                choices.append((_plus(alone[i], rest), j, None))
        best.insert(0, min(choices, key=lambda c: c[0]))  # the first of equals is the longest
    i, parts = 0, []
    while i < n:
        _, j, merge = best[i]
        parts.append((i, j))
        if merge is not None:
            yield merge
        elif alone[i][0]:
            why = known[i][run.ends[j]]
            reason = (
                why.reason if isinstance(why, Inexact) else _costly(view, run, i, j, why, rates)
            )
            if reason:
                cure = why.cure if isinstance(why, Inexact) else ""
                declined.setdefault(
                    view.name(run.ends[j]), Declined(view.name(run.ends[j]), reason, cure)
                )
                explained.update(run.steps[i])
        i = j
    for (i, j), (_, k) in pairwise(parts):
        why = known[i][run.ends[k]]
        sides = [
            [view.ops[n] for step in run.steps[a:b] for n in step] for a, b in ((i, j), (j, k))
        ]
        if not all(any(isinstance(op, Map) for op in side) for side in sides):
            # Only channels move, or values add up: nobody would look for a convolution there.
            continue
        if isinstance(why, Inexact):
            reason, cure = why.reason, why.cure
        else:
            reason, cure = _costly(view, run, i, k, why, rates), ""
        if reason:
            explained.update(node for step in run.steps[j:k] for node in step)
            where = view.name(run.ends[j])
            declined.setdefault(
                where,
                Declined(where, f"not merged with {described(view, run.ends[k])}: {reason}", cure),
            )


def _offer(
    view: GraphView,
    source: fx.Node,
    sink: fx.Node,
    nodes: tuple[fx.Node, ...],
    geometry: Geometry | Inexact,
    rates: dict[fx.Node, Fraction],
    accept: Accept,
    needed: set[fx.Node],
) -> tuple[Cost, Merge] | None:
    """The merge of a stretch and what it costs; None where it is not exact, has no convolution or
    removes nothing.
    """
    if isinstance(geometry, Inexact):
        return None
    region = region_of(view, source, sink, nodes, needed)
    removed = region.removed
    ops = [view.ops[node] for node in removed]
    if not any(isinstance(op, Map) and op.macs for op in ops) or not accept(ops):
        return None
    left = 1 + (len(geometry.pad_steps) if uneven(geometry) else 0) + geometry.turned
    before = _macs(view, removed, rates)
    merged = geometry.macs * rates[source]
    if left >= _count(view, removed) or merged > before:
        return None
    kept = _macs(view, tuple(region.kept), rates)
    per_source = before / rates[source]
    merge = Merge(
        region, geometry, per_source, sum(op.params for op in ops if not isinstance(op, Opaque))
    )
    work = _count(view, removed)
    return (merged + kept, left + _count(view, tuple(region.kept)), len(removed) - work), merge


def _count(view: GraphView, nodes: tuple[fx.Node, ...]) -> int:
    """Operators, but for those that only training knows."""
    return sum(view.ops[node].kind != "dropout" for node in nodes)  # type: ignore[union-attr]


def _plus(a: Cost, b: Cost) -> Cost:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def _rates(view: GraphView, source: fx.Node, nodes: list[fx.Node]) -> dict[fx.Node, Fraction]:
    """Positions of each value per position of the run's first."""
    rates = {source: Fraction(1)}
    for node in nodes:
        op = view.ops[node]
        assert not isinstance(op, Opaque)
        rates[node] = rates[op.values[0]] / op.stride
    return rates


def _macs(view: GraphView, nodes: tuple[fx.Node, ...], rates: dict[fx.Node, Fraction]) -> Fraction:
    return sum((view.ops[node].macs * rates[node] for node in nodes), Fraction(0))  # type: ignore[union-attr]


def _costly(
    view: GraphView, run: Run, i: int, k: int, geometry: Geometry, rates: dict[fx.Node, Fraction]
) -> str:
    """Says that a merge would multiply the work; empty where the stretch holds no two convolutions
    to speak of.
    """
    stretch = tuple(node for step in run.steps[i:k] for node in step)
    region = region_of(view, run.ends[i], run.ends[k], stretch)
    before = _macs(view, region.removed, rates)
    merged = geometry.macs * rates[run.ends[i]]
    if merged <= before:
        return ""
    if region.kept:
        return (
            f"{described(view, max(region.kept, key=view.index.__getitem__))} inside it is "
            "read elsewhere and must stay"
        )
    costs = f"{float(merged):.6g} multiply-accumulates a pixel, the parts take {float(before):.6g}"
    return f"one convolution would take {costs}"
