"""Study (a), QARepVGG: S0, Eq6, S1..S4 trained the same way, then quantized after training.

python examples/study/variants.py --data cifar10.zip
python examples/study/variants.py --data cifar10.zip --size large --epochs 10 --variants S4 S2 S0
"""

from __future__ import annotations

from typing import Any

import torch
from common import Accuracy, Results, calibration, command, mini, pictures, trained

import repfx
from repfx.blocks import QARepVGG
from repfx.passes import Ptq

L2 = {"S0": "custom", "Eq6": "eq6"}  # the others use plain weight decay
SIZES: dict[str, dict[str, Any]] = {
    "mini": {},
    "large": {"widths": (32, 64, 128), "depths": (4, 3, 3)},
}


def main() -> None:
    parser = command(__doc__, "variants", seeds=[0, 1, 2])
    parser.add_argument(
        "--size", choices=list(SIZES), default="mini", help="133 000 or 600 000 parameters"
    )
    parser.add_argument("--variants", nargs="+", default=["S0", "S4", "S2", "S1", "Eq6", "S3"])
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = pictures(args.data)
    accuracy, batches, results = Accuracy(test), calibration(args.data), Results(args.results)
    for seed, variant in [(s, v) for s in args.seeds for v in args.variants]:
        net_of = {"size": args.size, "variant": variant, "seed": seed}
        if results.has(**net_of, bits=4, per_channel=False):
            continue
        net = trained(
            args.runs / args.size,
            variant,
            lambda v=variant: mini(QARepVGG, variant=v, **SIZES[args.size]),
            "classification",
            train,
            seed,
            epochs=args.epochs,
            lr=0.1,
            batch=128,
            l2=L2.get(variant, "plain"),
        )
        results.add(**net_of, bits=32, top1=accuracy(net))
        for bits in (8, 6, 5, 4):
            for per_channel in (True, False):
                quantized = repfx.transform(net, [Ptq(bits=bits, per_channel=per_channel)])
                repfx.calibrate(quantized, batches, method="max")
                top1 = accuracy(quantized)
                results.add(**net_of, bits=bits, per_channel=per_channel, top1=top1)


if __name__ == "__main__":
    main()
