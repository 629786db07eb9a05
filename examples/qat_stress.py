"""Does quantization-aware training survive any learning rate? A table of 168 short runs.

    python examples/qat_stress.py [--epochs 6] [--out qat_stress.jsonl]

RepVGG and QARepVGG blocks are trained in float on scikit-learn's digits, then by `repq` from that
checkpoint: 8, 4 and 2 bits, SGD and AdamW, learning rates from 1e-4 to 1e-1, in each mode of
the batch norms. A cell has the accuracy on the test images before and after training, the number of
faults that the history names for the last epoch, the grids of the finished model with dead
channels, `loss up` where the last epoch's loss is above the first's, or says that it is above the
loss before training, and `stopped` where `fit` raised an error. The last column is the
float model, trained on at the same rate. Rows go to a file of JSON lines, and a run resumes where
the last one stopped."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import repfx
from repfx.blocks import QARepVGG, RepVGG
from repfx.training.watch import watching

RATES = (1e-4, 1e-3, 1e-2, 1e-1)
BITS = (8, 4, 2)
OPTIMIZERS = ("sgd", "adamw")
MODES = ("running", "batch", "estimate", "estimate_paper", "sampled", "frozen", "live")
Pair = tuple[Tensor, Tensor]


def digits() -> tuple[Pair, Pair]:
    """Images of 8 x 8 for training and for testing."""
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1280], order[1280:]
    return (x[train], y[train]), (x[test], y[test])


def net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [RepVGG(1, 16, 3, 1, 1), QARepVGG(16, 16, 3, 1, 1), RepVGG(16, 32, 3, 2, 1)]
    blocks += [QARepVGG(32, 32, 3, 1, 1)]
    layers = [layer for block in blocks for layer in (block, nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


def train(model: nn.Module, data: Pair, **options: Any) -> repfx.History:
    return repfx.fit(
        model,
        "classification",
        data,
        batch=64,
        schedule="constant",
        progress=False,
        device="cpu",
        **options,
    )


def row(
    start: nn.Module, data: tuple[Pair, Pair], case: dict[str, Any], epochs: int
) -> dict[str, Any]:
    """One run. Its state before training is that of the first batch, which sets the steps."""
    given, test = data
    model = copy.deepcopy(start)
    if case["bits"]:
        spec = repfx.passes.RepQ(bits=case["bits"], bn=case["mode"])
        model = repfx.transform(model, [spec], example=given[0][:4])
    copied = copy.deepcopy(model).train()
    with torch.no_grad():
        copied(given[0][:64])
        before = accuracy(copied, test)
        pairs = list(zip(*(part.split(64) for part in given), strict=True))
        losses = [nn.functional.cross_entropy(copied.train()(x), y) for x, y in pairs]
    options: dict[str, Any] = {"lr": case["lr"], "optimizer": case["optimizer"], "valid": test}
    try:
        history = train(model, given, epochs=epochs, **options)
    except repfx.RepfxError as error:
        return {**case, "before": before, "stopped": str(error)}
    with watching(model) as seen:
        after = accuracy(model, test)
    finite = all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())
    return {
        **case,
        "before": before,
        "after": after,
        "losses": [float(torch.stack(losses).mean()), *(e.loss for e in history)],
        "finite": finite,
        "faults": list(history[-1].faults),
        "dead": [line.split(" ")[0] for line in seen.faults if " to 0: " in line],
    }


def cell(r: dict[str, Any]) -> str:
    if "stopped" in r:
        return "stopped"
    said = f"{r['before']:.2f} → {r['after']:.2f}"
    said += f", {len(r['faults'])} faults" if r["faults"] else ""
    said += f", {len(r['dead'])} with dead channels" if r["dead"] else ""
    start, first, *_, last = r["losses"]
    said += ", loss up" if last > first else ", loss above the start" if last > start else ""
    return said + ("" if r["finite"] else ", not finite")


def table(found: list[dict[str, Any]]) -> Table:
    shown = Table("bits", "optimizer", "lr", *MODES, "float")
    for bits in BITS:
        for optimizer in OPTIMIZERS:
            for lr in RATES:
                mine = [r for r in found if (r["optimizer"], r["lr"]) == (optimizer, lr)]
                cells = {r["mode"]: cell(r) for r in mine if r["bits"] in (bits, 0)}
                modes = [cells.get(mode, "") for mode in (*MODES, "float")]
                shown.add_row(str(bits), optimizer, f"{lr:g}", *modes)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("qat_stress.jsonl"))
    args = parser.parse_args()
    args.out.touch()
    found = [json.loads(line) for line in args.out.read_text().splitlines()]
    done = {(r["bits"], r["optimizer"], r["lr"], r["mode"]) for r in found}
    cases = [
        {"bits": bits, "optimizer": optimizer, "lr": lr, "mode": mode}
        for optimizer in OPTIMIZERS
        for lr in RATES
        for bits, mode in [*((b, m) for b in BITS for m in MODES), (0, "float")]
    ]
    data, start = digits(), net()
    train(start, data[0], epochs=2, lr=0.05)  # so that a loss has room to fall
    for case in track(cases, "training"):
        if tuple(case.values()) not in done:
            found.append(row(start.eval(), data, case, args.epochs))
            with args.out.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    Console(width=170).print(table(found))


if __name__ == "__main__":
    main()
