"""Speed of our INT8 files against those of ONNX Runtime's quantizer and, if installed, of NNCF.

    python examples/bench_runtimes.py

All come from one merged float net with random weights and run in ONNX Runtime and OpenVINO. Each
round runs them in random order. Ratios are medians and quartiles over the rounds. Layers in
integers are counted in the graph that the runtime makes from our file."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.swa_utils import update_bn
from zoo import timm

import repfx
from repfx.lowering.runtimes.layers import kernels
from repfx.lowering.runtimes.run import installed, session
from repfx.lowering.runtimes.timing import interleaved
from repfx.testing import randomise

MODELS = (
    *(
        "repvgg_a0",
        "mobileone_s0",
        "resnet18",
        "mobilenetv2_100",
        "efficientnet_b0",
        "repvit_m0_9",
        "convnext_atto",
    ),
    *("densenet121", "cspresnet50", "ese_vovnet19b_dw"),
)


class Once(CalibrationDataReader):
    """One batch in the form that ONNX Runtime's calibration reads."""

    def __init__(self, name: str, x: Tensor) -> None:
        self.batches = iter([{name: x.numpy()}])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def theirs(plain: Path, goal: Path, x: Tensor, **options: Any) -> Path:
    """Runs ONNX Runtime's preparation and quantize_static: uint8 activations, int8 per channel.

    `options` are more arguments of quantize_static, or others."""
    import onnx

    quant_pre_process(str(plain), str(goal.with_suffix(".pre.onnx")), skip_symbolic_shape=True)
    name = onnx.load(plain).graph.input[0].name
    quantize_static(
        str(goal.with_suffix(".pre.onnx")),
        str(goal),
        Once(name, x),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        **{"activation_type": QuantType.QUInt8, **options},
    )
    return goal


def by_nncf(plain: Path, goal: Path, x: Tensor) -> Path | None:
    """Quantizes the same file with NNCF into OpenVINO IR; None where NNCF is not installed."""
    try:
        import nncf
    except ImportError:
        return None
    import openvino

    quantized = nncf.quantize(
        openvino.Core().read_model(str(plain)), nncf.Dataset([x.numpy()]), subset_size=1
    )
    openvino.save_model(quantized, str(goal), compress_to_fp16=False)
    return goal


def _ratios(ours: list[float], others: list[float]) -> str:
    """The median of the rounds' ratios, and their quartiles."""
    low, middle, high = statistics.quantiles(
        (a / b for a, b in zip(ours, others, strict=True)), n=4
    )
    return f"{middle:.3f} ({low:.2f}..{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    table = Table(title=f"{args.batch} images of {args.size}, {args.rounds} rounds; median ratios")
    for column in (
        "model",
        "runtime",
        "float ms",
        "INT8 ms",
        "float / INT8",
        "ours / ONNX Runtime's",
        "ours / NNCF's",
        "layers in integers",
        "file size / float",
    ):
        table.add_column(column, justify="right")
    for name in args.models:
        torch.manual_seed(0)
        # Random scales and shifts, but statistics measured on the input, so that activations keep
        # their size through the whole net and biases matter, as in a trained one. (With random
        # statistics activations grow until ONNX Runtime rounds every bias to zero, and OpenVINO
        # then drops those biases.)
        model, x = (
            randomise(timm.create_model(name).eval()),
            torch.randn(args.batch, 3, args.size, args.size),
        )
        update_bn([x], model)
        merged = repfx.transform(model, ["fuse"], example=x)
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            plain = repfx.lower(merged, folder / "float.onnx", example=x).onnx
            other = theirs(plain, folder / "theirs.onnx", x)
            for runtime in installed():
                int8 = repfx.transform(model, ["ptq"], example=x, target=runtime)
                repfx.calibrate(int8, [x])
                ours = repfx.lower(int8, folder / f"{runtime}.onnx", example=x, target=runtime).onnx
                files = {"float": plain, "ours": ours, "theirs": other}
                third = by_nncf(plain, folder / "nncf.xml", x) if runtime == "openvino" else None
                files |= {} if third is None else {"nncf": third}
                runs = {
                    k: partial(session(runtime, f, threads=args.threads), (x,))
                    for k, f in files.items()
                }
                times = interleaved(runs, args.rounds)
                t = {k: statistics.median(v) for k, v in times.items()}
                against = {
                    k: _ratios(times["ours"], times[k]) for k in ("theirs", "nncf") if k in times
                }
                run = kernels(runtime, ours)
                size = ours.stat().st_size / plain.stat().st_size
                row = (
                    f"{t['float']:.1f}",
                    f"{t['ours']:.1f}",
                    f"{t['float'] / t['ours']:.2f}",
                    against["theirs"],
                    against.get("nncf", ""),
                    f"{run.integers} of {run.layers}",
                    f"{size:.3f}",
                )
                table.add_row(name, runtime, *row)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
