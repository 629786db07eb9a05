"""Lowering: a model with quantizers becomes an ONNX file with Q/DQ, an engine, and numbers of a
run.
"""

from repfx.lowering.lint.findings import Finding
from repfx.lowering.onnx.lower import Artifact, lower
from repfx.lowering.onnx.parity import CodeDifference, Parity

__all__ = ["Artifact", "CodeDifference", "Finding", "Parity", "lower"]
