"""Writes a model with quantizers as an ONNX Q/DQ file and checks it by running it."""
