"""Checks that a runtime computes what a file says, also on older instruction sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from torch import nn

from repfx.errors import CheckError
from repfx.lowering.onnx import half
from repfx.lowering.onnx.biases import with_integer_biases
from repfx.lowering.onnx.parity import Parity, Run, as_deployed, compare
from repfx.lowering.runtimes.isa import Isa
from repfx.quant import target_named

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def reference(model: nn.Module, target: str, float16: bool = False) -> nn.Module:
    """The torch model with the constants of a file for this target: float16, or integer biases."""
    if float16:
        return half.constants(model)
    return with_integer_biases(model) if target_named(target).between == "all" else model


@dataclass(frozen=True)
class How:
    """How a file is run for a comparison.

    `float16`: the file is in half precision. `isa`: the runtime uses no instruction set newer than
    this. `deployed`: the codes come from an optimized session."""

    float16: bool = False
    isa: Isa | None = None
    deployed: bool = False

    @property
    def run(self) -> Run | None:
        return self.isa.run if self.isa else as_deployed if self.deployed else None


def checked(
    runtime: str,
    model: nn.Module,
    proto: onnx.ModelProto,
    args: tuple[Any, ...],
    how: How = How(),
) -> Parity:
    """Compares a model from `reference` with its file in this runtime.

    Raises CheckError where the runtime does not compute what the model computes. (OpenVINO runs a
    float16 file in float32, so the outputs of its operators are not rounded.)"""
    rounded = None
    if how.float16:
        rounded = half.operators(model) if runtime == "onnxruntime" else model
    found = compare(model, proto, args, runtime, rounded, how.run)
    if not found.agrees:
        where = NAMES[runtime] + ("" if how.isa is None else f" on {how.isa.name}")
        raise CheckError(
            f"{where} does not compute what the model computes: {'; '.join(found.wrong[:3])}"
        )
    return found


def on_each(
    isas: Sequence[Isa],
    runtime: str,
    model: nn.Module,
    proto: onnx.ModelProto,
    args: tuple[Any, ...],
    float16: bool,
) -> Iterator[tuple[Isa, Parity]]:
    """Compares on each instruction set in turn. Raises CheckError at the first that differs."""
    for isa in isas:
        yield isa, checked(runtime, model, proto, args, How(float16, isa))
