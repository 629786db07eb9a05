"""The cost of a training step on the merged weight: python examples/bench_repq.py

Each row is a net of one kind of block. Times are medians of interleaved steps in one run, relative
to plain LSQ quantization-aware training of the merged net. `live` keeps the norm at the end of a
block alive, and measures the others as `running` does; one convolution and its norm, the last row,
are ordinary quantization-aware training then. The time of float training on
the merged weight is relative to the multi-branch net. `--compile` compiles every net."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import repfx
from repfx.blocks import ACNet, QARepVGG, RepVGG
from repfx.blocks.frame import ConvNorm, Frame
from repfx.passes import RepQ
from repfx.quant import quantizers_of

MODES = ("frozen", "live", "estimate", "sampled", "running", "batch")


def alone(inputs: int, outputs: int, kernel: int, padding: int) -> nn.Module:
    """One convolution and its norm."""
    return ConvNorm(Frame.of(inputs, outputs, kernel, 1, padding))


def net(block: Callable[..., nn.Module], width: int, depth: int) -> nn.Module:
    layers = [nn.Sequential(block(width, width, 3, padding=1), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def stepper(model: nn.Module, x: Tensor, y: Tensor, compiled: bool = False):
    if quantizers_of(model):
        repfx.calibrate(model, [x])
    optimiser = torch.optim.SGD(model.train().parameters(), 0.01)

    run = torch.compile(model) if compiled else model

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(run(x), y).backward()
        optimiser.step()

    return step


def compare(steps: dict[str, object], rounds: int) -> dict[str, float]:
    """The median seconds of each step; each runs once in every round, in random order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps.items()), random.Random(0)
    for i in range(rounds + 2):
        draw.shuffle(order)
        for name, step in order:
            start = time.perf_counter()
            step()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def forms(block: Callable[..., nn.Module], width: int, x: Tensor) -> dict[str, nn.Module]:
    """The nets to compare.

    The net of branches, plain QAT of the merged net, float training on the merged weight, and the
    modes of repq."""
    torch.manual_seed(0)
    model = net(block, width, 4).eval()
    merged = repfx.transform(model, ["fuse"], example=x)
    found: dict[str, nn.Module] = {"multi": repfx.transform(model, [], example=x)}
    found["plain"] = repfx.transform(merged, ["repq"], example=x)
    found["float"] = repfx.transform(model, [RepQ(bits=32, bn="estimate")], example=x)
    return found | {mode: repfx.transform(model, [RepQ(bn=mode)], example=x) for mode in MODES}


def peak(
    block: Callable[..., nn.Module], width: int, shape: tuple[int, ...], form: str, out: object
) -> None:
    """Puts the growth of this process's peak memory over three steps, in MB."""
    x, y = torch.randn(shape), torch.arange(shape[0]) % 10
    step = stepper(forms(block, width, x[:2, :, :8, :8])[form], x, y)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    out.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="compile the nets first")
    parser.add_argument(
        "--memory", action="store_true", help="measure peak memory of a step instead of time"
    )
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # all nets share one forward
    shape = (args.batch, args.width, args.size, args.size)
    x, y = torch.randn(shape), torch.arange(args.batch) % 10
    what = "peak memory of a step" if args.memory else "time of a step"
    table = Table(
        title=f"{what}, width {args.width}, {args.batch} x {args.size} x {args.size}; ratios"
    )
    for column in (
        "block",
        "multi-branch",
        "plain QAT",
        *(f"repq {m}" for m in MODES),
        "float estimate / multi-branch",
    ):
        table.add_column(column, justify="right")
    for block in (ACNet, RepVGG, QARepVGG, alone):
        if args.memory:
            t = {}
            for form in ("multi", "plain", "float", *MODES):
                out = multiprocessing.get_context("spawn").Queue()
                job = multiprocessing.get_context("spawn").Process(
                    target=peak, args=(block, args.width, shape, form, out)
                )
                job.start()
                t[form] = out.get()
                job.join()
        else:
            t = compare(
                {
                    name: stepper(m, x, y, args.compile)
                    for name, m in forms(block, args.width, x).items()
                },
                args.rounds,
            )
        ratios = [
            t["multi"] / t["plain"],
            1.0,
            *(t[m] / t["plain"] for m in MODES),
            t["float"] / t["multi"],
        ]
        table.add_row(block.__name__, *(f"{r:.2f}" for r in ratios))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
