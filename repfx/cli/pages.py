"""The report command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import repfx as api
from repfx.cli.inputs import images, preprocessing
from repfx.cli.models import load_model
from repfx.cli.options import (
    Crop,
    Fit,
    Mean,
    Model,
    Order,
    Output,
    Peak,
    Size,
    Std,
    Target,
    Trust,
    Weights,
    app,
    err,
    out,
    split,
)


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
    size: Size = None,
    fit: Fit = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    order: Order = None,
    peak: Peak = None,
    target: Target = "tensorrt",
    weights: Weights = None,
    trust_pickle: Trust = False,
) -> None:
    """Write a page: what merges, what quantization costs each layer, and what to do about it."""
    net = load_model(model, weights, trust_pickle)
    given = {"size": size, "fit": fit, "crop": crop, "mean": mean, "std": std}
    how = preprocessing(net, **given, order=order, peak=peak)
    pictures = None if data is None else images(data, how, limit=64).batches(16)
    other = None if against is None else load_model(against, None, trust_pickle)
    found = api.report(
        net,
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
