"""inspect: reports what would merge and into what, and what would not and why; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repfx.capture.model import capture, graphs
from repfx.capture.running import as_args
from repfx.errors import Declined
from repfx.graph.naming import layer, operator
from repfx.graph.view import GraphView
from repfx.rewrite.merge_regions import plan_merges
from repfx.rewrite.names import Names
from repfx.rewrite.runner import require_convolutions
from repfx.rewrite.slide import Slide, explained, plan_slides


@dataclass(frozen=True)
class RegionReport:
    """One block and its operators. MACs are per position of its input.

    `merged` is the layer that the block becomes. It is None if the block is not merged; `reason`
    then says why, and `cure` is a hint on what would help, or empty."""

    name: str
    ops: tuple[str, ...]
    merged: str | None
    reason: str
    macs_before: float
    macs_after: float
    params_before: int
    params_after: int
    cure: str = ""


@dataclass(frozen=True)
class Inspection:
    """What `fuse` would do. `regions`: every block, merged or not. `declined`: those not merged.

    `facts`: what the traced graph takes for granted about the sizes of its inputs."""

    regions: tuple[RegionReport, ...]
    declined: tuple[Declined, ...]
    facts: tuple[str, ...] = ()

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as text:
            console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in text.get().splitlines())

    def __rich__(self) -> Table:
        merged = [r for r in self.regions if r.merged]
        before, after = sum(r.params_before for r in merged), sum(r.params_after for r in merged)
        title = f"{len(merged)} blocks merge, {len(self.declined)} not merged"
        title += f"; parameters of what merges: {before:,} → {after:,}" if merged else ""
        table = Table(title=title, title_justify="left")
        for column in ("block", "operators", "becomes", "MACs", "parameters"):
            table.add_column(
                column,
                overflow="fold",
                justify="right" if column in ("MACs", "parameters") else "left",
            )
        for r in merged:
            change = f"{r.macs_before:,.0f} → {r.macs_after:,.0f}"
            table.add_row(
                escape(r.name),
                _tally(r.ops),
                r.merged,
                change,
                f"{r.params_before:,} → {r.params_after:,}",
            )
        for d in self.declined:
            why = escape(d.reason + (f"; {d.cure}" if d.cure else ""))
            table.add_row(escape(d.where), "[dim]not merged[/dim]", why, "", "")
        for fact in self.facts:
            table.add_row("the input", "[dim]holds for[/dim]", escape(fact), "", "")
        return table


def inspect(model: Any, *, example: Any = None) -> Inspection:
    """Finds every block of the model and reports what `fuse` would turn it into.

    Raises InputError in the same cases as `transform`.
    """
    captured = capture(model, as_args(example, model))
    require_convolutions(captured)
    regions: list[RegionReport] = []
    declined: list[Declined] = list(captured.declined)
    for path, module in graphs(captured.model):
        view = GraphView(module)
        plan, names = plan_merges(view), Names(view, module)
        prefix = f"{path}." if path else ""
        for m in plan.merges:
            removed = m.region.removed
            kinds = tuple(operator(view.ops[node]) for node in removed)
            name = prefix + names.label(m)
            macs, params = (
                (float(m.macs_before), float(m.geometry.macs)),
                (m.params_before, m.geometry.params),
            )
            regions.append(RegionReport(name, kinds, layer(m.geometry), "", *macs, *params))
        slides, failed = plan_slides(view, lambda ops: True, plan.merges)
        regions += [_moved(view, slide, prefix) for slide in slides]
        told = {view.name(slide.affine) for slide in slides}
        why = {view.name(node): inexact for node, inexact in failed.items()}
        for d in explained([d for d in plan.declined if d.where not in told], why):
            regions.append(RegionReport(prefix + d.where, (), None, d.reason, 0, 0, 0, 0, d.cure))
            declined.append(Declined(prefix + d.where, d.reason, d.cure))
    return Inspection(tuple(regions), tuple(declined), tuple(captured.facts))


def _moved(view: GraphView, slide: Slide, prefix: str) -> RegionReport:
    """The report of an affine that moves into layers, which stay as large as they are."""
    ops = [view.ops[n] for n in (slide.affine, *(t.layer for t in slide.takes))]
    layers = [view.name(t.layer) for t in slide.takes]
    macs = float(sum(getattr(op, "macs", 0) for op in ops))
    params = sum(getattr(op, "params", 0) for op in ops)
    into = f"part of {', '.join(prefix + name for name in layers)}"
    affine = getattr(ops[0], "params", 0)
    kinds = tuple(operator(op) for op in ops)
    return RegionReport(
        prefix + view.name(slide.affine), kinds, into, "", macs, macs, params, params - affine
    )


def _tally(kinds: tuple[str, ...]) -> str:
    counts = {k: kinds.count(k) for k in dict.fromkeys(kinds)}
    return ", ".join(k if n == 1 else f"{n} {k}" for k, n in counts.items())
