"""Which layers of a file a runtime runs in integers on this machine, read from its own graph.

A layer is a convolution or a matrix product with a constant weight. Q and DQ around it do not
decide: ONNX Runtime runs DQ -> Conv -> Sigmoid in float, however well the file is quantized."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

from repfx.errors import unknown
from repfx.lowering.runtimes.run import openvino_module
from repfx.lowering.runtimes.sessions import openvino_core

_WHOLE = {
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
}
_FLOAT = {
    "Conv",
    "FusedConv",
    "NhwcFusedConv",
    "ConvTranspose",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
}
_OPENVINO = {"Convolution", "FullyConnected", "Deconvolution"}


@dataclass(frozen=True)
class Kernels:
    """How a runtime runs a file. `integers`: layers in integers. `floats`: the others' names.

    >>> print(Kernels(20, ("head",)))
    20 of 21 layers run in integers, head in float
    """

    integers: int
    floats: tuple[str, ...]

    @property
    def layers(self) -> int:
        return self.integers + len(self.floats)

    def __str__(self) -> str:
        few = ", ".join(self.floats[:3]) + (", ..." if len(self.floats) > 3 else "")
        left = f", {few} in float" if self.floats else ""
        return f"{self.integers} of {self.layers} layers run in integers{left}"


def kernels(runtime: str, path: str | os.PathLike[str]) -> Kernels:
    """Which layers of an ONNX file the runtime runs in integers.

    Raises InputError for an unknown runtime, MissingPart where it is not installed."""
    if runtime not in _OF:
        raise unknown("runtime", runtime, _OF)
    return _OF[runtime](Path(path))


def _in_onnxruntime(path: Path) -> Kernels:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdqisint8allowed", "1")  # as in `sessions`
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    constant = {t.name for t in graph.initializer}
    for node in graph.node:  # in topological order, as ONNX requires
        if all(name in constant for name in node.input):
            constant.update(node.output)
    integers, floats = 0, []
    for node in graph.node:
        if node.op_type in _WHOLE and any(name in constant for name in node.input[1:]):
            integers += 1
        elif node.op_type in _FLOAT and node.input[1] in constant:
            floats.append(node.name or node.output[0])
    return Kernels(integers, tuple(floats))


def _in_openvino(path: Path) -> Kernels:
    openvino_module()  # raises where it is not installed
    core = openvino_core()
    compiled = core.compile_model(
        core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    integers, floats = 0, []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {
            key: str(op.get_rt_info()[key].value)
            for key in ("layerType", "runtimePrecision")
            if key in op.get_rt_info()
        }
        if info.get("layerType") in _OPENVINO:
            if info["runtimePrecision"] in ("u8", "i8"):
                integers += 1
            else:
                floats.append(op.get_friendly_name())
    return Kernels(integers, tuple(floats))


_OF: dict[str, Callable[[Path], Kernels]] = {
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
}
