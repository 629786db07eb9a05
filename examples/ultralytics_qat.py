"""Quantization-aware training of a YOLO in ultralytics' own trainer, then one INT8 file.

    python examples/ultralytics_qat.py [--model yolov8n.yaml] [--epochs 3] [--out int8.onnx]

The model is transformed and given back to the trainer, which sees an object of its own class: it
computes its loss, keeps its average of the weights, and writes its checkpoints. The images are
drawn here: two coloured squares on noise. Needs ultralytics; examples/zoo_capture.txt says how to
install it beside a CPU build of torch.

The trainer's last step is left out. It fuses batch norms into convolutions by itself, which the
quantizers have taken the place of."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo_operators
from PIL import Image
from squares import COLORS, SIZE, squares

import repfx


def draw(folder: Path, count: int, seed: int) -> None:
    """Writes images, and beside them their boxes in ultralytics' format."""
    labels = Path(str(folder).replace("images", "labels"))
    for made in (folder, labels):
        made.mkdir(parents=True)
    for i, (image, boxes) in enumerate(squares(count, seed)):
        Image.fromarray(image).save(folder / f"{i}.png")
        (labels / f"{i}.txt").write_text("\n".join(" ".join(map(str, box)) for box in boxes))


def trainer(images: Any, data: Path, model: str, epochs: int) -> Any:
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            net = super().get_model(cfg, weights, False).eval()
            net = repfx.transform(net, ["repq"], example=images[:2], target="onnxruntime")
            # The trainer copies the model for its average before the first step.
            return repfx.calibrate(net, [images]).train()

        def final_eval(self) -> None:
            pass

    options = {
        "model": model,
        "data": str(data / "data.yaml"),
        "epochs": epochs,
        "imgsz": SIZE,
        "batch": 8,
        "workers": 0,
        "device": "cpu",
        "project": str(data / "runs"),
        "plots": False,
        "amp": False,
        "pretrained": False,
    }
    return Trainer(overrides=options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="yolov8n.yaml")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("int8.onnx"))
    args = parser.parse_args()
    zoo_operators.provide()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        draw(data / "images" / "train", 24, 0)
        draw(data / "images" / "val", 8, 1)
        names = ", ".join(COLORS)
        (data / "data.yaml").write_text(
            f"path: {data}\ntrain: images/train\nval: images/val\nnames: [{names}]\n"
        )
        files = sorted((data / "images" / "train").glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(f)) for f in files])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        run = trainer(images, data, args.model, args.epochs)
        run.train()
        trained = run.ema.ema.float().eval()
        merged = repfx.transform(trained, ["fuse"], example=images[:2])
        left = sum(isinstance(m, torch.nn.BatchNorm2d) for m in merged.modules())
        print(f"{type(trained).__name__}, classes {trained.names}; batch norms left: {left}")
        print(repfx.lower(merged, args.out, example=images[:2], target="onnxruntime").parity)


if __name__ == "__main__":
    main()
