"""Checks an ONNX Q/DQ file, from any tool, against the rules of a runtime."""
