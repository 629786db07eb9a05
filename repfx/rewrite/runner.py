"""The runner: traces the model, orders the passes, runs them and checks their promises."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx, nn

from repfx.capture.model import Captured, capture, graphs
from repfx.capture.running import in_order, run_eval
from repfx.errors import CheckError, InputError
from repfx.quant import FakeQuant, Target, target_named
from repfx.rewrite.contract import Pass, Promise, resolve
from repfx.rewrite.difference import difference, differences
from repfx.rewrite.results import Report, Result
from repfx.rewrite.work import Work
from repfx.tolerances import KEPT, MERGED


def rewrite(
    model: Any, passes: Iterable[str | Pass], example: Any, target: str
) -> tuple[nn.Module, Report]:
    """Runs passes on a private copy of the model and returns it with the report.

    Raises InputError for bad input and CheckError for a broken promise.
    """
    ordered = resolve(passes)
    formats = target_named(target)
    args = as_args(example, model)
    captured = capture(model, args)
    report = _rewrite(captured, ordered, formats)
    if captured.declined and not _still_runs(captured, ordered):
        # A module that could not be traced uses children that were rewritten. Leave those
        # children as they are, too.
        captured = capture(model, args, enter_opaque=False)
        report = _rewrite(captured, ordered, formats)
    if not report.merged and not any(r.inserted for r in report.results):
        require_convolutions(captured)
    captured.separate()
    # A child of the model may be called "meta".
    if not isinstance(getattr(captured.model, "meta", None), nn.Module):
        captured.model.meta = {**getattr(captured.model, "meta", {}), "repfx": report}  # type: ignore[assignment]
    return captured.model, report


def _rewrite(captured: Captured, passes: list[Pass], formats: Target) -> Report:
    report = Report(untraced=captured.declined, facts=captured.facts)
    for path, module in list(graphs(captured.model)):
        for p in passes:
            promised = _Promised(p, captured, module)
            result = promised.run(Work(module, formats, promised.reached))
            report.results.append(_prefixed(result, path))
    return report


class _Promised:
    """One run of a pass on one graph, and the check of its promises.

    A pass that only calls `merge` and `fold` of its Work has proved everything it did. A pass that
    asked for the graph may have done anything, so the model's output on the example is compared."""

    def __init__(self, p: Pass, captured: Captured, module: fx.GraphModule) -> None:
        self.title = f"pass {p.name!r}"
        self.kept, self.p = p.promises, p
        self.captured, self.module = captured, module
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
        limit = _limit(self.captured.model)
        why = "the model no longer runs"
        if after is not None:
            why = _apart(self.before, after, limit)
        if why:
            raise CheckError(f"{self.title} promised that {Promise.REGIONS.value}, but {why}")


def _apart(before: Any, after: Any, limit: float) -> str:
    """How two outputs of a model differ by more than rounding; empty if they do not.

    Integers are not compared: an argmax, for example, may change when rounding breaks a tie.
    """
    try:
        found = differences(before, after)
    except CheckError as error:
        return str(error)
    off = [d for d in found if not d.integers and not d.relative <= limit]
    return f"the output on the example changed: {off[0]}" if off else ""


def _limit(model: nn.Module) -> float:
    """How far rounding may change the output of a model of this precision."""
    return max([KEPT, *(MERGED.get(p.dtype, 0.0) for p in model.parameters())])


def _still_runs(captured: Captured, passes: list[Pass]) -> bool:
    """Whether a partly traced model still runs on the example.

    If all passes promise to keep the output, it must also be the same as before."""
    if captured.example is None:
        return True
    try:
        off = difference(captured.expected, run_eval(captured.model, captured.example))
    except Exception:  # the model's forward can raise anything
        return False
    return off.relative <= _limit(captured.model) or not all(
        Promise.REGIONS in p.promises for p in passes
    )


def as_args(example: Any, model: Any = None) -> tuple[Any, ...] | None:
    """The arguments of a call, in the order of the model's forward.

    A dict whose keys are names of arguments stands for these; any other dict is one argument."""
    if example is None or isinstance(example, tuple):
        return example
    if isinstance(example, dict) and isinstance(model, nn.Module):
        given = in_order(model, (), example) if example else None
        if given is not None:
            return given
    return (example,)


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
