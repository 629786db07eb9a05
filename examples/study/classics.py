"""Bias correction and cross-layer equalization, the classic methods, on the nets of study (e).

    python examples/study/classics.py --data cifar10.zip

equalized    W1 / s, b1 / s, W2 s for two layers with a ReLU between them; s = sqrt(r1 / r2),
             with r the largest weight of a channel
corrected    repfx.calibrate(bias=True)
"""

from __future__ import annotations

import torch
from common import Accuracy, Results, calibration, command, pictures, trained
from ptq import BITS, NETS
from torch import fx, nn

import repfx
from repfx.passes import Ptq


def equalized(merged: fx.GraphModule) -> fx.GraphModule:
    """Equalizes, in place, every pair of layers with only a ReLU between them."""
    layers = dict(merged.named_modules())
    for node in merged.graph.nodes:
        first = layers.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(first, nn.Conv2d) or len(node.users) != 1:
            continue
        between = next(iter(node.users))
        readers = list(between.users)
        relu = isinstance(layers.get(str(between.target)), nn.ReLU) or between.target in (
            torch.relu,
            torch.nn.functional.relu,
        )
        second = layers.get(str(readers[0].target)) if len(readers) == 1 else None
        if (
            not relu
            or not isinstance(second, nn.Conv2d)
            or second.groups != 1
            or first.bias is None
        ):
            continue
        with torch.no_grad():
            r1, r2 = (
                first.weight.abs().flatten(1).amax(1),
                second.weight.abs().transpose(0, 1).flatten(1).amax(1),
            )
            s = (r1 / r2).sqrt().clamp(1e-3, 1e3)
            first.weight /= s.reshape(-1, 1, 1, 1)
            first.bias /= s
            second.weight *= s.reshape(1, -1, 1, 1)
    return merged


def main() -> None:
    parser = command(__doc__, "classics", seeds=[0])
    parser.add_argument("--nets", nargs="+", default=["S0", "S4"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = pictures(args.data)
    accuracy, batches, results = Accuracy(test), calibration(args.data), Results(args.results)
    for (bits, weight_bits), seed, name in [
        (b, s, n) for b in BITS for s in args.seeds for n in args.nets
    ]:
        make, l2 = NETS[name]
        net = trained(
            args.runs / "mini",
            name,
            make,
            "classification",
            train,
            seed,
            epochs=8,
            lr=0.1,
            batch=128,
            l2=l2,
        )
        for method in ("mse", "equalized", "corrected", "both"):
            key = {
                "net": name,
                "seed": seed,
                "bits": bits,
                "weight_bits": weight_bits,
                "method": method,
            }
            if results.has(**key):
                continue
            merged = repfx.transform(net, ["fuse"])
            if method in ("equalized", "both"):
                equalized(merged)
            model = repfx.transform(merged, [Ptq(bits, weight_bits, weights="mse")])
            repfx.calibrate(model, batches, method="mse", bias=method in ("corrected", "both"))
            results.add(**key, top1=accuracy(model))


if __name__ == "__main__":
    main()
