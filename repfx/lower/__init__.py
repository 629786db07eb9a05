"""Lowering: a model with quantizers becomes an ONNX file with Q/DQ, checked by running it."""

from repfx.lower.onnx import Artifact, lower
from repfx.lower.parity import CodeDifference, Parity

__all__ = ["Artifact", "CodeDifference", "Parity", "lower"]
