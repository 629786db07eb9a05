"""The public functions. Each is one call into a lower floor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

import repfx.passes  # noqa: F401  (registers the passes)
from repfx.graph.capture import capture
from repfx.graph.running import run_eval
from repfx.graph.store import load, save
from repfx.lower import Artifact, Finding, lint, lower
from repfx.rewrite.contract import Pass
from repfx.rewrite.inspection import Inspection, inspect
from repfx.rewrite.runner import Report, as_args, rewrite
from repfx.rewrite.verify import Difference, difference
from repfx.tune import History, calibrate, fit, reconstruct, sensitivity


def transform(
    model: nn.Module | fx.GraphModule | torch.export.ExportedProgram,
    passes: Iterable[str | Pass],
    *,
    example: Any = None,
    target: str = "tensorrt",
) -> fx.GraphModule:
    """A rewritten copy of the model; the model itself is left as it is, and every name that can survive does.

    `passes`: names ("fuse"), specs ("ptq(bits=6)") or configured objects (repfx.passes.Ptq(bits=6)), in any mix; they
    run in the order of their stages, with what they require. `example`: an input or a tuple of inputs, for models whose
    input cannot be guessed. `target`: tensorrt, onnxruntime or openvino, which decides number formats.

    The result is a GraphModule. Where the model's own forward cannot be traced it is a copy in the model's own class
    whose traceable children are GraphModules. `result.meta["repfx"]` is the report: `.merged` and `.declined`.

    Raises InputError for an unknown pass, option or target, a model without convolutions, with NaN or that does not
    accept the example; CheckError where a pass broke its promise.
    """
    return rewrite(model, passes, example, target)[0]  # type: ignore[return-value]


def verify(before: Any, after: Any, x: Any) -> Difference:
    """How far two models are apart on input x (or a tuple of inputs), both in eval mode.

    Raises InputError where one does not accept x, CheckError where the outputs have different shapes.
    """
    args = as_args(x)
    assert args is not None
    return difference(_output(before, args), _output(after, args))


def _output(model: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(model, torch.export.ExportedProgram):
        model = capture(model).model
    return run_eval(model, args)


__all__ = [
    "Artifact",
    "Difference",
    "Finding",
    "History",
    "Inspection",
    "Report",
    "calibrate",
    "fit",
    "inspect",
    "lint",
    "load",
    "lower",
    "reconstruct",
    "save",
    "sensitivity",
    "transform",
    "verify",
]
