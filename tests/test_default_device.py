"""Whatever torch.set_default_device says, results are the same: a tensor that repfx makes lies
where it is needed.

"meta" stands for a GPU: a tensor that was made there by accident holds nothing, and no operation
takes it beside others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.blocks import ACNet, QARepVGG, RepVGG
from repfx.passes import Expand, Ptq
from repfx.quant import METHODS
from repfx.testing import randomise


def net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [
        RepVGG(3, 8, 3, 1, 1),
        QARepVGG(8, 8, 3, 1, 1),
        ACNet(8, 8, 3, 1, 1),
        RepVGG(8, 8, 3, 1, 1),
    ]
    layers = [layer for block in blocks for layer in (block, nn.ReLU())]
    return randomise(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    )


def pictures(n: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def same(work: Callable[[], Any]) -> None:
    """What `work` gives is the same when new tensors go to another device by default."""
    here = work()
    with torch.device("meta"):
        there = work()
    wanted, found = (m.state_dict() for m in (here, there))
    assert wanted.keys() == found.keys()
    assert {
        k for k, v in found.items() if v.device.type != "cpu" or not torch.equal(v, wanted[k])
    } == set()


@pytest.mark.parametrize(
    "passes",
    [
        "bnfold",
        "fuse",
        "qarep",
        "ptq",
        "ptq,qprep,fuse",
        "repq(bn=batch)",
        "repq(bn=sampled)",
        "repq,fuse",
    ],
)
def test_transform(passes: str) -> None:
    model, x = net(), pictures(2)
    same(lambda: repfx.transform(model, passes.split(","), example=x))


def test_expand() -> None:
    model = repfx.transform(net(), ["fuse"])

    def work() -> Any:
        torch.manual_seed(0)
        return repfx.transform(model, [Expand("dbb")])

    same(work)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_calibrate(method: str) -> None:
    model, data = net(), [pictures(), pictures(40)]

    same(lambda: repfx.calibrate(repfx.transform(model, [Ptq(4)]), data, method=method, bias=True))


@pytest.mark.parametrize("how", [{}, {"rounding": "adaround", "drop": 0.5, "loss": "mse"}])
def test_reconstruct(how: dict[str, Any]) -> None:
    model, data = net(), [pictures()]

    def work() -> Any:
        return repfx.reconstruct(
            repfx.transform(model, [Ptq(4), "qprep"]), data, iterations=5, batch=16, **how
        )

    same(work)


@pytest.mark.parametrize("passes", ["repq", "repq(bn=estimate)"])
def test_fit(passes: str) -> None:
    model, data = net(), (pictures(), torch.arange(32) % 5)

    def work() -> Any:
        trained = repfx.transform(model, [passes])
        repfx.fit(
            trained,
            "classification",
            data,
            epochs=2,
            batch=16,
            device="cpu",
            ema=0.5,
            progress=False,
        )
        return trained

    same(work)


def test_the_rest(tmp_path: Path) -> None:
    model, x = net(), pictures()
    with torch.device("meta"):
        print(repfx.inspect(model))
        int8 = repfx.calibrate(repfx.transform(model, [Ptq(8)]), [x])
        assert repfx.sensitivity(int8, [x]).worst(2)
        repfx.save(int8, tmp_path / "net.pt")
        loaded = repfx.load(tmp_path / "net.pt")
        assert repfx.verify(int8, loaded, x).relative == 0
        repfx.lower(loaded, tmp_path / "net.onnx", example=x)
        repfx.report(model, tmp_path / "net.html", example=x)
    assert repfx.lint(tmp_path / "net.onnx") is not None
