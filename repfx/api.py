"""The public functions that need more than one room below: transform, report and verify."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

import repfx.passes  # noqa: F401  (registers the passes)
from repfx.capture.model import capture
from repfx.capture.running import run_eval
from repfx.data.batches import Batches
from repfx.errors import InputError
from repfx.rewrite.contract import Pass
from repfx.rewrite.difference import Difference, difference
from repfx.rewrite.results import Report
from repfx.rewrite.runner import as_args, rewrite

if TYPE_CHECKING:
    from repfx.reporting import Numbers

IMAGES = 64  # that a report looks at


def transform(
    model: nn.Module | fx.GraphModule | torch.export.ExportedProgram,
    passes: Iterable[str | Pass],
    *,
    example: Any = None,
    target: str = "tensorrt",
) -> fx.GraphModule:
    """A rewritten copy of the model; the model itself is left as it is, and every name that can
    survive does.

    `passes`: names ("fuse"), specs ("ptq(bits=6)") or configured objects
    (repfx.passes.Ptq(bits=6)), in any mix; they run in the order of their stages, with what they
    require. `example`: an input or a tuple of inputs, for models whose input cannot be guessed.
    `target`: tensorrt, onnxruntime or openvino, which decides number formats.

    The result is a GraphModule. Where the model's own forward cannot be traced it is a copy in the
    model's own class whose traceable children are GraphModules. `result.meta["repfx"]` is the
    report: `.merged` and `.declined`.

    Raises InputError for an unknown pass, option or target, a model without convolutions, with NaN
    or that does not accept the example; CheckError where a pass broke its promise."""
    return rewrite(model, passes, example, target)[0]  # type: ignore[return-value]


def report(
    model: Any,
    path: str | os.PathLike[str],
    *,
    data: Iterable[Any] | None = None,
    against: Any = None,
    titles: Sequence[str] = ("model", "other"),
    passes: Sequence[str | Pass] = ("fuse", "ptq"),
    example: Any = None,
    target: str = "tensorrt",
    json: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> tuple[Numbers, ...]:
    """Writes a page, one HTML file, of what the passes do to a float model and what quantization
    costs each layer.

    `data`: batches of inputs (N, ...), or (inputs, labels); as many are used as hold the first 64
    images. Without it the page has the weights alone. `against`: another float model to show beside
    it. `titles`: what the page calls them. `passes`: what makes the deployed net. `json`: a file
    for the numbers, which are also what is returned, a record a model.

    Raises InputError as `transform` and `calibrate` do, for a quantized model and a path that
    cannot be written; MissingPart without jinja2 and plotly."""
    from repfx.files.store import write_whole  # here: a transform writes no page
    from repfx.reporting import as_json, measure
    from repfx.reporting.page import write

    models = [model] if against is None else [model, against]
    if len(titles) < len(models) or not all(isinstance(t, str) for t in titles):
        raise InputError(f"titles names {len(models)} models, not {titles!r}")
    batches = None if data is None else Batches(data, "data").first(IMAGES)
    same: dict[str, Any] = {
        "passes": passes,
        "example": example,
        "target": target,
        "progress": progress,
    }
    found = tuple(
        measure(m, batches, title=t, **same) for m, t in zip(models, titles, strict=False)
    )  # titles may name more
    write(found, path)
    if json is not None:
        write_whole(json, lambda part: Path(part).write_text(as_json(found) + "\n"))
    return found


def verify(before: Any, after: Any, x: Any) -> Difference:
    """How far two models are apart on input x (or a tuple of inputs), both in eval mode.

    Raises InputError where one does not accept x, CheckError where the outputs have different
    shapes."""
    args = as_args(x)
    assert args is not None
    return difference(_output(before, args), _output(after, args))


def _output(model: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(model, torch.export.ExportedProgram):
        model = capture(model).model
    return run_eval(model, args)


__all__ = ["Report", "report", "transform", "verify"]
