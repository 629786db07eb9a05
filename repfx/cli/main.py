"""The commands. Exit codes: 0 done, 1 wrong result, 2 bad input or usage, 3 part not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import repfx as api
from repfx.cli import deploy, pages, quantizing
from repfx.cli.demo import demo as run_demo
from repfx.cli.models import load_model
from repfx.cli.options import (
    Batch,
    Model,
    Output,
    SkipBroken,
    Target,
    Trust,
    Weights,
    Workers,
    app,
    err,
    out,
    pixels,
    say,
    show_report,
    split,
)
from repfx.errors import InputError, RepfxError
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
    show_report(result.meta["repfx"])
    say(f"wrote {output}")


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


__all__ = ["app", "deploy", "main", "pages", "quantizing"]
