"""What a lint rule is: a function from an Index to hits, and for which runtimes it is how bad.

The first line of the function's docstring is the rule's public description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from onnx import NodeProto

from repfx.lowering.onnx.index import Index

TENSORRT, ONNXRUNTIME, OPENVINO = RUNTIMES = ("tensorrt", "onnxruntime", "openvino")
# By runtime: E the build fails or the numbers are wrong, W slow or inaccurate, I worth knowing.
# Runtimes that are not named have no such rule.
Severity = Mapping[str, str]


def everywhere(letter: str) -> Severity:
    """The same for every runtime."""
    return dict.fromkeys(RUNTIMES, letter)


# What TensorRT refuses and the others run, but in float: `repfx.lowering.runtimes.layers` says so
# of such files.
SLOW_ELSEWHERE: Severity = {TENSORRT: "E", ONNXRUNTIME: "W", OPENVINO: "W"}


class Hit(NamedTuple):
    """A place that breaks a rule. `severity` and `cure`: where they are not the rule's own."""

    node: NodeProto | str
    message: str
    severity: Severity | None = None
    cure: str = ""


class Rule(NamedTuple):
    """A rule as it is registered."""

    severity: Severity
    description: str
    cure: str
    find: Callable[[Index], Iterator[Hit]]


REGISTRY: dict[str, Rule] = {}


def rule(
    name: str, severity: Severity, cure: str
) -> Callable[[Callable[[Index], Iterator[Hit]]], Callable[[Index], Iterator[Hit]]]:
    """Registers a rule under its id."""

    def enter(find: Callable[[Index], Iterator[Hit]]) -> Callable[[Index], Iterator[Hit]]:
        REGISTRY[name] = Rule(severity, (find.__doc__ or "").strip().splitlines()[0], cure, find)
        return find

    return enter
