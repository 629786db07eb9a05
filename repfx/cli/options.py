"""What the commands share: the app, the consoles, common options and how their text is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repfx import __version__
from repfx.errors import InputError
from repfx.rewrite.results import Report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"repfx {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Merge, quantize and lower CNNs."""


out, err = Console(emoji=False), Console(stderr=True, emoji=False)
LOWERED = (".onnx", ".engine", ".plan", ".trt", ".xml")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt/.pt2 file, or package.module:factory, also with arguments: "
        "\"nets:create('s', classes=10)\".",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="A checkpoint of any common form for package.module:factory. FILE#ema takes the "
        "weights at 'ema' in it."
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-pickle", help="Unpickle MODEL, which runs any code in it.")
]
Output = Annotated[Path, typer.Option("-o", "--output", help="The file to write.")]
Target = Annotated[
    str, typer.Option(help="tensorrt, onnxruntime or openvino; decides the number formats.")
]
Data = Annotated[Path, typer.Option(help="A folder or zip of images, or a .npy file (N, C, H, W).")]
Device = Annotated[
    str | None,
    typer.Option(help="Where to run, such as cpu or cuda:0; by default a GPU if there is one."),
]
Batch = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
Mean = Annotated[
    str | None,
    typer.Option(help="Mean of each channel; by default the model's record, else ImageNet's."),
]
Std = Annotated[str | None, typer.Option(help="Standard deviation of each channel.")]
Size = Annotated[
    str | None,
    typer.Option(
        help="Input size in pixels: 224, or 480x640 (height x width); by default the model's "
        "record, else 224."
    ),
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")
]
Fit = Annotated[
    str | None,
    typer.Option(
        help="crop: images fill the size and are cut; letterbox: they are whole, as in detection."
    ),
]
Crop = Annotated[
    float | None,
    typer.Option(help="The share of the resized image to keep, such as 0.875 for 224 of 256."),
]
Order = Annotated[str | None, typer.Option(help="Order of the channels: RGB or BGR.")]
Peak = Annotated[
    float | None,
    typer.Option(help="The largest value of a pixel, before the mean is taken off: 1 or 255."),
]


def split(passes: str) -> list[str]:
    """Splits passes at the commas between them, not at those inside parentheses."""
    parts, depth = [""], 0
    for c in passes:
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(v) for v in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise InputError(f"--{name} must be numbers separated by commas, not {text!r}")
    return found


def whole(name: str, text: str, count: int | None = None) -> tuple[int, ...]:
    """The whole numbers from 1 in a text: `count` of them, or any number where it is None.

    >>> whole("batches", "1,8,32", 3)
    (1, 8, 32)
    """
    try:
        found = tuple(int(v) for v in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < v < 2**31 for v in found) or count not in (None, len(found)):
        many = "" if count is None else f"{count} "
        raise InputError(
            f"--{name} must be {many}whole numbers from 1, separated by commas, not {text!r}"
        )
    return found


def pixels(text: str) -> int | tuple[int, int]:
    """The size of images in a text: the side of a square, or height and width.

    >>> pixels("224"), pixels("480x640")
    (224, (480, 640))
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(v.isascii() and v.isdigit() and 0 < int(v) < 2**31 for v in sides):
        raise InputError(f"--size is a side in pixels or HEIGHTxWIDTH, not {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def place(name: str | None) -> torch.device:
    """The named device, by default a GPU if there is one. Raises InputError if it is unusable."""
    try:
        found = torch.device(
            name if name is not None else "cuda" if torch.cuda.is_available() else "cpu"
        )
        float(torch.zeros((), device=found))
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name} cannot be used: {str(error).splitlines()[0].split('. ')[0]}"
        ) from error
    return found


def named(output: Path, *suffixes: str) -> Path:
    """The output path with one of these suffixes.

    A path that has one stays unchanged. Otherwise the first suffix replaces that of another kind of
    output, or follows the name: other dots in a name do not count.

    >>> [named(Path(name), ".onnx").name for name in ("net.ONNX", "net.engine", "net.v2")]
    ['net.ONNX', 'net.onnx', 'net.v2.onnx']
    """
    if output.is_dir() or not output.name:
        raise InputError(f"-o must name a file to write; {output} is a folder")
    if output.suffix.lower() in suffixes:
        return output
    name = output.stem if output.suffix.lower() in LOWERED else output.name
    return output.with_name(name + suffixes[0])


def say(text: object) -> None:
    """Prints a line unchanged: rich would read [brackets] in a path or a layer as a style."""
    out.print(str(text), markup=False, highlight=False)


def beside(model: str) -> Path:
    """Where a result of MODEL goes by default: beside its file, or into this folder.

    >>> beside("nets/small.pt").as_posix(), beside("nets.small:Nets.net(1.0, 'a:b')").as_posix()
    ('nets/small', 'net')
    """
    if ":" in model and not Path(model).exists():
        factory = model.partition(":")[2].partition("(")[0]
        return Path(factory.rpartition(".")[2])
    return Path(model).with_suffix("")


def show_report(report: Report) -> None:
    """Prints what merged, what did not and why, and what was compared."""
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
