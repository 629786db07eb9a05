"""Kinds of model files that repfx does not start from, told by their content, and what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path

_FROM = "start from the PyTorch model: package.module:factory, with --weights for its weights"


def stranger(path: Path) -> str:
    """What a file is and what to do, in words; empty for a file that repfx may know."""
    if path.is_dir():
        return _folder(path)
    with path.open("rb") as file:
        head = file.read(4096)
    if head[8:9] == b"{":  # safetensors, whatever its name
        return ""
    if zipfile.is_zipfile(path):
        return _archive(path)
    ending = path.suffix.lower()
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return f"holds HDF5, as Keras writes it; {_FROM}"
    if head[4:8] == b"TFL3":
        return f"is a TensorFlow Lite model; {_FROM}"
    if ending in (".engine", ".plan", ".trt") or head[:4] == b"ftrt":
        return f"is an engine of TensorRT, which cannot be changed any more; {_FROM}"
    if ending == ".onnx" or _is_onnx(head):
        return (
            f"is an ONNX file; {_FROM}. `repfx lint` tells what keeps a runtime from running an "
            "ONNX file in INT8"
        )
    if ending == ".xml" and b"<net" in head:
        return f"is a model of OpenVINO; {_FROM}"
    if ending == ".pb":
        return f"is a TensorFlow graph; {_FROM}"
    return ""


def _folder(path: Path) -> str:
    inside = {p.name for p in path.iterdir()}
    if "saved_model.pb" in inside:
        return f"is a SavedModel of TensorFlow; {_FROM}"
    if "config.json" in inside and any(n.endswith((".safetensors", ".bin")) for n in inside):
        return (
            "is a folder of transformers; use package.module:factory with a factory that calls "
            f"from_pretrained({str(path)!r})"
        )
    return "is a folder, not a model"


def _archive(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    tops = {n.split("/", 1)[-1] for n in names}
    if "constants.pkl" in tops and any("/code/" in n for n in names):
        return (
            "is a TorchScript program, which has no modules to rewrite; start from the module it "
            "was made of: package.module:factory, with --weights for its state_dict"
        )
    if "metadata.json" in tops and "model.weights.h5" in tops:
        return f"is a Keras model; {_FROM}"
    return ""


def _is_onnx(head: bytes) -> bool:
    """Whether a file begins as a ModelProto: field 1, a small version, then field 2, 7 or 8."""
    return len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 32 and head[2] in (0x12, 0x3A, 0x42)
