"""Study (b), RepQ: Plain, Merged and the modes of RepQ at 8 and 4 bits, on four kinds of nets.

    python examples/study/strategies.py --data cifar10.zip

Plain     one convolution and batch norm from the start:  train, then transform(net, ["repq"])
Merged    train the branches, merge, then quantize:        transform(net, ["fuse", "repq"])
RepQ      quantize the merged weight of the branches:      transform(net, ["repq"])
"""

from __future__ import annotations

import torch
from common import Accuracy, Results, calibration, command, mini, pictures, plain, trained

import repfx
from repfx.blocks import ACNet, QARepVGG, RepVGG
from repfx.calibration import match_statistics
from repfx.passes import RepQ

NETS = {"plain": plain, "repvgg": RepVGG, "acnet": ACNet, "qarepvgg": QARepVGG}
MODES = ("running", "batch", "estimate", "sampled", "live")
ENDING_IN_A_NORM = ("plain", "qarepvgg")  # the blocks whose norm `live` can keep


def ways(net: str, modes: list[str]) -> dict[str, list[str]]:
    """The strategies for a net, with the modes of each."""
    modes = [m for m in modes if m != "live" or net in ENDING_IN_A_NORM]
    if net == "plain":
        return {"Plain": [m for m in modes if m in ("running", "live")]}
    return {"Merged": ["running"], "RepQ": modes}


def main() -> None:
    parser = command(__doc__, "strategies", seeds=[0])
    parser.add_argument("--epochs", type=int, default=8, help="epochs of float training")
    parser.add_argument("--qat-epochs", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = pictures(args.data)
    accuracy, results = Accuracy(test), Results(args.results)
    batches = calibration(args.data)
    for seed in args.seeds:
        floats = {
            name: trained(
                args.runs,
                name,
                lambda b=block: mini(b),
                "classification",
                train,
                seed,
                epochs=args.epochs,
                lr=0.1,
                batch=128,
            )
            for name, block in NETS.items()
            if name in args.nets
        }
        for name, net in floats.items():
            if not results.has(net=name, seed=seed, bits=32):
                results.add(net=name, seed=seed, bits=32, strategy="float", top1=accuracy(net))
            for bits, strategy, mode in [
                (b, s, m)
                for b in args.bits
                for s, modes in ways(name, args.modes).items()
                for m in modes
            ]:
                if results.has(net=name, seed=seed, bits=bits, strategy=strategy, mode=mode):
                    continue
                passes = [*(["fuse"] if strategy == "Merged" else []), RepQ(bits=bits, bn=mode)]

                def start(
                    n: torch.nn.Module = net, p: list[object] = passes, m: str = mode
                ) -> torch.nn.Module:
                    made = repfx.transform(n, p)
                    return match_statistics(made, batches) if m == "estimate" else made

                quantized = trained(
                    args.runs,
                    f"{name}-{strategy}-{mode}-{bits}",
                    start,
                    "classification",
                    train,
                    seed,
                    epochs=args.qat_epochs,
                    lr=0.01,
                    batch=128,
                )
                top1 = accuracy(repfx.transform(quantized, ["fuse"]))
                results.add(net=name, seed=seed, bits=bits, strategy=strategy, mode=mode, top1=top1)


if __name__ == "__main__":
    main()
