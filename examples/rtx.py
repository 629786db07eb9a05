"""Builds our INT8 files with TensorRT for RTX, without a GPU, and counts their layers in integers.

    make trt                                                  (installs it and runs this)
    python examples/rtx.py [--groups timm,whole,placement,random] [--nets 200] [--out rtx.jsonl]

Each net is lowered in float32 and in float16, with a dynamic batch. A row says how many layers the
lint sees between Q and DQ, and how many of them the builder runs in INT8. Rows go to a file of JSON
lines, and a run resumes where the last one stopped. It exits with 1 if one differs."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from isa import nets as others
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import repfx
from repfx.blocks import ACNet, MobileOne, RepVGG
from repfx.lowering.onnx.index import Index
from repfx.lowering.tensorrt import rtx
from repfx.lowering.tensorrt.engine import build
from repfx.testing import randomise

GROUPS = ("timm", "whole", "placement", "random")
Make = Callable[[], tuple[nn.Module, Tensor]]


def block(kind: Callable[..., nn.Module], i: int, o: int, act: Any = nn.ReLU) -> nn.Module:
    return nn.Sequential(kind(i, o, 3, 1, 1), act())


class Detector(nn.Module):
    """A backbone, a neck that joins two scales, and heads for boxes and scores."""

    def __init__(self, kind: Callable[..., nn.Module], act: Any, decoupled: bool, up: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(kind(3, 16, 3, 2, 1), act())
        self.fine = nn.Sequential(nn.MaxPool2d(2), block(kind, 16, 32, act))
        self.coarse = nn.Sequential(nn.MaxPool2d(2), block(kind, 32, 32, act))
        self.up = nn.Upsample(scale_factor=2, mode=up)
        self.join = block(kind, 64, 32, act)
        self.boxes = block(kind, 32, 32, act) if decoupled else nn.Identity()
        self.scores = block(kind, 32, 32, act) if decoupled else nn.Identity()
        self.box, self.score = nn.Conv2d(32, 4, 1), nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        fine = self.join(torch.cat([self.up(coarse), fine], 1))
        boxes = [self.box(self.boxes(y)).flatten(2) for y in (fine, coarse)]
        scores = [self.score(self.scores(y)).flatten(2) for y in (fine, coarse)]
        return torch.cat(boxes, 2), torch.cat(scores, 2).sigmoid()


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = block(RepVGG, 3, 16), block(RepVGG, 16, 32)
        self.deep, self.out = block(ACNet, 32, 32), block(RepVGG, 48, 16)
        self.up, self.last = nn.ConvTranspose2d(32, 32, 2, 2), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.one(x)
        deep = self.deep(self.two(F.max_pool2d(fine, 2)))
        return self.last(self.out(torch.cat([self.up(deep), fine], 1)))


class Hybrid(nn.Module):
    """Convolutions, then attention between their places, as in MobileViT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(MobileOne(3, 32, 3, 2, 1), nn.GELU(), MobileOne(32, 32, 3, 2, 1))
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        heads = self.qkv(self.norm(x)).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def upscaler() -> nn.Module:
    layers = [block(RepVGG, 3, 16, nn.PReLU), block(RepVGG, 16, 16, nn.PReLU)]
    return nn.Sequential(*layers, nn.Conv2d(16, 12, 3, 1, 1), nn.PixelShuffle(2))


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "detector, SiLU": lambda: Detector(RepVGG, nn.SiLU, False, "nearest"),
    "detector, decoupled": lambda: Detector(RepVGG, nn.ReLU, True, "nearest"),
    "detector, MobileOne": lambda: Detector(MobileOne, nn.Hardswish, True, "bilinear"),
    "U-Net": UNet,
    "hybrid": Hybrid,
    "super-resolution": upscaler,
}


def nets(group: str, count: int) -> Iterator[tuple[str, Make]]:
    if group != "whole":
        yield from others("zoo" if group == "timm" else group, count)
        return
    for name, kind in WHOLE.items():
        yield name, lambda kind=kind: (randomise(kind().eval()), torch.randn(4, 3, 32, 32))


def row(make: Make, float16: bool, folder: Path) -> dict[str, Any]:
    """One net, built: what the lint counts and what the builder does."""
    torch.manual_seed(0)
    net, x = make()
    int8 = repfx.calibrate(repfx.transform(net, ["ptq"], example=x), [x])
    try:
        path = repfx.lower(int8, folder / "net.onnx", example=x, float16=float16).onnx
    except repfx.InputError as error:  # a number that float16 does not hold
        return {"refused": str(error)[:200]}
    index = Index(onnx.load(path))
    between = sum(
        index.dq(layer.x) is not None and bool(layer.weight) and index.dq(layer.weight) is not None
        for layer in index.layers
    )
    start = time.monotonic()
    engine = build(path, folder / "net.engine", compute_capability=["8.6"])
    return {
        "layers": len(index.layers),
        "between": between,
        "int8": engine.layers.get("INT8", 0),
        "pointwise": engine.pointwise,
        "bytes": engine.traffic,
        "seconds": round(time.monotonic() - start, 1),
        "version": engine.version,
        "lint": [str(f) for f in repfx.lint(path) if f.severity in "EW"],
    }


def table(found: list[dict[str, Any]]) -> Table:
    built = [r for r in found if "int8" in r]
    shown = Table(title=f"TensorRT for RTX {built[0]['version']}" if built else "nothing was built")
    for column in ("nets", "type", "built", "refused", "layers", "between Q and DQ", "INT8"):
        shown.add_column(column, justify="right")
    for group in GROUPS:
        for kind in ("float32", "float16"):
            mine = [r for r in found if (r["group"], r["type"]) == (group, kind)]
            good = [r for r in mine if "int8" in r]
            sums = [sum(r[key] for r in good) for key in ("layers", "between", "int8")]
            if mine:
                shown.add_row(
                    group, kind, str(len(good)), str(len(mine) - len(good)), *map(str, sums)
                )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--nets", type=int, default=200, help="how many random nets")
    parser.add_argument("--types", default="float32,float16")
    parser.add_argument("--out", type=Path, default=Path("rtx.jsonl"))
    args = parser.parse_args()
    if rtx.module() is None:
        sys.exit(f"{rtx.NAME} is not installed: make trt")
    args.out.touch()
    found = [json.loads(line) for line in args.out.read_text().splitlines()]
    done = {(r["net"], r["type"]) for r in found}
    for group in args.groups.split(","):
        todo = [
            (name, make, kind)
            for name, make in nets(group, args.nets)
            for kind in args.types.split(",")
            if (name, kind) not in done
        ]
        for name, make, kind in track(todo, group):
            with tempfile.TemporaryDirectory() as folder:
                new = {"group": group, "net": name, "type": kind}
                new |= row(make, kind == "float16", Path(folder))
            found.append(new)
            with args.out.open("a") as file:
                file.write(json.dumps(new) + "\n")
    console = Console()
    console.print(table(found))
    wrong = [r for r in found if r.get("int8") != r.get("between")]
    for r in wrong:
        console.print(f"{r['net']}, {r['type']}: {r['int8']} of {r['between']} in INT8")
    for r in found:
        if "refused" in r:
            console.print(f"{r['net']}, {r['type']}: {r['refused']}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
