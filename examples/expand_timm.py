"""Trains a timm ResNet at 4 bits with extra branches, which merge away before it is deployed.

    python examples/expand_timm.py --data cifar10.zip

expand turns each 3x3 convolution and its batch norm into an ACNet block that computes the same.
repq trains its merged weight. fuse gives a net with as many convolutions as the ResNet had."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from zoo import timm

import repfx
from repfx.blocks import ACNet
from repfx.data import Pictures
from repfx.passes import Expand, RepQ


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="train/<class>/*.jpg and test/<class>/*.jpg"
    )
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument(
        "--epochs", type=int, default=2, help="epochs in float, first plain and then with branches"
    )
    parser.add_argument("--qat-epochs", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--limit", type=int, default=5000, help="training images")
    parser.add_argument("--output", type=Path, default=Path("out/resnet.onnx"))
    args = parser.parse_args()
    train, test = (
        Pictures(args.data, "train", augment=True, limit=args.limit, cache=True),
        Pictures(args.data, "test"),
    )
    model = timm.create_model(args.model, num_classes=len(train.classes))
    x = torch.stack([test[i][0] for i in range(8)])

    def fit(net: nn.Module, name: str, epochs: int, lr: float) -> nn.Module:
        history = repfx.fit(
            net, "classification", train, valid=test, epochs=epochs, lr=lr, batch=64, device="cpu"
        )
        convs = sum(isinstance(m, nn.Conv2d) for m in net.modules())
        print(f"{name}: {convs} convolutions, top-1 {100 * history.rows[-1].metrics['top1']:.1f} %")
        return net.eval()

    plain = fit(model, "plain", args.epochs, 0.05)
    wide: nn.Module = repfx.transform(plain, [Expand(block=ACNet, kernel=3)], example=x)
    print(f"expanded: {repfx.verify(plain, wide, x)}")
    wide = fit(wide, "with branches", args.epochs, 0.02)
    trained = fit(
        repfx.transform(wide, [RepQ(bits=args.bits)], example=x),
        f"repq, {args.bits} bits",
        args.qat_epochs,
        0.01,
    )
    deployed = repfx.transform(trained, ["fuse"], example=x)
    print(f"deployed: {sum(isinstance(m, nn.Conv2d) for m in deployed.modules())} convolutions")
    print(f"deployed against trained: {repfx.verify(trained, deployed, x)}")
    if args.bits == 8:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        print(f"ONNX Runtime: {repfx.lower(deployed, args.output, example=x).parity}")


if __name__ == "__main__":
    main()
