"""Latency of a model's forms, timed in turn so that slow moments of the machine affect all."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from repfx.errors import InputError
from repfx.lowering.onnx.lower import lower
from repfx.lowering.runtimes.isa import running
from repfx.lowering.runtimes.layers import Kernels, kernels
from repfx.lowering.runtimes.run import session


@dataclass(frozen=True)
class Timing:
    """One form in one runtime: milliseconds per run and, for INT8, which layers run in integers."""

    form: str
    runtime: str
    median: float
    fastest: float
    slowest: float
    kernels: Kernels | None = None


@dataclass(frozen=True)
class Bench:
    """The timings. Prints as a table; `json()` gives the same numbers as JSON."""

    rows: tuple[Timing, ...]
    batch: int
    cpu: str = ""

    def json(self) -> str:
        return json.dumps(
            {"batch": self.batch, "cpu": self.cpu, "milliseconds": [asdict(r) for r in self.rows]},
            indent=1,
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"milliseconds per batch of {self.batch}", caption=self.cpu)
        for name in ("form", "runtime"):
            table.add_column(name)
        for name in ("median", "fastest..slowest", "ratio to float", "layers in integers"):
            table.add_column(name, justify="right")
        for r in self.rows:
            base = next(
                (o.median for o in self.rows if o.runtime == r.runtime and o.form == "merged"), None
            )
            ratio = "" if base is None else f"{r.median / base:.2f}"
            layers = "" if r.kernels is None else f"{r.kernels.integers} of {r.kernels.layers}"
            table.add_row(
                r.form,
                r.runtime,
                f"{r.median:.2f}",
                f"{r.fastest:.2f}..{r.slowest:.2f}",
                ratio,
                layers,
            )
        yield table


def interleaved(
    runs: Mapping[Any, Callable[[], Any]], rounds: int, progress: bool = False
) -> dict[Any, list[float]]:
    """The milliseconds of each function in each of `rounds` rounds, after two that do not count.

    The order is shuffled in each round, because a run after a large model finds cold caches."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    order, draw = list(runs.items()), random.Random(0)
    with torch.no_grad():
        for i in track(range(rounds + 2), "measuring", disable=not progress):
            draw.shuffle(order)
            for name, run in order:
                start = time.perf_counter()
                run()
                if i >= 2:
                    times[name].append(1000 * (time.perf_counter() - start))
    return times


@dataclass(frozen=True)
class Forms:
    """One model as written, merged, and quantized for each runtime, by its name."""

    written: nn.Module
    merged: nn.Module
    quantized: Mapping[str, nn.Module]


def bench(
    forms: Forms,
    x: Tensor,
    *,
    rounds: int = 20,
    threads: int | None = None,
    progress: bool = False,
) -> Bench:
    """Times the model in torch, as written and merged, and in each runtime, merged and INT8.

    `x`: (N, ...). Raises InputError where a model does not accept it, MissingPart for a runtime
    that is not installed."""
    if rounds < 1:
        raise InputError(f"rounds must be a whole number from 1, not {rounds}")
    runs: dict[Any, Callable[[], Any]] = {
        ("train form", "torch"): lambda: forms.written(x),
        ("merged", "torch"): lambda: forms.merged(x),
    }
    layers: dict[Any, Kernels] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = lower(forms.merged, Path(folder) / "float.onnx", example=x).onnx
        for name, model in forms.quantized.items():
            file = lower(model, Path(folder) / f"{name}.onnx", example=x, target=name).onnx
            for form, path in (("merged", plain), ("INT8", file)):
                runs[form, name] = partial(session(name, path, threads=threads), (x,))
            layers["INT8", name] = kernels(name, file)
        times = interleaved(runs, rounds, progress)
    rows = [
        Timing(form, runtime, statistics.median(t), min(t), max(t), layers.get((form, runtime)))
        for (form, runtime), t in times.items()
    ]
    return Bench(tuple(rows), len(x), running())
