"""Builds TensorRT engines from ONNX Q/DQ files and runs them."""
