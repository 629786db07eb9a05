"""INT8 files of twelve nets: lint, codes, layers in integers and size, in two runtimes.

    python examples/zoo_int8.py [models] [--float16]

Random weights, 96 x 96. A code "differs" where torch and the runtime round a value to different
codes, with equal codes at every quantizer before it. Layers in integers are counted in the graphs
that ONNX Runtime and OpenVINO make from their files."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from zoo import timm

import repfx
from repfx.lowering.onnx.index import Index
from repfx.lowering.runtimes.layers import kernels

MODELS = (
    *(
        "resnet18",
        "repvgg_a0",
        "repvgg_b1g4",
        "mobileone_s0",
        "mobilenetv2_100",
        "repghostnet_100",
        "fastvit_t8",
    ),
    *("efficientnet_b0", "regnetx_002", "densenet121", "convnext_atto", "repvit_m0_9"),
)


def float_layers(path: Path) -> int:
    """The number of convolutions and linear layers without Q/DQ on both input and weight."""
    index = Index(onnx.load(path))
    return sum(
        index.dq(layer.x) is None or not layer.weight or index.dq(layer.weight) is None
        for layer in index.layers
    )


def settle(model: torch.nn.Module, x: torch.Tensor) -> None:
    """Sets batch norms to the statistics of this batch; else activations overflow float16."""
    for m in model.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.momentum = None
    with torch.no_grad():
        model.train()(x)
    model.eval()


def row(name: str, folder: Path, float16: bool) -> list[str]:
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 96, 96)
    if float16:
        settle(model, x)
    merged = repfx.transform(model, ["fuse"], example=x)
    size = (
        repfx.lower(merged, folder / "float.onnx", example=x, float16=float16).onnx.stat().st_size
    )
    cells, layers, bad, left = [], [], {"E": 0, "W": 0}, 0
    for target in ("tensorrt", "onnxruntime", "openvino"):
        int8 = repfx.calibrate(repfx.transform(model, ["ptq"], example=x, target=target), [x])
        for opset in (20, 21) if target == "tensorrt" else (20,):
            file = repfx.lower(
                int8, folder / "int8.onnx", example=x, target=target, opset=opset, float16=float16
            )
            parity = file.parity
            if target == "tensorrt":
                for finding in repfx.lint(file.onnx):
                    bad[finding.severity] = bad.get(finding.severity, 0) + 1
                left = max(left, float_layers(file.onnx))
                ratio = file.onnx.stat().st_size / size
        if file.there is not None:
            parity = file.there
        if target != "tensorrt":
            run = kernels(target, file.onnx)
            layers.append(f"{run.integers} of {run.layers}")
        cells.append(f"{parity.different:,} of {parity.codes:,}")
    return [name, *cells, f"{bad['E']}, {bad['W']}", str(left), *layers, f"{ratio:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument(
        "--float16",
        action="store_true",
        help="files in half precision; OpenVINO runs them in float32",
    )
    args = parser.parse_args()
    table = Table(
        "model", "tensorrt", "onnxruntime", "openvino", "lint E, W", "layers without Q/DQ"
    )
    for column in ("in integers, ONNX Runtime", "in integers, OpenVINO", "size"):
        table.add_column(column)
    for name in track(args.models, "lowering"):
        with tempfile.TemporaryDirectory() as folder:
            table.add_row(*row(name, Path(folder), args.float16))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
