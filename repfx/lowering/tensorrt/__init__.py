"""ONNX Q/DQ as an engine of TensorRT."""
