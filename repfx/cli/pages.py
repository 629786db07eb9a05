"""The report command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import repfx as api
from repfx.cli.models import load_model
from repfx.cli.options import (
    Fit,
    Mean,
    Model,
    Output,
    Size,
    Std,
    Target,
    Trust,
    Weights,
    app,
    err,
    numbers,
    out,
    pixels,
    split,
)
from repfx.data.folders import Images


@app.command()
def report(
    model: Model,
    output: Output,
    data: Annotated[
        Path | None, typer.Option(help="A folder or zip of images, or a .npy file (N, C, H, W).")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another float model to show beside this one.")
    ] = None,
    passes: Annotated[
        str, typer.Option(help="The passes that make the deployed model, separated by commas.")
    ] = "fuse,ptq",
    json: Annotated[Path | None, typer.Option("--json", help="A file for the numbers.")] = None,
    size: Size = "224",
    fit: Fit = "crop",
    mean: Mean = "0.485,0.456,0.406",
    std: Std = "0.229,0.224,0.225",
    target: Target = "tensorrt",
    weights: Weights = None,
    trust_pickle: Trust = False,
) -> None:
    """Write a page: what merges, what quantization costs each layer, and what to do about it."""
    pictures = None
    if data is not None:
        a, b = numbers("mean", mean), numbers("std", std)
        images = Images(data, size=pixels(size), fit=fit, limit=64, mean=a, std=b)
        pictures = images.batches(16)
    other = None if against is None else load_model(against, None, trust_pickle)
    found = api.report(
        load_model(model, weights, trust_pickle),
        output,
        data=pictures,
        against=other,
        titles=[Path(name).stem or name for name in (model, against or "")],
        passes=split(passes),
        target=target,
        json=json,
        progress=err.is_terminal,
    )
    for one in found:
        show(one, out)
    out.print(f"wrote {escape(str(output))} ({output.stat().st_size / 1e6:.1f} MB)")


def show(found: api.Numbers, console: Console, most: int = 5) -> None:
    """Prints a short version: a line for each form, and the worst warnings."""
    for form in found.forms:
        sqnr = "" if form.sqnr is None else f", {form.sqnr:.1f} dB"
        top1 = "" if form.top1 is None else f", top-1 {form.top1:.2f} %"
        console.print(
            f"{escape(found.title)} {form.name}: {form.convs} layers, {form.size / 1e6:.2f} "
            f"MB{sqnr}{top1}"
        )
    for warning in found.warnings[:most]:
        console.print(
            f"warning: {escape(warning.layer)} {escape(warning.what)} ({escape(warning.cure)})"
        )
    if len(found.warnings) > most:
        console.print(f"and {len(found.warnings) - most} more on the page")
