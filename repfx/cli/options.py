"""What commands share: the app, the consoles, options that mean the same everywhere, and how their text is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from repfx.errors import InputError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Merge, quantize and lower CNNs."
)
out, err = Console(), Console(stderr=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A .pt/.pt2 file, or package.module:factory.")]
Weights = Annotated[str | None, typer.Option(help="A state_dict for package.module:factory.")]
Trust = Annotated[bool, typer.Option("--trust-pickle", help="Unpickle MODEL: runs whatever code is in it.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The file to write.")]
Target = Annotated[str, typer.Option(help="tensorrt, onnxruntime or openvino: decides number formats.")]
Data = Annotated[Path, typer.Option(help="A folder or zip of pictures, or a .npy file (N, C, H, W).")]
Size = Annotated[int, typer.Option(help="Side of the square input pictures, in pixels.", min=1)]


def split(passes: str) -> list[str]:
    """Commas between passes, not those inside their parentheses."""
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
        return tuple(float(v) for v in text.split(","))
    except ValueError:
        raise InputError(f"--{name} is numbers separated by commas, not {text!r}") from None
