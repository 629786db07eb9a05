"""Study (a), QARepVGG: S0, Eq6, S1..S4 trained alike, then quantized after training.

python examples/study/variants.py --data cifar10.zip
python examples/study/variants.py --data cifar10.zip --size large --epochs 10 --variants S4 S2 S0
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import Accuracy, Results, calibration, mini, pictures, trained

import repfx
from repfx.blocks import QARepVGG
from repfx.passes import Ptq

L2 = {"S0": "custom", "Eq6": "eq6"}  # the others decay plainly
SIZES: dict[str, dict[str, Any]] = {"mini": {}, "large": {"widths": (32, 64, 128), "depths": (4, 3, 3)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("out/study"), help="checkpoints")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "variants.jsonl")
    parser.add_argument("--size", choices=list(SIZES), default="mini", help="133 000 or 600 000 parameters")
    parser.add_argument("--variants", nargs="+", default=["S0", "S4", "S2", "S1", "Eq6", "S3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = pictures(args.data)
    accuracy, batches, results = Accuracy(test), calibration(args.data), Results(args.results)
    for seed, variant in [(s, v) for s in args.seeds for v in args.variants]:
        net_of = {"size": args.size, "variant": variant, "seed": seed}
        if results.has(**net_of, bits=4, per_channel=False):
            continue
        net = trained(
            args.runs / args.size, variant, lambda v=variant: mini(QARepVGG, variant=v, **SIZES[args.size]),
            "classification", train, seed,
            epochs=args.epochs, lr=0.1, batch=128, l2=L2.get(variant, "plain"),
        )  # fmt: skip
        results.add(**net_of, bits=32, top1=accuracy(net))
        for bits in (8, 6, 5, 4):
            for per_channel in (True, False):
                quantized = repfx.transform(net, [Ptq(bits=bits, per_channel=per_channel)])
                repfx.calibrate(quantized, batches, method="max")
                top1 = accuracy(quantized)
                results.add(**net_of, bits=bits, per_channel=per_channel, top1=top1)


if __name__ == "__main__":
    main()
