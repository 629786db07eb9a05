"""Study (e), RepAPQ: every method of post-training quantization on the same nets and images.

    python examples/study/variants.py --data cifar10.zip   trains S0 and S4 (or this script does)
    python examples/study/ptq.py --data cifar10.zip

Weights are quantized per channel, with the scale of least squared error. Calibration uses 1 024
training images without labels."""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from typing import Any

import torch
from common import Accuracy, Results, calibration, command, mini, pictures, plain, trained
from torch import Tensor, nn

import repfx
from repfx.blocks import MobileOne, QARepVGG
from repfx.passes import Ptq

BITS = ((6, 6), (8, 4), (8, 8))  # of activations and of weights
RANGES = ("max", "percentile", "entropy", "mse", "mae")
LEARNED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "block mse, adaround, drop": (
        [],
        {"loss": "mse", "rounding": "adaround", "drop": 0.5, "stage": 0.0},
    ),
    "block mse": ([], {"loss": "mse", "stage": 0.0}),
    "block mae": ([], {"loss": "mae", "stage": 0.0}),
    "block mae, qprep": (["qprep"], {"loss": "mae", "stage": 0.0}),
    "repapq": (["qprep"], {"loss": "mae", "stage": 1.0}),
    "block mse, qprep": (["qprep"], {"loss": "mse", "stage": 0.0}),
}


class Residual(nn.Module):
    """The basic block of a ResNet: (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = plain(inputs, outputs, 3, stride, 1), plain(outputs, outputs, 3, 1, 1)
        self.short = (
            plain(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.short(x) + self.two(torch.relu(self.one(x))))


def resnet() -> nn.Module:
    stages = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 64, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(plain(3, 16, 3, 1, 1), nn.ReLU(), *stages, *head).to(
        memory_format=torch.channels_last
    )


NETS = {
    "S0": (partial(mini, QARepVGG, variant="S0"), "custom"),
    "S4": (partial(mini, QARepVGG, variant="S4"), "plain"),
    "resnet": (resnet, "plain"),
    "mobileone": (partial(mini, MobileOne, branches=2), "plain"),
}


def main() -> None:
    parser = command(__doc__, "ptq", seeds=[0, 1, 2])
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=200)
    every = (*RANGES, *LEARNED)
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    parser.add_argument("--batch", type=int, default=64, help="images in a step of learning")
    parser.add_argument("--pictures", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = pictures(args.data)
    accuracy, batches, results = (
        Accuracy(test),
        calibration(args.data, args.pictures),
        Results(args.results),
    )
    for (bits, weight_bits), seed, name in product(BITS, args.seeds, args.nets):
        make, l2 = NETS[name]
        net = trained(
            args.runs / "mini",
            name,
            make,
            "classification",
            train,
            seed,
            epochs=args.epochs,
            lr=0.1,
            batch=128,
            l2=l2,
        )
        if not results.has(net=name, seed=seed, method="float"):
            results.add(net=name, seed=seed, method="float", top1=accuracy(net))
        same = {"net": name, "seed": seed, "bits": bits, "weight_bits": weight_bits}
        for method in args.methods:
            if results.has(**same, method=method):
                continue
            start = time.perf_counter()
            passes, options = LEARNED.get(method, ([], {}))
            quantized = repfx.transform(net, [Ptq(bits, weight_bits, weights="mse"), *passes])
            if method in LEARNED:
                repfx.reconstruct(
                    quantized,
                    batches,
                    iterations=args.iterations,
                    seed=seed,
                    batch=args.batch,
                    **options,
                )
                quantized = repfx.transform(quantized, ["fuse"])
            else:
                repfx.calibrate(quantized, batches, method=method)
            seconds = time.perf_counter() - start
            row = {"top1": accuracy(quantized), "seconds": round(seconds, 1)}
            results.add(**same, method=method, **row)


if __name__ == "__main__":
    main()
