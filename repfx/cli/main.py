"""The commands. Exit codes: 0 done, 1 wrong result, 2 bad input or usage, 3 part not installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import nn

import repfx as api
from repfx.cli import deploy, pages
from repfx.cli.demo import demo as run_demo
from repfx.cli.models import load_model
from repfx.cli.options import (
    Batch,
    Data,
    Device,
    Fit,
    Mean,
    Model,
    Output,
    Size,
    SkipBroken,
    Std,
    Target,
    Trust,
    Weights,
    Workers,
    app,
    err,
    numbers,
    out,
    pixels,
    place,
    say,
    split,
)
from repfx.data.folders import Images
from repfx.errors import InputError, RepfxError, unknown
from repfx.passes import Ptq
from repfx.quant import METHODS
from repfx.rewrite.results import Report
from repfx.training.recipe import OPTIMIZERS, PRESETS
from repfx.training.tasks import TASKS, SuperResolution, data_of, task_of


@app.command()
def inspect(model: Model, weights: Weights = None, trust_pickle: Trust = False) -> None:
    """Show which blocks would merge, and which would not and why."""
    out.print(api.inspect(load_model(model, weights, trust_pickle)))


@app.command()
def transform(
    model: Model,
    output: Output,
    passes: Annotated[
        str, typer.Option(help="Passes, separated by commas, such as fuse or 'ptq(bits=8)'.")
    ] = "fuse",
    target: Target = "tensorrt",
    weights: Weights = None,
    trust_pickle: Trust = False,
) -> None:
    """Run passes on a model and save the result."""
    result = api.transform(load_model(model, weights, trust_pickle), split(passes), target=target)
    api.save(result, output)
    _print_report(result.meta["repfx"])
    say(f"wrote {output}")


@app.command()
def quantize(
    model: Model,
    data: Data,
    output: Output,
    bits: Annotated[int, typer.Option(help="Bits of activations and of weights.")] = 8,
    method: Annotated[
        str, typer.Option(help=f"{', '.join(METHODS)}: choose ranges only; repapq: also learn.")
    ] = "repapq",
    iterations: Annotated[
        int, typer.Option(min=1, help="repapq: learning steps for each block.")
    ] = 1000,
    bias: Annotated[
        bool, typer.Option("--bias", help="Without repapq: correct biases for rounding.")
    ] = False,
    keep: Annotated[
        int,
        typer.Option(
            min=0, help="Keep this many of the worst layers at 8 bits, or in float if --bits is 8."
        ),
    ] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="repapq: a file to resume from after an interruption.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="repapq: a folder for activations, to save memory."),
    ] = None,
    size: Size = "224",
    fit: Fit = "crop",
    batch: Batch = 32,
    limit: Annotated[int, typer.Option(min=1, help="Use at most this many images.")] = 1024,
    workers: Workers = 0,
    mean: Mean = "0.485,0.456,0.406",
    std: Std = "0.229,0.224,0.225",
    skip_broken: SkipBroken = False,
    device: Device = None,
    target: Target = "tensorrt",
    weights: Weights = None,
    trust_pickle: Trust = False,
) -> None:
    """Merge, quantize and calibrate a model on images, and save it."""
    images = Images(
        data,
        size=pixels(size),
        fit=fit,
        limit=limit,
        mean=numbers("mean", mean),
        std=numbers("std", std),
        skip_broken=skip_broken,
    )
    _print_broken(images)
    say(f"{len(images)} of {images.found} images")
    batches = images.batches(batch, workers)
    where = place(device)
    loaded = load_model(model, weights, trust_pickle)
    how = _Quantizing(bits, method, iterations, bias, keep, checkpoint, cache)
    result, report = how.run(loaded, batches, where, target)
    off = api.verify(loaded, result, next(iter(batches)))
    api.save(result, output)
    _print_report(report)
    out.print(f"SQNR against the float model on the first batch: {off.sqnr:.1f} dB")
    say(f"wrote {output}")


@dataclass(frozen=True)
class _Quantizing:
    """The options of `quantize` that affect the result. Raises InputError for an unknown method."""

    bits: int
    method: str
    iterations: int
    bias: bool
    keep: int
    checkpoint: Path | None
    cache: Path | None

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, "repapq"):
            raise unknown("method", self.method, (*METHODS, "repapq"))

    @property
    def learns(self) -> bool:
        return self.method == "repapq"

    def run(
        self, model: Any, batches: Any, where: torch.device, target: str
    ) -> tuple[nn.Module, Report]:
        """The quantized model, on the CPU, and the report on merging it."""
        ptq = Ptq(self.bits, weights="mse" if self.learns else "max")
        if self.keep:
            ptq = self._sparing_the_worst(ptq, model, batches, where, target)
        merged = api.transform(model, [ptq, "qprep"] if self.learns else [ptq], target=target)
        report: Report = merged.meta["repfx"]
        result: nn.Module = merged.to(where)
        if self.learns:
            api.reconstruct(
                result,
                batches,
                iterations=self.iterations,
                checkpoint=self.checkpoint,
                cache=self.cache,
                progress=err.is_terminal,
            )
            result = api.transform(result, ["fuse"], target=target)
        else:
            api.calibrate(
                result, batches, method=self.method, bias=self.bias, progress=err.is_terminal
            )
        return result.cpu(), report

    def _sparing_the_worst(
        self, ptq: Ptq, model: Any, batches: Any, where: torch.device, target: str
    ) -> Ptq:
        """The pass with the layers that lose the most accuracy kept wide."""
        tried = api.transform(model, [ptq], target=target).to(where)
        ranges = api.calibrate(tried, batches, method="mae" if self.learns else self.method)
        lost = api.sensitivity(ranges, islice(batches, 4), progress=err.is_terminal)
        names = lost.worst(self.keep)
        say(f"kept wide: {', '.join(names)}")
        return replace(ptq, wide=names, wide_bits=8 if self.bits < 8 else 32)


@app.command()
def train(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            help="A folder or zip of images, best with train/ and test/ in it, or digits. "
            "Detection: with boxes in COCO's form."
        ),
    ],
    output: Output,
    task: Annotated[
        str, typer.Option(help=f"What to train for: {', '.join(TASKS)}.")
    ] = "classification",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs; by default those of the preset.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"A paper's recipe: {', '.join(PRESETS)}.")
    ] = None,
    passes: Annotated[
        str, typer.Option(help="Passes to run first, separated by commas, such as repq.")
    ] = "",
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    optimizer: Annotated[str | None, typer.Option(help=", ".join(OPTIMIZERS) + ".")] = None,
    batch: Batch = 64,
    size: Annotated[
        str | None,
        typer.Option(help="Size in pixels of images or patches: 224, or 480x640 (height x width)."),
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Super-resolution: how many times larger.")] = 2,
    channels: Annotated[int, typer.Option(help="Super-resolution: 1 (Y) or 3 (RGB).")] = 1,
    workers: Workers = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A file to resume from after an interruption.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="A file that gets one line of JSON per epoch.")
    ] = None,
    skip_broken: SkipBroken = False,
    seed: int = 0,
    target: Target = "tensorrt",
    weights: Weights = None,
    trust_pickle: Trust = False,
) -> None:
    """Train a model on images, quantization-aware with --passes repq, and save it."""
    goal = (
        SuperResolution(scale, channels=channels) if task == "super-resolution" else task_of(task)
    )
    torch.manual_seed(seed)
    net = load_model(model, weights, trust_pickle)
    if not output.parent.is_dir():
        raise InputError(f"no such folder: {output.parent}")
    net = api.transform(net, split(passes), target=target)
    sides = None if size is None else pixels(size)
    pictures, valid = data_of(goal, data, size=sides, skip_broken=skip_broken)
    _print_broken(pictures, getattr(valid, "dataset", valid))
    history = api.fit(
        net,
        goal,
        pictures,
        valid=valid,
        epochs=epochs,
        preset=preset,
        lr=lr,
        optimizer=optimizer,
        batch=batch,
        workers=workers,
        checkpoint=checkpoint,
        log=log,
        seed=seed,
    )
    api.save(net.eval(), output)
    out.print(history)
    say(f"wrote {output}")


def _print_broken(*parts: Any) -> None:
    for part in parts:
        for name in getattr(part, "broken", ()):
            say(f"left out: {name}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write to.")] = Path(
        "out"
    ),
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    seed: int = 0,
) -> None:
    """Train a small RepVGG on handwritten digits, merge, quantize, lower and run it."""
    run_demo(output, epochs, seed, out)


def main() -> None:
    """Entry point. An error is one paragraph on stderr; --debug shows the traceback."""
    debug = "--debug" in sys.argv
    argv = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(argv, standalone_mode=False)
        if code == 130:  # typer reports Ctrl-C this way
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except RepfxError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; no half-written file is left", 130)
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's usage errors
            _fail(error.format_message() or "see --help", error.exit_code)
        _fail(f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)", 1)


def _fail(text: str, code: int) -> None:
    err.print(f"repfx: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _print_report(report: Report) -> None:
    table = Table(title="what changed", title_justify="left")
    for column in ("layer", "from", "MACs", "parameters", "error"):
        table.add_column(column, overflow="fold")
    for m in report.merged:
        change = f"{m.macs_before:,.0f} → {m.macs_after:,.0f}"
        params = f"{m.params_before:,} → {m.params_after:,}"
        table.add_row(escape(m.into), f"{len(m.ops)} operators", change, params, f"{m.error:.0e}")
    out.print(table) if report.merged else out.print("nothing to merge")
    for line in report.compared:
        say(f"compared: {line}")
    for d in report.declined:
        say(f"declined: {d}")


__all__ = ["app", "deploy", "main", "pages"]
