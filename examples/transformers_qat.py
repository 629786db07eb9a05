"""Quantization-aware training of an RT-DETR in transformers' own Trainer, then one INT8 file.

    python examples/transformers_qat.py [--epochs 3] [--out int8.onnx]

The model is transformed and given to the Trainer, which sees an object of its own class: it is
called with images and labels, returns an output with a loss, and is saved as a checkpoint. The net
is a small RT-DETR with random weights, the images are drawn here: two coloured squares on noise.
Needs transformers and accelerate; examples/zoo_capture.txt says how to install them beside a CPU
build of torch."""

from __future__ import annotations

import argparse
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import zoo_operators
from squares import COLORS, squares
from torch import Tensor, nn

import repfx
from repfx.passes import RepQ

SIZE = 128


def detector() -> nn.Module:
    library: Any = import_module("transformers")
    widths, dim = [32, 48, 64], 32
    backbone = library.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, *widths],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = library.RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=widths,
        encoder_hidden_dim=dim,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        hidden_expansion=1.0,
        decoder_in_channels=[dim] * 3,
        d_model=dim,
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=20,
        num_denoising=0,
        num_labels=len(COLORS),
    )
    model: nn.Module = library.RTDetrForObjectDetection(config).eval()
    return model


def dataset(count: int, seed: int) -> list[dict[str, Any]]:
    found = []
    for image, boxes in squares(count, seed, SIZE):
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        kinds, places = torch.tensor([b[0] for b in boxes]), torch.tensor([b[1:] for b in boxes])
        labels = {"class_labels": kinds, "boxes": places}
        found.append({"pixel_values": pixels, "labels": labels})
    return found


def batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pixel_values": images(rows), "labels": [row["labels"] for row in rows]}


def images(rows: list[dict[str, Any]]) -> Tensor:
    return torch.stack([row["pixel_values"] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("int8.onnx"))
    args = parser.parse_args()
    zoo_operators.provide()
    library: Any = import_module("transformers")

    torch.manual_seed(0)
    train, valid = dataset(32, 0), dataset(8, 1)
    example = {"pixel_values": images(train[:2])}
    # With random weights, running statistics are not those of the net yet: the norms take those of
    # the batch, and the steps come from a batch in training mode.
    repq = RepQ(bn="sampled")
    net = repfx.transform(detector(), [repq], example=example, target="onnxruntime")
    with torch.no_grad():
        net.train()(images(train))
    with tempfile.TemporaryDirectory() as folder:
        options = library.TrainingArguments(
            folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            learning_rate=5e-4,
            max_grad_norm=0.1,
            use_cpu=True,
            remove_unused_columns=False,
            logging_strategy="epoch",
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to=[],
        )
        trainer = library.Trainer(net, options, batch, train_dataset=train, eval_dataset=valid)
        trainer.train()
    trained = net.eval()
    merged = repfx.transform(trained, ["fuse"], example=example)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    print(f"{type(trained).__name__}; batch norms left: {left}")
    print(repfx.lower(merged, args.out, example=example, target="onnxruntime").parity)


if __name__ == "__main__":
    main()
