"""What TensorRT for RTX makes of our INT8 files and of those of ONNX Runtime and ModelOpt.

    python examples/rtx_peers.py [models] [--modelopt PYTHON] [--out rtx_peers.jsonl]

Each net has random weights. Each tool quantizes it by its default recipe for TensorRT; a peer gets
it merged by repfx, and as it is trained. ModelOpt leaves the last layer of an ONNX file in float,
so there is a column of ours that does, too. ONNX Runtime's quantizer is told to write what TensorRT
takes: symmetric int8, weights per channel, biases in float. ModelOpt quantizes the ONNX file, and
the PyTorch model before its export; PYTHON is the interpreter of an environment that has it:

    python -m venv modelopt && modelopt/bin/pip install torch==2.13.0 timm 'nvidia-modelopt[onnx]'
    modelopt/bin/pip install --no-deps -e .

A cell has the kernels of the engine, the layers in INT8, the megabytes of activations that all
kernels read and write for one image, and the SQNR in dB of the file against the float model on new
images, in ONNX Runtime without its optimizer. No engine is run: these are plans. Rows go to a file
of JSON lines, and a run resumes where the last one stopped."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from bench_runtimes import theirs
from onnxruntime.quantization import QuantType
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from zoo import timm
from zoo_int8 import MODELS, settle

import repfx
from repfx.lowering.runtimes.run import session
from repfx.lowering.tensorrt import rtx
from repfx.lowering.tensorrt.engine import build
from repfx.passes import Ptq
from repfx.quant import quantizers_of
from repfx.rewrite.difference import difference

FOR_TENSORRT = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
FORMS = {"merged": ["fuse"], "as trained": []}
MODELOPT = Path(__file__).parent / "rtx_modelopt.py"


def by_modelopt(python: str, form: str, source: Path, images: Path, goal: Path) -> Path:
    """Runs ModelOpt in its own environment."""
    command = [python, str(MODELOPT), form, str(source), str(images), str(goal)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["ModelOpt says nothing"])[-1])
    return goal


def ours(net: nn.Module, x: torch.Tensor, folder: Path, last: bool) -> Path:
    """Our file; without `last` its last layer is in float."""
    int8 = repfx.transform(net, ["ptq"], example=x)
    if not last:
        path = [*quantizers_of(int8, of_weight=True)][-1].removesuffix(".weight_quant")
        int8 = repfx.transform(net, [Ptq(wide=path, wide_bits=32)], example=x)
    name = "ours.onnx" if last else "ours_head.onnx"
    return repfx.lower(repfx.calibrate(int8, [x]), folder / name, example=x).onnx


def files(net: nn.Module, x: torch.Tensor, folder: Path, modelopt: str | None) -> Iterator[Any]:
    """(who, form, a function that writes their INT8 file) of every tool."""
    yield "ours", "merged", partial(ours, net, x, folder, True)
    yield "ours", "last layer in float", partial(ours, net, x, folder, False)
    images = folder / "images.npy"
    np.save(images, x.numpy())
    for form, passes in FORMS.items():
        model = repfx.transform(net, passes, example=x)
        stem = form.replace(" ", "_")
        plain = repfx.lower(model, folder / f"{stem}.onnx", example=x).onnx
        saved = folder / f"{stem}.pt"
        repfx.save(model, saved)
        goal, kind = folder / f"{stem}_ort.onnx", QuantType.QInt8
        options: dict[str, Any] = {"activation_type": kind, "extra_options": FOR_TENSORRT}
        yield "ONNX Runtime", form, partial(theirs, plain, goal, x, **options)
        if modelopt is None:
            continue
        for way, source in (("onnx", plain), ("torch", saved)):
            goal = folder / f"{stem}_{way}.onnx"
            job = partial(by_modelopt, modelopt, way, source, images, goal)
            yield f"ModelOpt, {way}", form, job


def rows(name: str, modelopt: str | None) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    net, x = timm.create_model(name).eval(), torch.randn(4, 3, 96, 96)
    settle(net, x)
    images = torch.randn_like(x)
    with torch.no_grad():
        truth = net(images)
    with tempfile.TemporaryDirectory() as folder:
        for who, form, make in files(net, x, Path(folder), modelopt):
            new = {"model": name, "who": who, "form": form}
            try:
                file = make()
                (found,) = session("onnxruntime", file, optimize=False)([images])
                engine = build(file, file.with_suffix(".engine"), compute_capability=["8.6"])
            except (repfx.RepfxError, ValueError) as error:
                yield {**new, "refused": str(error)[-300:]}
                continue
            yield {
                **new,
                "kernels": len(json.loads(engine.metadata.read_text())["kernels"]),
                "int8": engine.layers.get("INT8", 0),
                "bytes": engine.traffic,
                "sqnr": difference(truth, found).sqnr,
                "version": engine.version,
            }


def cell(found: list[dict[str, Any]]) -> str:
    if not found or any("refused" in r for r in found):
        return "refused" if found else ""
    kernels, layers, size = (sum(r[key] for r in found) for key in ("kernels", "int8", "bytes"))
    return f"{kernels}, {layers}, {size / 1e6:.1f}, {fmean(r['sqnr'] for r in found):.1f}"


def table(found: list[dict[str, Any]], models: list[str]) -> Table:
    shown = Table(title="kernels, INT8 layers, MB an image, dB")
    who = list(dict.fromkeys((r["who"], r["form"]) for r in found))
    shown.add_column("model")
    for tool, form in who:
        shown.add_column(f"{tool}, {form}", justify="right")
    built = [m for m in models if not any("refused" in r for r in found if r["model"] == m)]
    for title, of in [
        *((name, [name]) for name in models),
        (f"sum of {len(built)}, mean dB", built),
    ]:
        mine = [r for r in found if r["model"] in of]
        shown.add_row(title, *(cell([r for r in mine if (r["who"], r["form"]) == w]) for w in who))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--modelopt", metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=Path("rtx_peers.jsonl"))
    args = parser.parse_args()
    if rtx.module() is None:
        sys.exit(f"{rtx.NAME} is not installed: make trt")
    args.out.touch()
    found = [json.loads(line) for line in args.out.read_text().splitlines()]
    done = {r["model"] for r in found}
    for name in track([m for m in args.models if m not in done], "building"):
        new = list(rows(name, args.modelopt))
        found += new
        with args.out.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in new)
    console = Console(width=160)
    console.print(table(found, list(args.models)))
    for r in found:
        if "refused" in r:
            console.print(f"{r['model']}, {r['who']}, {r['form']}: {r['refused']}")


if __name__ == "__main__":
    main()
