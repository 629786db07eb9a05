"""A model with quantizers as an ONNX file with Q/DQ, checked by running it."""
