"""The runner: traces the model, orders the passes, runs them and checks their promises."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from repfx.capture.exported import from_exported
from repfx.capture.model import Captured, capture, graphs, is_read_inside
from repfx.capture.running import as_args, run_eval
from repfx.errors import CheckError, Declined, InputError
from repfx.graph.inputs import note_inputs
from repfx.quant import FakeQuant, Target, target_named
from repfx.rewrite.contract import Pass, Promise, Stage, resolve
from repfx.rewrite.judge import Judge, disturbed
from repfx.rewrite.results import Report, Result
from repfx.rewrite.work import Part, Work
from repfx.tolerances import KEPT, KEPT_WIDE, MERGED

_IDLE = "it does not run on the example, so it is merged only", "pass an example that runs it"


def rewrite(
    model: Any, passes: Iterable[str | Pass], example: Any, target: str
) -> tuple[nn.Module, Report]:
    """Runs passes on a private copy of the model and returns it with the report.

    Raises InputError for bad input and CheckError for a broken promise.
    """
    with torch.inference_mode(False):  # the result is to be trained, wherever it was made
        return _rewritten(model, passes, example, target)


def _rewritten(
    model: Any, passes: Iterable[str | Pass], example: Any, target: str
) -> tuple[nn.Module, Report]:
    ordered = resolve(passes)
    formats = target_named(target)
    args = as_args(example, model)
    captured, report, why = _attempt(model, args, ordered, formats)
    if why:
        # A module that could not be traced uses children that were rewritten. Leave those
        # children as they are, too.
        captured, report, _ = _attempt(model, args, ordered, formats, enter_opaque=False)
        undone = f"what merged inside modules that cannot be traced is undone: {why}"
        report.untraced.append(Declined("the model", undone))
    if not report.merged and not any(r.inserted for r in report.results):
        require_convolutions(captured)
    captured.separate()
    # A child of the model may be called "meta".
    if not isinstance(getattr(captured.model, "meta", None), nn.Module):
        captured.model.meta = {**getattr(captured.model, "meta", {}), "repfx": report}  # type: ignore[assignment]
        if captured.given:
            note_inputs(captured.model, captured.example or ())
    return captured.model, report


def _attempt(
    model: Any,
    args: tuple[Any, ...] | None,
    passes: list[Pass],
    formats: Target,
    enter_opaque: bool = True,
) -> tuple[Captured, Report, str]:
    """The rewritten copy, the report, and how its output changed if it must not have."""
    captured = capture(model, args, enter_opaque, all(p.stage >= Stage.MERGE for p in passes))
    kinds = [p.dtype for p in captured.model.parameters() if p.is_floating_point()]
    kind = str(next(iter(kinds), torch.float32)).removeprefix("torch.")
    limit = max([KEPT, *(MERGED.get(k, 0.0) for k in kinds)])
    judge = Judge(
        limit,
        kind,
        lambda: _in_float64(model, captured, passes, formats, kind),
        lambda: disturbed(_module(model), captured.example or ()),
    )
    report = _rewrite(captured, passes, formats, judge)
    why = _whole(captured, passes, judge)
    if report.merged:
        error = max(m.error for m in report.merged)
        report.compared.append(
            "each merge with its region, on random inputs in float64: relative difference at most "
            f"{error:.1e}"
        )
    report.compared += judge.compared
    if captured.declined and captured.example is None:
        report.compared.append("the output of the model was not compared: there is no example")
    return captured, report, why


def _in_float64(
    model: Any, captured: Captured, passes: list[Pass], formats: Target, kind: str
) -> tuple[Judge, str] | None:
    """The same passes on the model in float64, and how its output changed.

    None if it does not run in float64, or if other parts of it can be traced there."""
    try:
        args = tree_map(_widened, captured.example)
        twin = copy.deepcopy(_module(model)).double()
        wide = capture(twin, args, captured.enter_opaque, captured.deploy, captured.known)
    except Exception:  # the model's forward can raise anything
        return None
    if [path for path, _ in graphs(wide.model)] != [path for path, _ in graphs(captured.model)]:
        return None
    judge = Judge(KEPT_WIDE, f"float64, as rounding changes it in {kind}")
    try:
        _rewrite(wide, passes, formats, judge)
        return judge, _whole(wide, passes, judge)
    except CheckError as error:
        return judge, str(error)
    except Exception:  # a pass that expects another dtype
        return None


def _module(model: Any) -> nn.Module:
    return from_exported(model) if isinstance(model, torch.export.ExportedProgram) else model


def _widened(v: Any) -> Any:
    return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v


def _rewrite(captured: Captured, passes: list[Pass], formats: Target, judge: Judge) -> Report:
    report = Report(untraced=captured.declined, facts=captured.facts)
    for path, module in list(graphs(captured.model)):
        for p in passes:
            if module in captured.idle and p.stage is not Stage.MERGE:
                report.results.append(Result(p.name, declined=(Declined(path, *_IDLE),)))
                continue
            promised = _Promised(p, captured, module, judge)
            inner = is_read_inside(captured.model, path)
            part = _part(captured.model, path)
            result = promised.run(Work(module, formats, promised.reached, inner, part))
            report.results.append(_prefixed(result, path))
    return report


def _part(model: nn.Module, path: str) -> Part:
    if not path:
        return ""
    return "of a graph" if isinstance(model, fx.GraphModule) else "of code"


class _Promised:
    """One run of a pass on one graph, and the check of its promises.

    A pass that only calls `merge` and `fold` of its Work has proved everything it did. A pass that
    asked for the graph may have done anything, so the model's output on the example is compared."""

    def __init__(self, p: Pass, captured: Captured, module: fx.GraphModule, judge: Judge) -> None:
        self.title = f"pass {p.name!r}"
        self.kept, self.p = p.promises, p
        self.captured, self.module, self.judge = captured, module, judge
        self.keys = set(module.state_dict())
        self.before: Any = None  # the output before the pass, if it must stay the same

    def run(self, work: Work) -> Result:
        """Runs the pass. Raises CheckError, naming the pass, if it breaks a promise."""
        try:
            result: object = self.p.run(work)
        except CheckError as error:
            raise CheckError(f"{self.title}: {error}") from error
        if not isinstance(result, Result):
            raise CheckError(f"{self.title} must return a Result, not {result!r}")
        self.module.graph.lint()
        self.module.recompile()
        self._check_names()
        self._check_regions()
        return result

    def reached(self) -> None:
        """Called when the pass asks for the module, which it may then write into."""
        self.captured.separate()
        if Promise.REGIONS in self.kept:
            self.module.recompile()  # the pass may have merged before it asked
            self.before = self._output()

    def _output(self) -> Any:
        """The model's output on the example; None if the model cannot be run."""
        if self.captured.example is None:
            return None
        try:
            return run_eval(self.captured.model, self.captured.example)
        except Exception:  # the model's forward can raise anything
            return None

    def _check_names(self) -> None:
        lost = sorted(self.keys - set(self.module.state_dict()))
        if Promise.NAMES in self.kept and lost:
            raise CheckError(
                f"{self.title} promised that {Promise.NAMES.value}, but lost {', '.join(lost[:3])}"
            )

    def _check_regions(self) -> None:
        if self.before is None:
            return
        after = self._output()
        why = "the model no longer runs"
        if after is not None:
            why = self.judge.changed(self.title, self.before, after)
        if why:
            raise CheckError(f"{self.title} promised that {Promise.REGIONS.value}, but {why}")


