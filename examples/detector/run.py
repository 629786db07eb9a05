"""A detector from training to INT8 files, and its boxes drawn: python examples/detector/run.py

    --data bccd.zip   images with boxes in COCO's form; by default digits on textures
    --block qarepvgg  any of repfx.blocks.BLOCKS, or plain

Trains the net of net.py, merges it, quantizes it by every method, and prints the average precision
of each. Writes to --output: the trained net; the best INT8 net as ONNX files with its maps, with
all its boxes, and with its best boxes; and boxes.png, where the last file has drawn what it found.
Training resumes where it was cut."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from net import detector
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import repfx
from repfx.data.archive import IMAGENET_MEAN, IMAGENET_STD, by_channel
from repfx.data.boxes import Boxes, train_and_valid
from repfx.data.vision import torchvision
from repfx.lowering.runtimes.run import session
from repfx.passes import Ptq, RepQ
from repfx.quant import METHODS
from repfx.training import Boxed, Detection

ADAMW: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.01}


def sets(path: Path | None) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any], tuple[str, ...]]:
    """The images to train on, to calibrate on and to test with, and the names of the classes."""
    if path is None:
        train, test = (TensorDataset(*part) for part in Detection().read("digits"))
        return train, train, test, tuple("0123456789")
    same: dict[str, Any] = {"size": (256, 320), "cache": True}
    first, second = train_and_valid(path, **same)
    assert second is not None, f"{path} has no boxes to test with"
    return first, Boxes(path, "train.json", **same), second, first.classes


def precision(model: nn.Module, test: Dataset[Any], task: Detection) -> list[float]:
    """AP and AP50 in percent."""
    metric = task.metric()
    model.eval()
    with torch.no_grad():
        for batch in DataLoader(test, 25):
            metric.update(model, batch)
    return [100 * float(v) for v in metric.compute().values()]


def quantized(net: nn.Module, images: list[Tensor], train: Any, task: Any) -> dict[str, nn.Module]:
    """The net in INT8, by the method."""
    example, found = images[0][:2], {}
    for method in METHODS:
        model: nn.Module = repfx.transform(net, ["fuse", "ptq"], example=example)
        found[method] = repfx.calibrate(model, images, method=method)
    model = repfx.transform(net, [Ptq(weights="mse"), "qprep"], example=example)
    repfx.reconstruct(model, images, iterations=200, loss="mae", stage=1.0)
    found["RepAPQ"] = repfx.transform(model, ["fuse"])
    for bn in ("running", "estimate"):
        model = repfx.transform(net, [RepQ(bn=bn)], example=example)
        repfx.fit(model, task, train, epochs=2, lr=0.0005, batch=32, **ADAMW)
        found[f"RepQ {bn}"] = repfx.transform(model.eval(), ["fuse"])
    return found


def drawn(file: Path, test: Any, names: tuple[str, ...], to: Path, count: int = 8) -> None:
    """Runs the file with the best boxes, and draws those it is sure of."""
    tools = torchvision("utils")
    run = session("onnxruntime", file)
    images = torch.stack([test[i][0] for i in range(count)])
    boxes, scores, classes = run((images,))
    pixels = images * by_channel(IMAGENET_STD) + by_channel(IMAGENET_MEAN)
    scale = max(1, 240 // images.shape[-1])
    large = nn.functional.interpolate((255 * pixels).clamp(0, 255), scale_factor=scale).byte()
    pictures = []
    for image, box, score, label in zip(large, boxes, scores, classes, strict=True):
        sure = score > 0.3
        said = [
            f"{names[int(k)]} {float(s):.1f}" for k, s in zip(label[sure], score[sure], strict=True)
        ]
        pictures.append(tools.draw_bounding_boxes(image, scale * box[sure], said))
    grid = tools.make_grid(pictures, nrow=4)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(to)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--block", default="repvgg")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("out/detector"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train, still, test, names = sets(args.data)
    task = Detection(flip=args.data is not None)
    torch.manual_seed(0)
    net = detector(args.block, len(names), down=2 if args.data is None else 4)
    history = repfx.fit(
        net,
        task,
        train,
        valid=test,
        epochs=args.epochs,
        batch=32,
        lr=0.004,
        warmup=1,
        checkpoint=args.output / f"{args.block}.ck",
        **ADAMW,
    )
    console = Console()
    console.print(history)
    images = [x for x, _ in DataLoader(still, 64)][:8]
    table = Table("", "AP", "AP50", title=args.block)
    rows = {"as trained": net.eval(), "merged": repfx.transform(net, ["fuse"], example=images[0])}
    rows |= {f"INT8, {way}": made for way, made in quantized(net, images, train, task).items()}
    scores = {name: precision(model, test, task) for name, model in rows.items()}
    for name, row in scores.items():
        table.add_row(name, *(f"{v:.1f}" for v in row))
    console.print(table)
    name = max((n for n in rows if n.startswith("INT8")), key=lambda n: scores[n][0])
    files: dict[str, nn.Module] = {"maps": rows[name], "boxes": Boxed(rows[name], suppress=False)}
    files["best"] = Boxed(rows[name])
    for kind, model in files.items():
        found = repfx.lower(model, args.output / f"{args.block}-{kind}.onnx", example=images[0][:4])
        console.print(f"{name}, {kind}: {found.onnx}")
    drawn(args.output / f"{args.block}-best.onnx", test, names, args.output / "boxes.png")
    console.print(f"drawn: {args.output / 'boxes.png'}")


if __name__ == "__main__":
    main()
