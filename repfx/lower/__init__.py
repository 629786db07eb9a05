"""Lowering: a model with quantizers becomes an ONNX file with Q/DQ, checked by running it, and what runtimes make of it."""

from repfx.lower.lint import Finding, lint
from repfx.lower.onnx import Artifact, lower
from repfx.lower.parity import CodeDifference, Parity

__all__ = ["Artifact", "CodeDifference", "Finding", "Parity", "lint", "lower"]
