"""Lowering: a quantized model becomes an ONNX Q/DQ file or an engine, which is run and checked."""

from repfx.lowering.lint.findings import Finding
from repfx.lowering.onnx.lower import Artifact, lower
from repfx.lowering.onnx.parity import CodeDifference, Parity

__all__ = ["Artifact", "CodeDifference", "Finding", "Parity", "lower"]
