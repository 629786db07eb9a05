"""Study (b), RepQ: each strategy at its own best learning rate, at 4 and 8 bits, on five nets.

    python examples/study/strategies.py --data cifar10.zip

Plain     one convolution and batch norm from the start:  train, then transform(net, ["repq"])
Merged    train the branches, merge, then quantize:        transform(net, ["fuse", "repq"])
RepQ      quantize the merged weight of the branches:      transform(net, ["repq"])

A strategy's rate is the best of `--rates` at 4 bits with the first seed; the other seeds and 8 bits
use it. Learned steps have a rate of their own, which `fit` derives from it. `bnest` is the RepVGG
net whose float training, too, has estimated statistics and one convolution a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Accuracy, Results, calibration, command, images_last, mini, pictures, plain
from common import trained as fitted
from torch import Tensor, nn

import repfx
from repfx.blocks import OREPA, ACNet, QARepVGG, RepVGG
from repfx.calibration import match_statistics
from repfx.passes import RepQ

MODES = ("running", "batch", "estimate", "estimate_paper", "sampled", "live")
ENDING_IN_A_NORM = ("plain", "qarepvgg", "orepa")  # the blocks whose norm `live` can keep
RATES = (0.1, 0.03, 0.01, 0.003)


class Residual(nn.Module):
    """A residual block of ACNet convolutions: (N, inputs, H, W) -> (N, outputs, H / s, W / s)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = ACNet(inputs, outputs, 3, stride, 1)
        self.two = ACNet(outputs, outputs, 3, 1, 1)
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else plain(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.short(x) + self.two(torch.relu(self.one(x))))


def ac_resnet() -> nn.Module:
    stages = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 64, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return images_last(nn.Sequential(ACNet(3, 16, 3, 1, 1), nn.ReLU(), *stages, *head))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: mini(plain),
    "repvgg": lambda: mini(RepVGG),
    "qarepvgg": lambda: mini(QARepVGG),
    "orepa": lambda: mini(OREPA),
    "ac-resnet": ac_resnet,
    "bnest": lambda: mini(RepVGG),
}


def ways(net: str, modes: list[str]) -> list[tuple[str, str]]:
    """The strategies for a net, each with its mode."""
    if net == "plain":
        return [("Plain", "running")]
    if net == "bnest":
        return [("RepQ", "estimate")]
    kept = [m for m in modes if m != "live" or net in ENDING_IN_A_NORM]
    return [("Merged", "running"), *(("RepQ", mode) for mode in kept)]


class Study:
    """The float nets, and the ways of quantizing them, each trained once."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.train, test = pictures(args.data)
        self.accuracy, self.results = Accuracy(test), Results(args.results)
        self.batches = calibration(args.data)

    def trained(self, name: str, make: Any, seed: int, epochs: int, lr: float) -> nn.Module:
        same: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch": 128}
        return fitted(self.args.runs, name, make, "classification", self.train, seed, **same)

    def plain(self, name: str, seed: int) -> nn.Module:
        def make() -> nn.Module:
            if name != "bnest":
                return NETS[name]()
            return repfx.transform(NETS[name](), [RepQ(bits=32, bn="estimate")])

        net = self.trained(name, make, seed, self.args.epochs, 0.1)
        if name == "bnest":  # the same parameters, in a net without the pass
            state, net = net.state_dict(), NETS[name]()
            net.load_state_dict({k: state[k] for k in net.state_dict()})
            match_statistics(net.eval(), self.batches)
        if not self.results.has(net=name, seed=seed, bits=32):
            key = {"net": name, "seed": seed, "bits": 32, "strategy": "float"}
            self.results.add(**key, top1=self.accuracy(net))
        return net

    def quantized(self, start: nn.Module, lr: float, **of: Any) -> float:
        """The accuracy of one way at one rate, in percent; 10 where training had to stop."""
        found = [r for r in self.results.rows if {**of, "lr": lr}.items() <= r.items()]
        if found:
            return float(found[0]["top1"])
        name, seed, bits, strategy, mode = of.values()

        def make() -> nn.Module:
            passes = [*(["fuse"] if strategy == "Merged" else []), RepQ(bits=bits, bn=mode)]
            made = repfx.transform(start, passes)
            return match_statistics(made, self.batches) if mode.startswith("estimate") else made

        run = f"{name}-{strategy}-{mode}-{bits}-{lr:g}"
        row: dict[str, Any] = {**of, "lr": lr}
        try:
            result = self.trained(run, make, seed, self.args.qat_epochs, lr)
            row["top1"] = self.accuracy(repfx.transform(result, ["fuse"]))
        except repfx.CheckError as error:
            row |= {"top1": 10.0, "stopped": str(error)[:120]}
        self.results.add(**row)
        return float(row["top1"])


def main() -> None:
    parser = command(__doc__, "strategies", seeds=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8, help="epochs of float training")
    parser.add_argument("--qat-epochs", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    study, first = Study(args), args.seeds[0]
    for name in args.nets:
        floats = {seed: study.plain(name, seed) for seed in args.seeds}
        for strategy, mode in ways(name, args.modes):
            of = {"net": name, "seed": first, "bits": 4, "strategy": strategy, "mode": mode}
            tried = {lr: study.quantized(floats[first], lr, **of) for lr in args.rates}
            best = max(tried, key=lambda lr: tried[lr])
            for bits, seed in [(b, s) for b in args.bits for s in args.seeds]:
                study.quantized(floats[seed], best, **{**of, "bits": bits, "seed": seed})


if __name__ == "__main__":
    main()
