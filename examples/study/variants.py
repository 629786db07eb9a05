"""Study (a), QARepVGG: S0, Eq6, S1..S4 trained alike, then quantized after training.

python examples/study/variants.py --data cifar10.zip --seeds 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import Accuracy, Results, calibration, mini, pictures, trained

import repfx
from repfx.blocks import QARepVGG
from repfx.passes import Ptq

L2 = {"S0": "custom", "Eq6": "eq6"}  # the others decay plainly
ORDER = (("S0", "S4", "S2"), ("S1", "Eq6", "S3"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("out/study"), help="checkpoints")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "variants.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = pictures(args.data)
    accuracy, batches, results = Accuracy(test), calibration(args.data), Results(args.results)
    for seed, variant in [(s, v) for some in ORDER for s in args.seeds for v in some]:
        if results.has(variant=variant, seed=seed, bits=4, per_channel=False):
            continue
        net = trained(
            args.runs, variant, lambda v=variant: mini(QARepVGG, variant=v), "classification", train, seed,
            epochs=args.epochs, lr=0.1, batch=128, l2=L2.get(variant, "plain"),
        )  # fmt: skip
        results.add(variant=variant, seed=seed, bits=32, top1=accuracy(net))
        for bits in (8, 6, 5, 4):
            for per_channel in (True, False):
                quantized = repfx.transform(net, [Ptq(bits=bits, per_channel=per_channel)])
                repfx.calibrate(quantized, batches, method="max")
                top1 = accuracy(quantized)
                results.add(variant=variant, seed=seed, bits=bits, per_channel=per_channel, top1=top1)


if __name__ == "__main__":
    main()
