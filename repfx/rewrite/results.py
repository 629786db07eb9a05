"""What passes report, as plain data: merges, declined parts and inserted layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from repfx.errors import Declined


@dataclass(frozen=True)
class Merged:
    """One region that became one layer: its operators, the layer's path, and the cost of both.

    MACs are multiply-accumulates per position of the region's input. `error` is the relative
    error of the merged layer, measured in float64."""

    name: str
    ops: tuple[str, ...]
    into: str
    macs_before: float
    macs_after: float
    params_before: int
    params_after: int
    error: float


@dataclass(frozen=True)
class Result:
    """What one pass did to one graph."""

    name: str
    merged: tuple[Merged, ...] = ()
    declined: tuple[Declined, ...] = ()
    inserted: tuple[str, ...] = ()


@dataclass
class Report:
    """What the passes did.

    `results` has one entry per pass and graph; `untraced` lists the modules that could not be
    traced and stay as written. `facts` are the conditions on sizes that the graph rests on, because
    the model's Python looked at them; each call checks them. `compared` says what was compared
    before and after, and how.
    """

    results: list[Result] = field(default_factory=list)
    untraced: list[Declined] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)

    @property
    def merged(self) -> list[Merged]:
        return [m for r in self.results for m in r.merged]

    @property
    def declined(self) -> list[Declined]:
        return [*self.untraced, *(d for r in self.results for d in r.declined)]
