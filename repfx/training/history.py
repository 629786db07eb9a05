"""History: the record of a training run, one row per epoch. It prints as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table


@dataclass(frozen=True)
class Epoch:
    """One epoch, counted from 1.

    `loss`: mean training loss. `lr`: the last learning rate. `seconds`: time, with validation.
    `metrics`: those on the validation data. `faults`: quantizers whose grid training has made
    useless, and in the last epoch a loss that ends above its least, in words.
    """

    epoch: int
    loss: float
    lr: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    def line(self) -> str:
        """The row as a line of JSON. Numbers that are not finite become null."""
        values: dict[str, Any] = {**asdict(self), **self.metrics}
        del values["metrics"], values["faults"]
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}
        return json.dumps({**values, **({"faults": self.faults} if self.faults else {})})


@dataclass(frozen=True)
class History:
    """The rows of a run, in order.

    `resumed` is the epoch from which the run continued, or None if it ran from the start.
    """

    rows: tuple[Epoch, ...]
    resumed: int | None = None

    def __iter__(self) -> Iterator[Epoch]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> Epoch:
        return self.rows[at]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"{len(self.rows)} epochs", title_justify="left")
        names = list(dict.fromkeys(name for row in self.rows for name in row.metrics))
        for column in ("epoch", "loss", "lr", *names, "s"):
            table.add_column(column, justify="right")
        for r in self.rows:
            found = [f"{r.metrics[n]:.4g}" if n in r.metrics else "" for n in names]
            table.add_row(str(r.epoch), f"{r.loss:.4g}", f"{r.lr:.3g}", *found, f"{r.seconds:.1f}")
        yield table
        yield from (self.rows[-1].faults if self.rows else ())

    def __str__(self) -> str:
        console = Console(width=124)
        with console.capture() as shown:
            console.print(self)
        return shown.get()
