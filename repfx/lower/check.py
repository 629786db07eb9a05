"""Whether a runtime computes what a file says, here and on the instruction sets that it can be made to stop at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx
from torch import nn

from repfx.errors import CheckError
from repfx.lower import half
from repfx.lower.isa import Isa
from repfx.lower.parity import Parity, compare

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def checked(
    runtime: str,
    model: nn.Module,
    proto: onnx.ModelProto,
    args: tuple[Any, ...],
    float16: bool = False,
    isa: Isa | None = None,
) -> Parity:
    """The comparison in this runtime. `float16`: of a file in half precision, whose `model` has rounded constants.

    Raises CheckError where the runtime computes something else than the model. (OpenVINO computes a float16 file in
    float32: what its operators give is not rounded.)
    """
    rounded = None
    if float16:
        rounded = half.operators(model) if runtime == "onnxruntime" else model
    found = compare(model, proto, args, runtime, rounded, isa)
    if not found.agrees:
        where = NAMES[runtime] + ("" if isa is None else f" on {isa.name}")
        raise CheckError(f"{where} does not compute what the model computes: {'; '.join(found.wrong[:3])}")
    return found


def on_each(
    isas: Sequence[Isa], runtime: str, model: nn.Module, proto: onnx.ModelProto, args: tuple[Any, ...], float16: bool
) -> Iterator[tuple[Isa, Parity]]:
    """The comparison on each instruction set in turn. Raises CheckError at the first that computes something else."""
    for isa in isas:
        yield isa, checked(runtime, model, proto, args, float16, isa)
