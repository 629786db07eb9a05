"""The cost of post-training quantization: python examples/bench_ptq.py

1. the speed of calibration relative to plain forward passes of the merged net over the same images
   (4 096 for the mini net, 64 and 256 for resnet18): medians and quartiles over rounds in which
   each runs once;
2. the time of `reconstruct` with its defaults;
3. peak memory for 256 and for 4 096 images;
4. with `--system` only this: the time of `reconstruct` on a resnet18 at 224 x 224 that is the
   system's own, with freed memory kept in the process (see `repfx.memory`) and without;
5. with `--large` only this: the same with its defaults, 1 000 steps a block on 512 images, which
   takes half an hour."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import repfx
import repfx.memory
from repfx.blocks import QARepVGG
from repfx.lowering.runtimes.timing import interleaved

METHODS = ("max", "percentile", "mse", "mae", "entropy")


def mini() -> nn.Module:
    """The net of the studies: (N, 3, 32, 32) -> (N, 10).

    It has eight QARepVGG blocks of 16, 32 and 64 channels."""
    plan = [
        (3, 16, 1),
        (16, 16, 1),
        (16, 32, 2),
        (32, 32, 1),
        (32, 32, 1),
        (32, 64, 2),
        (64, 64, 1),
        (64, 64, 1),
    ]
    blocks = [nn.Sequential(QARepVGG(i, o, 3, stride, 1), nn.ReLU()) for i, o, stride in plan]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def resnet18() -> nn.Module:
    from zoo import timm

    return timm.create_model("resnet18").eval()


NETS: dict[str, Any] = {
    "mini": (mini, (128, 3, 32, 32), 32),
    "resnet18": (resnet18, (8, 3, 128, 128), 8),
    "resnet18, 224": (resnet18, (32, 3, 224, 224), 8),  # batches as in `repfx quantize`
}


def batches(shape: tuple[int, ...], count: int) -> Iterator[Tensor]:
    """Random images, made one batch at a time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)


def throughput(name: str, threads: int, rounds: int) -> list[str]:
    """The speed of calibration relative to plain forward passes, for each method."""
    torch.set_num_threads(threads)
    # 32 MB, freed at once. From then on glibc keeps freed memory, which makes the comparison fair.
    torch.empty(2**23 - 2**13)
    make, shape, count = NETS[name]
    net, data = make().eval().to(memory_format=torch.channels_last), list(batches(shape, count))
    merged, quantized = (repfx.transform(net, [p], example=data[0]) for p in ("fuse", "ptq"))

    def forward() -> None:
        with torch.no_grad():
            for x in data:
                merged(x)

    runs: dict[str, Any] = {"forward": forward}
    runs |= {m: partial(repfx.calibrate, quantized, data, method=m) for m in METHODS}
    times = interleaved(runs, rounds)
    cells = []
    for m in METHODS:
        low, middle, high = statistics.quantiles(
            (a / b for a, b in zip(times["forward"], times[m], strict=True)), n=4
        )
        cells.append(f"{middle:.2f} ({low:.2f}..{high:.2f})")
    return cells


def memory(what: str, pictures: int, answer: Any) -> None:
    """Puts the peak of this process's own memory above that at its start, in MiB.

    Memory shared with files, such as the cache, does not count."""

    def own() -> int:
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return (resident - shared) * 4096

    torch.set_num_threads(1)
    peak, done = [own()], threading.Event()
    make, shape, _ = NETS["mini"]
    model = repfx.transform(make(), ["ptq", "qprep"] if what == "reconstruct" else ["ptq"])
    start = own()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    data = batches((64, *shape[1:]), pictures // 64)
    if what == "reconstruct":
        with tempfile.TemporaryDirectory() as folder:
            repfx.reconstruct(model, data, iterations=5, cache=folder)
    else:
        repfx.calibrate(model, data, method="mse")
    done.set()
    watcher.join()
    answer.put((peak[0] - start) / 2**20)


def system(kept: bool, steps: int, count: int, answer: Any) -> None:
    """Puts the user's, the system's and the whole seconds of `reconstruct`."""
    if not kept:
        repfx.memory._glibc = lambda: None
    data = [torch.randn(32, 3, 224, 224) for _ in range(count // 32)]
    model = repfx.transform(resnet18(), ["ptq"], example=data[0][:2])
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    repfx.reconstruct(model, data, iterations=steps)
    after = resource.getrusage(resource.RUSAGE_SELF)
    spent = (after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)
    answer.put((*spent, time.perf_counter() - begun))


def print_system(steps: int, count: int, ways: tuple[bool, ...]) -> None:
    context = multiprocessing.get_context("spawn")
    for kept in ways:
        answer = context.Queue()
        child = context.Process(target=system, args=(kept, steps, count, answer))
        child.start()
        user, own, whole = answer.get()
        child.join()
        word = "kept" if kept else "given back"
        print(f"{count} images, {steps} steps a block, freed memory {word}: ", end="")
        print(f"user {user:.0f} s, system {own:.0f} s, {whole:.0f} s in all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--speed", action="store_true", help="only 1.")
    parser.add_argument("--system", action="store_true", help="only 4.")
    parser.add_argument("--large", action="store_true", help="only 5.")
    args = parser.parse_args()
    if args.system:
        print_system(10, 96, (False, True))
        return
    if args.large:
        print_system(1000, 512, (True,))
        return
    console = Console(width=150)
    table = Table(title="speed of calibrate, relative to plain forward passes")
    for column in ("net", "threads", *METHODS):
        table.add_column(column, justify="right")
    for name in args.nets:
        for threads in args.threads:
            table.add_row(name, str(threads), *throughput(name, threads, args.rounds))
    console.print(table)
    if args.speed:
        return

    make, shape, _ = NETS["mini"]
    model = repfx.transform(make(), ["ptq(bits=6, weights=mse)", "qprep"])
    start = time.perf_counter()
    repfx.reconstruct(model, batches(shape, 8), progress=True)
    console.print(
        f"reconstruct, mini net, 1024 images, defaults, {torch.get_num_threads()} threads: ",
        end="",
    )
    console.print(f"{time.perf_counter() - start:.0f} s")

    table = Table(title="peak memory, MiB above the start")
    for column in ("", "256 images", "4096 images"):
        table.add_column(column, justify="right")
    start_method = multiprocessing.get_context("spawn")
    for what in ("calibrate", "reconstruct"):
        cells = []
        for pictures in (256, 4096):
            answer = start_method.Queue()
            child = start_method.Process(target=memory, args=(what, pictures, answer))
            child.start()
            cells.append(f"{answer.get():.0f}")
            child.join()
        table.add_row(what, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
