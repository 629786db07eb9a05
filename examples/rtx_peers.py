"""What TensorRT for RTX makes of our INT8 files and of those of ONNX Runtime's quantizer.

    python examples/rtx_peers.py [models]

Both quantize one merged net with random weights; the third file is ONNX Runtime's from the net as
it is trained. Its quantizer is told to write what TensorRT takes: symmetric int8, weights per
channel, biases in float. The table has the kernels of each engine, how many of them compute values
one by one, the layers in INT8, and the bytes of activations that all kernels read and write for one
image. No engine is run: these are plans."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from bench_runtimes import theirs
from onnxruntime.quantization import QuantType
from rich.console import Console
from rich.progress import track
from rich.table import Table
from zoo import timm
from zoo_int8 import MODELS, settle

import repfx
from repfx.lowering.tensorrt.engine import Engine, build

FOR_TENSORRT = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}


def cell(engine: Engine) -> str:
    kernels = len(json.loads(engine.metadata.read_text())["kernels"])
    layers = engine.layers.get("INT8", 0)
    return f"{kernels}, {engine.pointwise}, {layers}, {(engine.traffic or 0) / 1e6:.1f}"


def row(name: str, folder: Path) -> list[str]:
    torch.manual_seed(0)
    net, x = timm.create_model(name).eval(), torch.randn(4, 3, 96, 96)
    settle(net, x)
    merged = repfx.transform(net, ["fuse"], example=x)
    int8 = repfx.calibrate(repfx.transform(net, ["ptq"], example=x), [x])
    files = [repfx.lower(int8, folder / "ours.onnx", example=x).onnx]
    for form, model in (("merged", merged), ("trained", repfx.transform(net, [], example=x))):
        plain = repfx.lower(model, folder / f"{form}.onnx", example=x).onnx
        goal, kind = folder / f"{form}_int8.onnx", QuantType.QInt8
        files.append(theirs(plain, goal, x, activation_type=kind, extra_options=FOR_TENSORRT))
    cells = [name]
    for file in files:
        try:
            engine = build(file, file.with_suffix(".engine"), compute_capability=["8.6"])
            cells.append(cell(engine))
        except repfx.RepfxError as error:
            cells.append(f"{type(error).__name__}: {str(error)[-80:]}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    table = Table(title="kernels, pointwise ones, INT8 layers, MB an image")
    table.add_column("model")
    for who in ("ours", "ONNX Runtime's, merged", "ONNX Runtime's, as trained"):
        table.add_column(who, justify="right")
    for name in track(parser.parse_args().models, "building"):
        with tempfile.TemporaryDirectory() as folder:
            table.add_row(*row(name, Path(folder)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
