"""What the studies share: the nets, the images, and a file of results from which runs resume."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import repfx
from repfx.blocks.frame import ConvNorm, Frame
from repfx.data import Pictures

REPAPQ: dict[str, Any] = {"loss": "mae", "stage": 1.0, "batch": 64}  # reconstruct as in the paper
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def command(doc: str | None, name: str, seeds: list[int] | None = None) -> argparse.ArgumentParser:
    """The options that every study has; `--seeds` only where defaults are given."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("out/study"), help="checkpoints")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / f"{name}.jsonl")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    if seeds:
        parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    return parser


def plain(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Module:
    """One convolution and its batch norm, with which blocks are compared."""
    return ConvNorm(Frame.of(inputs, outputs, kernel, stride, padding))


def mini(
    block: Any,
    widths: tuple[int, ...] = (16, 32, 64),
    depths: tuple[int, ...] = (2, 3, 3),
    classes: int = 10,
    **options: Any,
) -> nn.Module:
    """Stages of 3x3 blocks and ReLU: (N, 3, 32, 32) -> (N, classes).

    Every stage but the first begins with a stride of 2."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(depth):
            layers += [
                block(inputs, width, 3, 2 if stage and not i else 1, 1, **options),
                nn.ReLU(),
            ]
            inputs = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    return images_last(net)


def images_last(net: nn.Module) -> nn.Module:
    """Weights of convolutions in channels-last memory, which halves a step's time on a CPU."""
    for weight in net.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return net


def pictures(path: Path, limit: int | None = None) -> tuple[Pictures, Pictures]:
    """CIFAR-10 for training and testing: a folder or zip of `train|test/<class>/*.jpg`."""
    same: dict[str, Any] = {"mean": MEAN, "std": STD, "cache": True}
    return Pictures(path, "train", augment=True, limit=limit, **same), Pictures(
        path, "test", **same
    )


def calibration(path: Path, count: int = 1024) -> list[torch.Tensor]:
    """Training images without augmentation, in batches of 128."""
    data = Pictures(path, "train", mean=MEAN, std=STD, limit=count)
    return [x for x, _ in DataLoader(data, 128)]


class Accuracy:
    """Top-1 in percent on the test images, which are decoded once."""

    def __init__(self, test: Any) -> None:
        self.batches = [
            (x.to(memory_format=torch.channels_last), y)
            for x, y in DataLoader(Subset(test, range(len(test))), 500)
        ]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        model.eval()
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in self.batches)
        return 100 * right / sum(len(y) for _, y in self.batches)


class Results:
    """A file of JSON lines, each a result with its key; a run that has a line is not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )

    def has(self, **key: Any) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def trained(
    folder: Path, name: str, make: Any, task: Any, data: Any, seed: int, **options: Any
) -> nn.Module:
    """The net of this name and seed, trained now or loaded from its finished checkpoint.

    An interrupted run resumes."""
    torch.manual_seed(seed)
    model: nn.Module = make()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{seed}.ck"
    repfx.fit(
        model,
        task,
        data,
        seed=seed,
        checkpoint=file,
        log=file.with_suffix(".jsonl"),
        device="cpu",
        **options,
    )
    return model.eval()