def _whole(captured: Captured, passes: list[Pass], judge: Judge) -> str:
    """How the output of a partly traced model changed, or why it no longer runs; empty if not.

    If all passes promise to keep the output, it must be the same as before."""
    if not captured.declined or captured.example is None:
        return ""
    try:
        after = run_eval(captured.model, captured.example)
    except Exception as error:  # the model's forward can raise anything
        return f"the model no longer runs: {error}"
    if not all(Promise.REGIONS in p.promises for p in passes):
        return ""
    return judge.changed("all passes", captured.expected, after)


def require_convolutions(captured: Captured) -> None:
    """Raises InputError if nothing in the model can be merged or quantized."""
    if any(isinstance(m, FakeQuant) for m in captured.model.modules()):
        return
    if any(t.dim() >= 2 for t in [*captured.model.parameters(), *captured.model.buffers()]):
        return
    raise InputError(
        "the model has no convolution and no linear layer: there is nothing to merge or quantize"
    )


def _prefixed(result: Result, path: str) -> Result:
    """The result of a nested graph, with its names prefixed by the graph's path."""
    if not path:
        return result

    def full(name: str) -> str:
        return f"{path}.{name}"

    return Result(
        result.name,
        tuple(
            replace(m, name=full(m.name), ops=tuple(map(full, m.ops)), into=full(m.into))
            for m in result.merged
        ),
        tuple(replace(d, where=full(d.where)) for d in result.declined),
        tuple(map(full, result.inserted)),
    )
