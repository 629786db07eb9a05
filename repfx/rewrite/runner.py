"""The runner: capture, order the passes, run each on each graph, and check what it promised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from repfx.capture.copying import own_tensors
from repfx.capture.model import Captured, capture, graphs
from repfx.capture.running import run_eval
from repfx.errors import CheckError, Declined, InputError
from repfx.quant import FakeQuant, Target, target_named
from repfx.rewrite.contract import Merged, Pass, Promise, Result, resolve
from repfx.rewrite.difference import difference
from repfx.rewrite.work import Work


@dataclass
class Report:
    """What the passes did. `results` has one entry a pass and graph; `untraced` lists what stayed
    as written.
    """

    results: list[Result] = field(default_factory=list)
    untraced: list[Declined] = field(default_factory=list)

    @property
    def merged(self) -> list[Merged]:
        return [m for r in self.results for m in r.merged]

    @property
    def declined(self) -> list[Declined]:
        return [*self.untraced, *(d for r in self.results for d in r.declined)]


def rewrite(
    model: Any, passes: Iterable[str | Pass], example: Any, target: str
) -> tuple[nn.Module, Report]:
    """Runs passes on a private copy of the model. Raises InputError for bad input, CheckError for a
    broken promise.
    """
    ordered = resolve(passes)
    formats = target_named(target)
    args = as_args(example)
    captured = capture(model, args)
    report = _rewrite(captured, ordered, formats)
    if captured.declined and not _still_runs(captured, ordered):
        # A module that stays as written reads into children that were rewritten: then they must
        # stay too.
        captured = capture(model, args, enter_opaque=False)
        report = _rewrite(captured, ordered, formats)
    if not report.merged and not any(r.inserted for r in report.results):
        require_convolutions(captured)
    own_tensors(captured.model, model)
    if not isinstance(
        getattr(captured.model, "meta", None), nn.Module
    ):  # unless a child of the model has that name
        captured.model.meta = {**getattr(captured.model, "meta", {}), "repfx": report}  # type: ignore[assignment]
    return captured.model, report


def _rewrite(captured: Captured, passes: list[Pass], formats: Target) -> Report:
    report = Report(untraced=captured.declined)
    for path, module in list(graphs(captured.model)):
        for p in passes:
            result = _run(p, Work(module, formats))
            report.results.append(_prefixed(result, path))
    return report


def _still_runs(captured: Captured, passes: list[Pass]) -> bool:
    """Whether a partly traced model runs on the example, and to the same output where the passes
    keep it.
    """
    if captured.example is None:
        return True
    try:
        off = difference(captured.expected, run_eval(captured.model, captured.example))
    except Exception:  # whatever its own forward raises
        return False
    return off.relative <= 1e-3 or not all(Promise.REGIONS in p.promises for p in passes)


def as_args(example: Any) -> tuple[Any, ...] | None:
    return example if example is None or isinstance(example, tuple) else (example,)


def require_convolutions(captured: Captured) -> None:
    """Raises InputError where nothing in the model can be merged or quantized."""
    if captured.declined or any(isinstance(m, FakeQuant) for m in captured.model.modules()):
        return
    if any(t.dim() >= 2 for t in [*captured.model.parameters(), *captured.model.buffers()]):
        return
    raise InputError(
        "the model holds no convolution and no linear layer: there is nothing to merge or quantize"
    )


def _run(p: Pass, work: Work) -> Result:
    module = work.module
    keys = set(module.state_dict())
    result: object = p.run(work)
    if not isinstance(result, Result):
        raise CheckError(f"pass {p.name!r} gave {result!r} and not a Result of what it did")
    module.graph.lint()
    module.recompile()
    if Promise.NAMES in p.promises and not keys <= set(module.state_dict()):
        lost = sorted(keys - set(module.state_dict()))
        raise CheckError(
            f"pass {p.name!r} promised that {Promise.NAMES.value}, and lost {', '.join(lost[:3])}"
        )
    return result


def _prefixed(result: Result, path: str) -> Result:
    """The result with the names of a nested graph made those of the whole model."""
    if not path:
        return result

    def full(name: str) -> str:
        return f"{path}.{name}"

    merged = tuple(
        Merged(full(m.name), tuple(map(full, m.ops)), full(m.into), *list(vars(m).values())[3:])
        for m in result.merged
    )
    declined = tuple(Declined(full(d.where), d.reason, d.cure) for d in result.declined)
    return Result(result.name, merged, declined, tuple(map(full, result.inserted)))
