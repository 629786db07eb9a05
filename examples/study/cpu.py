"""Study (g): W8A8 in ONNX Runtime and OpenVINO, against their own tools, on a net with gates.

    pip install nncf openvino
    python examples/study/cpu.py --data cifar10.zip

The net has swish, chunks, concatenations and gates. It runs in integers only if the outputs of its
convolutions, and the values computed from them, are quantized too, which gives more places to lose
accuracy than the inputs of layers alone. Calibration uses 1 024 training images without labels. A
tool that is not installed is named and left out."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import REPAPQ, Accuracy, Results, calibration, command, pictures, plain, trained
from onnxruntime.quantization import CalibrationMethod
from peers import in_runtime, nncf, onnxruntime
from torch import Tensor, nn

import repfx
from repfx.lowering.runtimes.layers import kernels

OURS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "repfx max": (["ptq(weights=mse)"], {"method": "max"}),
    "repfx mse": (["ptq(weights=mse)"], {"method": "mse"}),
    "repfx mse, bias": (["ptq(weights=mse)"], {"method": "mse", "bias": True}),
    "repfx repapq": (["ptq(weights=mse)", "qprep"], {}),
}
THEIRS: dict[str, dict[str, Any]] = {
    "onnxruntime": {
        "onnxruntime minmax": partial(onnxruntime, CalibrationMethod.MinMax),
        "onnxruntime entropy": partial(onnxruntime, CalibrationMethod.Entropy),
    },
    "openvino": {"nncf": nncf},
}


class Act(nn.Module):
    """A convolution, its batch norm and a swish.

    (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)"""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.act = plain(inputs, outputs, kernel, stride, kernel // 2), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Joined(nn.Module):
    """Residual steps on half of the channels, a concatenation and a gate.

    (N, c, H, W) -> (N, c, H, W)"""

    def __init__(self, width: int, steps: int = 2) -> None:
        super().__init__()
        half = width // 2
        self.first, self.last = Act(width, width, 1), Act(width + steps * half, width, 1)
        self.steps = nn.ModuleList(
            nn.Sequential(Act(half, half), Act(half, half)) for _ in range(steps)
        )
        self.down, self.up = nn.Conv2d(width, half, 1), nn.Conv2d(half, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        y = self.last(torch.cat(parts, 1))
        return y * torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))


def joined() -> nn.Module:
    body = [Act(3, 16), Joined(16), Act(16, 32, 3, 2), Joined(32), Act(32, 64, 3, 2), Joined(64)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*body, *head).to(memory_format=torch.channels_last)


def ours(
    net: nn.Module, method: str, runtime: str, batches: list[Tensor], iterations: int, folder: Path
) -> Path:
    passes, options = OURS[method]
    model: Any = repfx.transform(net, passes, target=runtime)
    if "qprep" in passes:
        repfx.reconstruct(model, batches, iterations=iterations, **REPAPQ)
        model = repfx.transform(model, ["fuse"], target=runtime)
    else:
        repfx.calibrate(model, batches, **options)
    return repfx.lower(model, folder / "ours.onnx", example=batches[0][:8], target=runtime).onnx


def main() -> None:
    parser = command(__doc__, "cpu", seeds=[0, 1])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = pictures(args.data)
    accuracy, batches, results = Accuracy(test), calibration(args.data), Results(args.results)
    for seed in args.seeds:
        net = trained(
            args.runs / "cpu",
            "joined",
            joined,
            "classification",
            train,
            seed,
            epochs=args.epochs,
            lr=0.1,
            batch=128,
        )
        if not results.has(seed=seed, method="float"):
            results.add(seed=seed, method="float", top1=accuracy(net))
        merged = repfx.transform(net, ["fuse"])
        for runtime, method in [(r, m) for r, theirs in THEIRS.items() for m in (*OURS, *theirs)]:
            same = {"seed": seed, "runtime": runtime, "method": method}
            if results.has(**same):
                continue
            with tempfile.TemporaryDirectory() as folder:
                if method in OURS:
                    path = ours(net, method, runtime, batches, args.iterations, Path(folder))
                    found = kernels(runtime, path)
                    same |= {"integers": found.integers, "layers": found.layers}
                    run = in_runtime(path, runtime)
                else:
                    try:
                        run = THEIRS[runtime][method](merged, batches, Path(folder))
                    except ImportError as error:
                        print(f"{method} is left out: {error}")
                        continue
                results.add(**same, top1=accuracy(run))


if __name__ == "__main__":
    main()
