"""What stays in float for TensorRT: gates of one position, and odd depthwise convolutions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.passes import Ptq
from repfx.quant import quantizers_of
from repfx.testing import randomise


class Squeeze(nn.Module):
    """Convolutions with a norm on the mean of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1)

    def gate(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        return F.hardsigmoid(self.up(torch.relu(self.norm(self.down(y)))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Residual(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul(1 + self.gate(x))


class Returned(Squeeze):
    """Its gate is more than a gate."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return x * gate + F.pad(gate, (0, 7, 0, 7))


class Linears(nn.Module):
    """Linear layers, and one gate for two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3))))))[:, :, None, None]
        return x * y + torch.relu(x) * y


class Attention(nn.Module):
    """CBAM: a gate a channel from two pools, and one a position, whose layer reads a map."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 8, 1, bias=False)
        self.spatial, self.norm = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        pools = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = torch.sigmoid(sum(self.up(torch.relu(self.down(p))) for p in pools)) * x
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.norm(self.spatial(maps)))


class Channels(nn.Module):
    """ECA: a convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.along(x.mean((2, 3))[:, None, :])
        return x * torch.sigmoid(y).transpose(1, 2)[..., None]


KINDS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "squeeze": (Squeeze, {"2.down", "2.up"}),
    "residual": (Residual, {"2.down", "2.up"}),
    "returned": (Returned, set()),
    "linears": (Linears, {"2.down", "2.up"}),
    "attention": (Attention, {"2.down", "2.up"}),
    "channels": (Channels, set()),
    "odd depthwise": (lambda: grouped(8, 12, 4), {"2.2"}),
    "even depthwise": (lambda: grouped(8, 24, 8), set()),
    "wide groups": (lambda: grouped(48, 36, 3), set()),
}


def grouped(inputs: int, outputs: int, groups: int) -> nn.Module:
    last = nn.Conv2d(inputs, outputs, 3, groups=groups)
    return nn.Sequential(nn.Conv2d(8, inputs, 1), nn.ReLU(), last)


def network(kind: str) -> nn.Module:
    outputs = {"odd depthwise": 12, "even depthwise": 24, "wide groups": 36}.get(kind, 8)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        KINDS[kind][0](),
        nn.Conv2d(outputs, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return randomise(net.eval())


def own(name: str) -> str:
    """The layer that was called for this part of a graph: 2.up for 2.up_merged."""
    found = re.match(r"2\.[a-z0-9]+", name)
    return found.group() if found else name


def layers(model: nn.Module) -> set[str]:
    return {n.removesuffix(".weight_quant") for n in quantizers_of(model, of_weight=True)}


@pytest.mark.parametrize("recipe", ["ptq", "repq"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_in_float_for_tensorrt(kind: str, recipe: str, tmp_path: Path) -> None:
    net, x = network(kind), torch.randn(2, 3, 16, 16)
    model: Any = repfx.transform(net, [recipe], example=x)
    others = layers(repfx.transform(net, [recipe], example=x, target="onnxruntime"))
    assert {own(name) for name in others - layers(model)} == KINDS[kind][1]
    reasons = ("one number a channel", "8 does not divide")
    said = {d.where for d in model.meta["repfx"].declined if any(r in d.reason for r in reasons)}
    assert {own(where) for where in said} == KINDS[kind][1]
    if recipe == "repq":
        return
    file = repfx.lower(repfx.calibrate(model, [x]), tmp_path / "int8.onnx", example=x)
    found = repfx.lint(file.onnx, target="tensorrt")
    warned = {f.rule for f in found if f.severity != "I"}
    # A linear layer's position cannot be seen in a file, and a depthwise one does take time.
    assert warned == ({"Q20"} if kind in ("linears", "odd depthwise") else set())


def test_a_gate_that_was_asked_for_in_float_is_left_alone() -> None:
    net, x = network("squeeze"), torch.randn(2, 3, 16, 16)
    model: Any = repfx.transform(net, [Ptq(wide="2.*", wide_bits=32)], example=x)
    assert not {"2.down", "2.up"} & layers(model)
    assert not any("one number" in d.reason for d in model.meta["repfx"].declined)


def test_without_shapes_and_on_one_position_nothing_is_taken_for_a_gate() -> None:
    net = network("squeeze")
    whole = layers(repfx.transform(net, ["ptq"], example=torch.randn(2, 3, 2, 2)))
    assert {"2.down", "2.up"} <= whole  # the map has one position itself
