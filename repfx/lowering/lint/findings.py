"""lint: checks an ONNX Q/DQ file, from any tool, against what a runtime accepts and runs fast."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import NodeProto, external_data_helper

from repfx.errors import InputError, unknown
from repfx.lowering.lint import numbers, places  # noqa: F401, importing them registers the rules
from repfx.lowering.lint.rulebook import REGISTRY, RUNTIMES, Hit, Rule, Severity
from repfx.lowering.onnx.external import elsewhere, require
from repfx.lowering.onnx.index import Index, called

RULES: dict[str, tuple[Severity, str]] = {
    name: (r.severity, r.description) for name, r in sorted(REGISTRY.items())
}
_ORDER = "EWI"


def explain(name: str) -> str:
    """A rule in full: what it checks, how severe it is, the cure, and what a real builder does.

    Raises InputError for an unknown rule."""
    if name not in REGISTRY:
        raise unknown("rule", name, sorted(REGISTRY))
    rule = REGISTRY[name]
    severity = ", ".join(f"{rule.severity.get(r, '-')} for {r}" for r in RUNTIMES)
    return (
        f"{name}: {rule.description}\nseverity: {severity}\nhint: {rule.cure}\n"
        f"TensorRT for RTX 1.7.1 {rule.seen}"
    )


@dataclass(frozen=True)
class Finding:
    """One place that breaks one rule.

    `rule`: its id, such as Q08. `severity`: E where the build fails or the numbers are wrong, W
    where it is slow or inaccurate, I where it is worth knowing. `node`: the name of a node, tensor
    or graph. `message`: what is wrong. `cure`: what to do about it."""

    rule: str
    severity: str
    node: str
    message: str
    cure: str

    def __str__(self) -> str:
        return f"{self.severity} {self.rule} {self.node}: {self.message} ({self.cure})"


def lint(path: str | os.PathLike[str] | onnx.ModelProto, target: str = "tensorrt") -> list[Finding]:
    """Checks the main graph against every rule for the runtime. The worst findings come first.

    `target`: tensorrt, rtx (TensorRT for RTX), onnxruntime or openvino. RULES says what each rule
    checks and how severe a finding is for each runtime.

    Raises InputError where the target is unknown, and where the file is missing, is not an ONNX
    model, is malformed, or the files that hold its weights are not beside it."""
    if target not in RUNTIMES:
        raise unknown("target", target, RUNTIMES)
    model = path if isinstance(path, onnx.ModelProto) else _read(Path(path))
    where = "the model" if isinstance(path, onnx.ModelProto) else str(path)
    if not model.graph.node and not model.graph.output:
        raise InputError(f"{where} is not an ONNX model: it has no graph")
    apart = {location for _, location in elsewhere(model)}
    if apart:
        raise InputError(
            f"{where} lacks its weights, which are in {', '.join(sorted(apart))}: load "
            "them first, or pass the path of the file"
        )
    try:
        index = Index(_inlined(model))
    except Exception as error:
        raise InputError(f"{where} is malformed: {error}") from error
    found = {
        Finding(name, severity, _name(hit.node), hit.message, hit.cure or rule.cure): None
        for name, rule in REGISTRY.items()
        if target in rule.severity
        for hit in _hits(name, rule, index, where)
        if (severity := (hit.severity or rule.severity).get(target))
    }
    return sorted(found, key=lambda f: (_ORDER.index(f.severity), f.rule))


def _hits(name: str, rule: Rule, index: Index, where: str) -> list[Hit]:
    """What one rule finds. A rule that fails on a malformed file blames the file, not itself."""
    try:
        return list(rule.find(index))
    except Exception as error:
        raise InputError(
            f"{where} is malformed; {name} ({rule.description}) cannot be checked: {error}"
        ) from error


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise InputError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise InputError(f"{path} is not an ONNX file: {error}") from error
    require(model, path)
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise InputError(f"{path}: the external data cannot be read: {error}") from error
    return model


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its local functions inlined, so that rules see their nodes, where possible."""
    if not model.functions:
        return model
    try:
        from onnx.inliner import inline_local_functions

        return inline_local_functions(model)
    except Exception:
        return model


def _name(node: NodeProto | str) -> str:
    return node if isinstance(node, str) else called(node)
