"""The cost of `transform(model, ["fuse"])`, against torch.fx and timm's own re-parameterization.

    python examples/bench_fuse.py            prints the three tables

1. time, proof included, relative to torch.fx.symbolic_trace + timm's reparameterize_model (medians
   of interleaved runs);
2. time per block, for 50 to 3 200 RepVGG blocks;
3. peak memory above the model, in a fresh process, relative to the size of the model (Linux).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn

import repfx
from repfx.blocks import RepVGG

NETS = ["repvgg_a0", "mobileone_s0", "repvit_m1"]


def zoo(name: str) -> nn.Module:
    from zoo import timm

    return timm.create_model(name)


def interleaved(functions: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in functions]
    for i in range(rounds + 1):
        for j, f in enumerate(functions):
            gc.collect()  # no function pays for the garbage of the one before it
            start = time.perf_counter()
            f()
            if i:
                times[j].append(time.perf_counter() - start)
    return times


def speed(console: Console, rounds: int) -> None:
    table = Table(
        "model",
        "fuse + proof, s",
        "fx + timm, s",
        "ratio (median)",
        "ratio (min..max)",
        title="time",
    )
    for name in NETS:
        model = zoo(name)
        from timm.utils.model import reparameterize_model

        def theirs(model: nn.Module = model) -> None:
            fx.symbolic_trace(model)
            reparameterize_model(model)

        ours, base = interleaved([lambda m=model: repfx.transform(m, ["fuse"]), theirs], rounds)
        ratios = [a / b for a, b in zip(ours, base, strict=True)]
        a, b = statistics.median(ours), statistics.median(base)
        spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
        table.add_row(name, f"{a:.3f}", f"{b:.3f}", f"{statistics.median(ratios):.2f}", spread)
    console.print(table)


def block() -> nn.Module:
    return nn.Sequential(RepVGG(8, 8, 3, padding=1), nn.ReLU())


def scaling(console: Console, rounds: int) -> None:
    table = Table(
        "blocks",
        "s",
        "ms per block",
        "ratio to 50 blocks",
        title="time per block, RepVGG blocks of 8 channels",
    )
    sizes = [50, 200, 800, 3200]
    models = [nn.Sequential(*(block() for _ in range(n))).eval() for n in sizes]
    runs = [lambda m=m: repfx.transform(m, ["fuse"]) for m in models]
    medians = [statistics.median(t) for t in interleaved(runs, max(3, rounds // 3))]
    first = medians[0] / sizes[0]
    for n, t in zip(sizes, medians, strict=True):
        table.add_row(str(n), f"{t:.2f}", f"{1000 * t / n:.2f}", f"{t / n / first:.2f}")
    console.print(table)


def memory(console: Console) -> None:
    table = Table("model", "model, MB", "peak above it, MB", "ratio", title="peak memory")
    for name in [*NETS, "repvgg_b1g4"]:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", name],
            capture_output=True,
            text=True,
            check=True,
        )
        size, peak = (float(v) for v in done.stdout.split()[-2:])
        table.add_row(name, f"{size:.1f}", f"{peak:.1f}", f"{peak / size:.2f}")
    console.print(table)


def measure(name: str) -> None:
    """Prints the model's size and the growth of this process's peak resident memory, in MB."""
    model = zoo(name)
    # Libraries load and memory pools fill before the measurement starts.
    repfx.transform(nn.Sequential(block()), ["fuse"])
    model(torch.randn(2, 3, 64, 64))
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e6
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = resident("VmRSS")
    result = repfx.transform(model, ["fuse"])
    after = resident("VmHWM")
    assert result is not None
    print(size, after - before)


def resident(key: str) -> float:
    """A memory figure of this process in MB, as Linux reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    console = Console()
    speed(console, args.rounds)
    scaling(console, args.rounds)
    memory(console)


if __name__ == "__main__":
    main()
