"""ONNX Runtime's own quantizer on the nets of study (e), W8A8, run in ONNX Runtime beside ours.

python examples/study/peers.py --data cifar10.zip
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from common import Accuracy, Results, calibration, pictures, trained
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from ptq import NETS
from torch import Tensor

import repfx
from repfx.lower.runtimes import session
from repfx.passes import Ptq

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


class Reader(CalibrationDataReader):
    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self.feeds = iter([{name: x.numpy()} for x in batches])

    def get_next(self) -> dict[str, object] | None:
        return next(self.feeds, None)


class Deployed(torch.nn.Module):
    """A file in ONNX Runtime, as a model."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__()
        self.run: Callable[..., list[Tensor]] = session("onnxruntime", path, threads=threads)

    def forward(self, x: Tensor) -> Tensor:
        return self.run((x,))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("out/study"), help="checkpoints")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "peers.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nets", nargs="+", default=["S0", "S4"])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = pictures(args.data)
    accuracy, batches, results = Accuracy(test), calibration(args.data), Results(args.results)
    for seed, name in [(s, n) for s in args.seeds for n in args.nets]:
        make, l2 = NETS[name]
        net = trained(
            args.runs, name, make, "classification", train, seed, epochs=args.epochs, lr=0.1, batch=128, l2=l2
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as text:
            folder, x = Path(text), batches[0]
            plain = repfx.lower(repfx.transform(net, ["fuse"]), folder / "float.onnx", example=x).onnx
            source = onnx.load(plain).graph.input[0].name
            for method, kind in METHODS.items():
                if results.has(net=name, seed=seed, method=f"onnxruntime {method}"):
                    continue
                quantize_static(
                    str(plain), str(folder / "theirs.onnx"), Reader(source, batches), quant_format=QuantFormat.QDQ,
                    per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=kind,
                )  # fmt: skip
                top1 = accuracy(Deployed(folder / "theirs.onnx", args.threads))
                results.add(net=name, seed=seed, method=f"onnxruntime {method}", top1=top1)
            if not results.has(net=name, seed=seed, method="repapq"):
                ours = repfx.transform(net, [Ptq(weights="mse"), "qprep"], target="onnxruntime")
                repfx.reconstruct(ours, batches, iterations=args.iterations, seed=seed)
                ours = repfx.transform(ours, ["fuse"], target="onnxruntime")
                file = repfx.lower(ours, folder / "ours.onnx", example=x, target="onnxruntime").onnx
                results.add(net=name, seed=seed, method="repapq", top1=accuracy(Deployed(file, args.threads)))


if __name__ == "__main__":
    main()
