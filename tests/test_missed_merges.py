"""Merges that were missed: each kind in several spellings, and what looks like it and is declined.

The model's own forward in eval mode, in float64, is the oracle."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.testing import assert_same, randomise


class Net(nn.Module):
    """Holds parts as attributes and runs a function of them and x."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def count(model: nn.Module, kind: Any) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


def ready(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise(model.double().eval())


def reasons(model: Any) -> str:
    return " | ".join(f"{d.where}: {d.reason}" for d in model.meta["repfx"].declined)


def conv_bn(i: int, o: int, k: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False), nn.BatchNorm2d(o))


# Operators that do nothing: what they follow is still the block.
NEUTRAL: dict[str, Callable[[Tensor], Tensor]] = {
    "x + 0": lambda y: y + 0,
    "0 + x": lambda y: 0 + y,
    "x + 0.0": lambda y: torch.add(y, 0.0),
    "x + 2 * 0": lambda y: torch.add(y, 0, alpha=2),
    "x - 0": lambda y: y - 0,
    "x * 1": lambda y: y * 1,
    "1.0 * x": lambda y: 1.0 * y,
    "x / 1": lambda y: y / 1,
    "x += 0": lambda y: operator.iadd(y, 0),
    "aten": lambda y: torch.ops.aten.mul.Tensor(y, 1),
    "+x": lambda y: +y,
    "positive": torch.positive,
}


@pytest.mark.parametrize("where", ["sum", "branch"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_a_block_is_seen_through_what_does_nothing(name: str, where: str) -> None:
    act = NEUTRAL[name]

    def run(m: Any, x: Tensor) -> Tensor:
        if where == "sum":
            return torch.relu(act(m.dense(x) + m.point(x)))
        return torch.relu(m.dense(x) + act(m.point(x)))

    model = ready(Net(run, dense=conv_bn(4, 4, 3), point=conv_bn(4, 4, 1)))
    x = image(2, 4, 9, 8)
    changed = repfx.transform(model, ["qarep"], example=x)
    assert sum(len(r.inserted) for r in changed.meta["repfx"].results) == 1
    assert_same(model, changed, x, 1e-12)
    fused = repfx.transform(model, ["fuse"], example=x)
    assert [type(m) for m in fused.modules() if not list(m.children())] == [nn.Conv2d]
    assert_same(model, fused, x, 1e-12)


@pytest.mark.parametrize(
    "act", [lambda y: 0 - y, lambda y: 1 / y, lambda y: y - 1, lambda y: y * 0]
)
def test_what_does_something_is_no_identity(act: Callable[[Tensor], Tensor]) -> None:
    model = ready(
        Net(
            lambda m, x: torch.relu(m.dense(x) + act(m.point(x))),
            dense=conv_bn(4, 4, 3),
            point=conv_bn(4, 4, 1),
        )
    )
    x = image(2, 4, 9, 8)
    changed = repfx.transform(model, ["qarep"], example=x)
    assert sum(len(r.inserted) for r in changed.meta["repfx"].results) == 0
    assert_same(model, repfx.transform(model, ["fuse"], example=x), x, 1e-12)


def test_a_number_that_makes_integers_floats_stays() -> None:
    model = Net(lambda m, x: m.a((x > 0).int() / 1), a=nn.Linear(4, 2)).eval()
    x = torch.randn(2, 4)
    assert_same(model, repfx.transform(model, ["fuse"], example=x), x, 1e-6)
