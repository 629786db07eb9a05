"""The public functions that draw on several packages: transform, report and verify."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

import repfx.passes  # noqa: F401  (registers the passes)
from repfx.capture.model import capture
from repfx.capture.running import as_args, run_eval
from repfx.data.batches import Batches
from repfx.errors import InputError
from repfx.rewrite.contract import Pass
from repfx.rewrite.difference import Difference, difference
from repfx.rewrite.results import Report
from repfx.rewrite.runner import rewrite

if TYPE_CHECKING:
    from repfx.reporting import Numbers

IMAGES = 64  # a report uses the first ones of its data, and no more


def transform(
    model: nn.Module | fx.GraphModule | torch.export.ExportedProgram,
    passes: Iterable[str | Pass],
    *,
    example: Any = None,
    target: str = "tensorrt",
) -> fx.GraphModule:
    """Runs the passes on a copy of the model, keeps its names, and returns the rewritten copy.

    `passes`: names ("fuse"), specs ("ptq(bits=6)") and configured objects
    (repfx.passes.Ptq(bits=6)) can be mixed. They run in the order of their stages, together with
    the passes that they require. `example`: an input, a tuple of inputs, or a dict of arguments by
    name, for a model whose input cannot be guessed. `target`: the runtime the number formats are
    for, such as tensorrt, onnxruntime or openvino.

    The model's own Python runs once on the example. The result is a GraphModule that is still an
    object of the model's class, with its attributes and methods. If the forward looks at entries of
    the data, the result is a copy of the model, and those of its children that can be traced are
    GraphModules. `result.meta["repfx"]` is the report, with `.merged`, `.declined`, `.facts`, which
    are the conditions on sizes that the graph rests on, and in `.compared` what was compared before
    and after, and how.

    Raises InputError for an unknown pass, option or target, and for a model that has no
    convolution, holds NaN or does not accept the example. Raises CheckError if a pass broke its
    promise."""
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
    """Writes an HTML page: what the passes do to a float model, and what quantization costs it.

    `data`: batches of inputs (N, ...), or of (inputs, labels). The report uses enough batches to
    cover the first 64 images. Without data it shows the weights only. `against`: another float
    model to show next to this one. `titles`: the names of the models on the page. `passes`: the
    passes that produce the deployed model. `json`: a file that the numbers are also written to.

    Returns the numbers, one record per model.

    Raises InputError where `transform` and `calibrate` do, for a model that is already quantized,
    and for a path that cannot be written. Raises MissingPart without jinja2 and plotly."""
    # Imported here because a transform writes no page.
    from repfx.files.store import write_whole
    from repfx.reporting import as_json, measure
    from repfx.reporting.page import write

    models = [model] if against is None else [model, against]
    if len(titles) < len(models) or not all(isinstance(t, str) for t in titles):
        raise InputError(f"titles must name {len(models)} models, not {titles!r}")
    batches = None if data is None else Batches(data, "data").first(IMAGES)
    same: dict[str, Any] = {
        "passes": passes,
        "example": example,
        "target": target,
        "progress": progress,
    }
    # There may be more titles than models.
    found = tuple(
        measure(m, batches, title=t, **same) for m, t in zip(models, titles, strict=False)
    )
    write(found, path)
    if json is not None:
        write_whole(json, lambda part: Path(part).write_text(as_json(found) + "\n"))
    return found


def verify(before: Any, after: Any, x: Any) -> Difference:
    """How far the outputs of two models are apart on x, an input or a tuple of inputs.

    Both models run in eval mode. Raises InputError if one of them does not accept x, and CheckError
    if their outputs have different shapes."""
    args = as_args(x, before)
    assert args is not None
    return difference(_output(before, args), _output(after, args))


def _output(model: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(model, torch.export.ExportedProgram):
        model = capture(model).model
    return run_eval(model, args)


__all__ = ["Report", "report", "transform", "verify"]
