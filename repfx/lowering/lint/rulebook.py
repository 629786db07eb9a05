"""What a lint rule is: a function from an Index to hits, with a severity for each runtime.

The first line of the function's docstring is the rule's public description, so it must be complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from onnx import NodeProto

from repfx.lowering.onnx.index import Index

TENSORRT, ONNXRUNTIME, OPENVINO, RTX = RUNTIMES = ("tensorrt", "onnxruntime", "openvino", "rtx")
# Runtime -> letter. E: the build fails or the numbers are wrong. W: slow or inaccurate. I: worth
# knowing. The rule does not apply to a runtime that is not named.
Severity = Mapping[str, str]


def everywhere(letter: str) -> Severity:
    """The same severity for every runtime."""
    return dict.fromkeys(RUNTIMES, letter)


# TensorRT refuses it, as its documents say. The other runtimes run it, but in float, which
# `repfx.lowering.runtimes.layers` and the kernels of an engine of TensorRT for RTX show.
SLOW_ELSEWHERE: Severity = {TENSORRT: "E", ONNXRUNTIME: "W", OPENVINO: "W", RTX: "W"}
REFUSED: Severity = {TENSORRT: "E", RTX: "E"}


class Hit(NamedTuple):
    """A place that breaks a rule. `severity` and `cure` are set only if the rule's do not fit."""

    node: NodeProto | str
    message: str
    severity: Severity | None = None
    cure: str = ""


class Rule(NamedTuple):
    """A registered rule. `seen`: what TensorRT for RTX 1.7.1 does with a file that breaks it."""

    severity: Severity
    description: str
    cure: str
    find: Callable[[Index], Iterator[Hit]]
    seen: str


REGISTRY: dict[str, Rule] = {}


NO_EFFECT = "builds it; every layer runs in INT8 all the same"


def rule(
    name: str, severity: Severity, cure: str, seen: str = NO_EFFECT
) -> Callable[[Callable[[Index], Iterator[Hit]]], Callable[[Index], Iterator[Hit]]]:
    """Registers a rule under its id. `seen` says what TensorRT for RTX does (tests/test_rtx.py)."""

    def enter(find: Callable[[Index], Iterator[Hit]]) -> Callable[[Index], Iterator[Hit]]:
        REGISTRY[name] = Rule(
            severity, (find.__doc__ or "").strip().splitlines()[0], cure, find, seen
        )
        return find

    return enter
