"""What `quantize` found: the net, every rung that was tried, and what each costs and loses."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from repfx.errors import Declined


@dataclass(frozen=True)
class Score:
    """How a net does on the images held out; see `repfx.ladder.judge`.

    `measured`: the caller's metric, or accuracy, where there are labels. `lost`: what the budget
    counts."""

    sqnr: float
    agreement: float | None
    measured: float | None
    lost: float


@dataclass(frozen=True)
class Rung:
    """One way to quantize. `expected` and `seconds`: how long it should take, and took.

    `size`: bytes of weights and biases. `latency`: an estimate, relative to the float net: an
    integer multiply-accumulate counts as a quarter of one in float; None where the sizes inside the
    net are unknown. `note`: why there is no score, or what happened; it may be empty."""

    name: str
    expected: float
    seconds: float = 0.0
    score: Score | None = None
    size: int = 0
    latency: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Placement:
    """Which layers run in integers, and which stay in float and why.

    `wide`: those in integers that were left at 8 bits."""

    integer: tuple[str, ...]
    floats: tuple[Declined, ...]
    wide: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`. Prints as a table.

    In the table, dB is the SQNR, and `same` how often both nets name the same class.

    `model`: the chosen net. `rungs`: all that was tried, and what was left out. `chosen`: the name
    of the rung the net is from. `met`: whether the budget was met, None without one. `unit`: what a
    loss is counted in. `right`: the float net's accuracy or metric, if there is one. `images`: how
    many calibrated and how many were held out. `notes`: what else to know."""

    model: nn.Module = field(repr=False)
    rungs: tuple[Rung, ...]
    chosen: str
    budget: float | None
    met: bool | None
    unit: str
    right: float | None
    placement: Placement
    images: tuple[int, int]
    sizes: tuple[int, int]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def rung(self) -> Rung:
        """The rung that the net is from."""
        return next(r for r in self.rungs if r.name == self.chosen)

    def json(self) -> str:
        """Everything but the net, as JSON."""
        names = ("chosen", "budget", "met", "unit", "right", "images", "sizes", "seconds", "notes")
        whole: dict[str, Any] = {name: getattr(self, name) for name in names}
        whole["rungs"] = [asdict(r) for r in self.rungs]
        whole["placement"] = asdict(self.placement)
        return json.dumps(_finite(whole), indent=1)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes an HTML page with the table and with accuracy against latency, size and time.

        Raises InputError for a path that cannot be written. Raises MissingPart without jinja2 and
        plotly."""
        from repfx.ladder.page import write  # plotly is slow to import

        write(self, path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=self._title(), title_justify="left")
        table.add_column("")
        table.add_column("how", overflow="fold")
        heads = ("dB", "same, %", *(["score"] if self.right is not None else []))
        for head in (*heads, "lost", "MB", "latency", "s"):
            table.add_column(head, justify="right")
        for r in self.rungs:
            if r.score is None:
                blank = [""] * (len(heads) + 3)
                table.add_row("", f"{r.name}: {r.note}", *blank, f"({r.expected:.0f})")
                continue
            s = r.score
            own = [_number(s.measured, 2)] if self.right is not None else []
            numbers = [_number(s.sqnr, 1), _number(s.agreement, 1), *own, _number(s.lost, 2)]
            rest = [f"{r.size / 1e6:.2f}", _number(r.latency, 2), f"{r.seconds:.0f}"]
            name = f"{r.name} ({r.note})" if r.note else r.name
            table.add_row("→" if r.name == self.chosen else "", name, *numbers, *rest)
        yield table
        yield from self.lines()

    def lines(self) -> list[str]:
        """What was done, in sentences."""
        count, every = len(self.placement.integer), len(self.placement.floats)
        found = [
            f"{count} of {count + every} layers run in integers; {self.sizes[0] / 1e6:.3g} MB of "
            f"weights became {self.sizes[1] / 1e6:.3g} MB",
            *(f"in float: {d}" for d in self.placement.floats),
            *(f"left at 8 bits: {name}" for name in self.placement.wide),
            f"{self.images[0]} images calibrated it, {self.images[1]} judged it, in "
            f"{self.seconds:.0f} s",
            *self.notes,
        ]
        if self.budget is not None:
            word = "meets" if self.met else "does not meet"
            found.insert(0, f"{self.chosen!r} {word} the budget of {self.budget:g} {self.unit}")
        return found

    def _title(self) -> str:
        right = "" if self.right is None else f"; the float net has {self.right:.2f}"
        return f"ways to quantize; lost in {self.unit}{right}"


def _number(value: float | None, digits: int) -> str:
    known = value is not None and value != -math.inf
    return f"{value:.{digits}f}" if known else "–"


def _finite(value: Any) -> Any:
    """The same, with None for infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
