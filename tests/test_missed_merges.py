"""Merges that were missed: each kind in several spellings, and what looks like it and is declined.

The model's own forward in eval mode, in float64, is the oracle."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import repfx
from repfx.graph import wiring
from repfx.graph.ops import Map
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import KINDS
from repfx.graph.wiring import At, Wiring
from repfx.rewrite.slide import Layout
from repfx.testing import assert_same, randomise


class Net(nn.Module):
    """Holds parts as attributes and runs a function of them and x."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
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


def test_a_number_that_makes_integers_floats_is_no_identity() -> None:
    model = Net(lambda m, x: m.a((x > 0).int() / 1), a=nn.Linear(4, 2)).eval()
    x = torch.randn(2, 4)
    fused = repfx.transform(model, ["fuse"], example=x)
    assert_same(model, fused, x, 1e-6)
    view = GraphView(fused)
    assert [op.kind for op in view.ops.values() if isinstance(op, Map)] == ["scale", "linear"]


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def left_over(model: nn.Module, x: Tensor, *others: Tensor) -> tuple[int, fx.GraphModule]:
    """How many norms `fuse` leaves. The result is right on x and on inputs of other sizes."""
    model = ready(model)
    fused = repfx.transform(model, ["fuse"], example=x)
    for given in (x, *others):
        assert_same(model, fused, given, 1e-11)
    again = repfx.transform(fused, ["fuse"], example=x)
    assert not again.meta["repfx"].merged
    return count(fused, NORMS), fused


class Shared(nn.Module):
    """One batch norm whose value several layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.q, self.k = nn.BatchNorm2d(8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.v = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        tokens = y.flatten(2).transpose(1, 2)
        return torch.softmax(self.q(tokens), 1) * self.k(tokens) + self.v(y).flatten(2).mT


def norm_then(run: Callable[[Any, Tensor], Any], *sizes: int, **parts: Any) -> nn.Module:
    """relu(conv(x)), a batch norm, and what moves the channels before a layer."""
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(sizes) or 2](8)
    return Net(lambda m, x: run(m, m.n(torch.relu(x))), n=norm, **parts)


def linear(i: int = 8, o: int = 5) -> nn.Linear:
    return nn.Linear(i, o)


FORWARD: dict[str, tuple[nn.Module, list[tuple[int, ...]]]] = {
    "pool, flatten": (
        norm_then(
            lambda m, y: m.f(m.p(y).flatten(1)), p=nn.AdaptiveAvgPool2d(1), f=linear()
        ),
        [(2, 8, 6, 5), (3, 8, 4, 7)],
    ),
    "layers": (
        nn.Sequential(
            nn.ReLU(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Dropout(),
            nn.Linear(8, 3),
        ),
        [(2, 8, 6, 5), (1, 8, 3, 3)],
    ),
    "dropout in place": (
        nn.Sequential(
            nn.ReLU(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(inplace=True), nn.Linear(8, 3),
        ),
        [(2, 8, 6, 5)],
    ),
    "mean": (norm_then(lambda m, y: m.f(y.mean((2, 3))), f=linear()), [(2, 8, 6, 5)]),
    "mean of one axis after the other": (
        norm_then(lambda m, y: m.f(y.mean(-1).mean(2)), f=linear()),
        [(2, 8, 6, 5)],
    ),
    "mean that keeps axes, 1x1": (
        norm_then(lambda m, y: m.f(y.mean((2, 3), keepdim=True)), f=nn.Conv2d(8, 3, 1)),
        [(2, 8, 6, 5)],
    ),
    "squeezed": (
        norm_then(
            lambda m, y: m.f(F.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1)), f=linear()
        ),
        [(2, 8, 6, 5)],
    ),
    "viewed, then the mean": (
        norm_then(lambda m, y: m.f(y.view(y.shape[0], 8, -1).mean(-1)), f=linear()),
        [(2, 8, 6, 5), (3, 8, 2, 9)],
    ),
    "tokens": (
        norm_then(lambda m, y: m.f(y.flatten(2).transpose(1, 2)), f=linear()),
        [(2, 8, 6, 5), (3, 8, 2, 9)],
    ),
    "tokens by reshape and permute": (
        norm_then(
            lambda m, y: m.f(y.reshape(y.size(0), y.size(1), -1).permute(0, 2, 1)), f=linear()
        ),
        [(2, 8, 6, 5), (3, 8, 2, 9)],
    ),
    "channels last": (
        norm_then(lambda m, y: m.f(torch.permute(y, (0, 2, 3, 1))), f=linear()),
        [(2, 8, 6, 5), (3, 8, 2, 9)],
    ),
    "one position": (
        norm_then(lambda m, y: m.f(y[:, :, 0, -1]), f=linear()),
        [(2, 8, 6, 5)],
    ),
    "every position has weights of its own": (
        norm_then(lambda m, y: m.f(y.flatten(1)), f=linear(8 * 6)),
        [(2, 8, 3, 2), (1, 8, 6, 1)],
    ),
    "positions first": (
        norm_then(lambda m, y: m.f(y.permute(0, 2, 3, 1).flatten(1)), f=linear(8 * 6)),
        [(2, 8, 3, 2), (1, 8, 6, 1)],
    ),
    "resized": (
        norm_then(lambda m, y: m.f(F.interpolate(y, scale_factor=2)), f=nn.Conv2d(8, 4, 3)),
        [(2, 8, 6, 5)],
    ),
    "a pool with padding that it does not count": (
        norm_then(
            lambda m, y: m.f(m.p(y)),
            p=nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            f=nn.Conv2d(8, 4, 1),
        ),
        [(2, 8, 6, 5)],
    ),
    "mirrored": (
        norm_then(
            lambda m, y: m.f(F.pad(y.flatten(2), (2, 1), "reflect")),
            f=nn.Conv1d(8, 4, 3, groups=2),
        ),
        [(2, 8, 6, 5)],
    ),
    "sequence": (
        norm_then(lambda m, y: m.f(y.mean(2)), 1, f=linear()),
        [(2, 8, 6), (1, 8, 3)],
    ),
    "volume": (
        norm_then(lambda m, y: m.f(y.mean((2, 3, 4))), 1, 1, 1, f=linear()),
        [(2, 8, 3, 4, 2)],
    ),
    "several readers": (Shared(), [(2, 8, 6, 5)]),
    "scales and shifts": (
        Net(
            lambda m, x: m.f((torch.relu(x) * m.s + m.b).mean((2, 3))),
            s=nn.Parameter(torch.rand(8, 1, 1) + 0.5),
            b=nn.Parameter(torch.rand(1, 8, 1, 1)),
            f=linear(),
        ),
        [(2, 8, 6, 5)],
    ),
    "a scale before a padded convolution": (
        Net(
            lambda m, x: m.f(F.interpolate(torch.relu(x) * m.s, scale_factor=2)),
            s=nn.Parameter(torch.rand(8, 1, 1) + 0.5),
            f=nn.Conv2d(8, 4, 3, padding=1),
        ),
        [(2, 8, 6, 5)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD)
def test_a_norm_moves_into_the_layer_after_it(name: str) -> None:
    model, shapes = FORWARD[name]
    left, fused = left_over(model, *(image(*shape) for shape in shapes))
    assert left == 0 and "n:" not in reasons(fused)
    assert not any(n.target in (operator.mul, operator.add) for n in fused.graph.nodes) or (
        name == "several readers"
    )
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in fused.parameters()) < before + sum(
        m.out_features for m in fused.modules() if isinstance(m, nn.Linear)
    )


STAYS: dict[str, tuple[nn.Module, str]] = {
    "a ReLU": (
        norm_then(lambda m, y: m.f(torch.relu(y).mean((2, 3))), f=linear()),
        "it cannot move behind 'relu_1', which reads it",
    ),
    "a maximum": (
        norm_then(lambda m, y: m.f(F.adaptive_max_pool2d(y, 1).flatten(1)), f=linear()),
        "it cannot move behind 'adaptive_max_pool2d'",
    ),
    "a mean over channels": (
        norm_then(lambda m, y: m.f(y.mean(1)), f=linear(8, 4)),
        "it cannot move behind 'mean'",
    ),
    "zeros around the image": (
        norm_then(lambda m, y: m.f(y), f=nn.Conv2d(8, 4, 3, padding=1)),
        "bn 'n' has a bias and conv 3x3 'f' pads with zeros",
    ),
    "zeros around the pool": (
        norm_then(lambda m, y: m.f(F.avg_pool2d(y, 3, 1, 1)), f=nn.Conv2d(8, 4, 1)),
        "bn 'n' has a bias and 'avg_pool2d' pads with zeros",
    ),
    "the linear layer runs over positions": (
        norm_then(lambda m, y: m.f(y), f=linear(8, 4)),
        "maps over different axes",
    ),
    "channels and positions mixed": (
        norm_then(lambda m, y: m.f(y.reshape(y.size(0), -1, 8)), f=linear()),
        "it cannot move behind 'reshape'",
    ),
    "an axis that happens to have size one": (
        norm_then(lambda m, y: m.f(y[:, :, :, :1].squeeze(3).mT), f=linear()),
        "it cannot move behind 'squeeze'",
    ),
    "another reader": (
        norm_then(lambda m, y: m.f(y.mean((2, 3))) + y.sum((1, 2, 3))[:, None], f=linear()),
        "it cannot move behind 'sum_1'",
    ),
    "a result of the model": (
        norm_then(lambda m, y: (m.f(y.mean((2, 3))), y), f=linear()),
        "it is a result of the model",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_norm_that_cannot_move_stays(name: str) -> None:
    model, reason = STAYS[name]
    x = image(2, 8, 8, 8)
    left, fused = left_over(model, x)
    assert left == 1 and reason in reasons(fused), reasons(fused)


def test_what_is_changed_in_place_stays() -> None:
    def before(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        z = m.n(y)
        y += 1
        return m.f(z.mean((2, 3))) + y.mean((1, 2, 3))[:, None]

    def after(m: Any, x: Tensor) -> Tensor:
        z = m.n(torch.relu(x))
        z[:, 0] = 1
        return m.f(z.mean((2, 3)))

    for run in (before, after):
        left, _ = left_over(Net(run, n=nn.BatchNorm2d(8), f=linear()), image(2, 8, 6, 5))
        assert left == 1


BACKWARD: dict[str, tuple[nn.Module, list[tuple[int, ...]]]] = {}


def then_norm(
    name: str, run: Callable[[Any, Tensor], Tensor], *shapes: tuple[int, ...], **parts: Any
) -> None:
    BACKWARD[name] = Net(run, **parts), list(shapes)


LINEAR = {"f": nn.Linear(6, 8, bias=False), "n": nn.BatchNorm1d(8)}
CONV = {"f": nn.Conv2d(4, 8, 3), "n": nn.BatchNorm1d(8)}
then_norm(
    "flatten, reshape_as",
    lambda m, x: m.n((y := m.f(x)).flatten(0, 1)).reshape_as(y),
    (2, 5, 6), (3, 4, 6), **LINEAR,
)  # fmt: skip
then_norm(
    "flatten, view",
    lambda m, x: m.n((y := m.f(x)).flatten(0, 1)).view(y.shape).relu(),
    (2, 5, 6), (3, 4, 6), **LINEAR,
)  # fmt: skip
then_norm(
    "view to rows",
    lambda m, x: m.n(m.f(x).view(-1, 8)).view(x.shape[0], -1, 8).relu(),
    (2, 5, 6), (3, 4, 6), **LINEAR,
)  # fmt: skip
then_norm(
    "reshape by sizes",
    lambda m, x: m.n(m.f(x).reshape(x.shape[0] * x.shape[1], 8)).relu(),
    (2, 5, 6), (3, 4, 6), **LINEAR,
)  # fmt: skip
then_norm(
    "four axes", lambda m, x: m.n(m.f(x).flatten(0, 2)).relu(), (2, 5, 3, 6), **LINEAR
)  # fmt: skip
then_norm(
    "heads", lambda m, x: m.n(m.f(x).flatten(1, 2).transpose(1, 2)), (2, 5, 3, 6), **LINEAR
)  # fmt: skip
then_norm("conv, tokens", lambda m, x: m.n(m.f(x).flatten(2)).relu(), (2, 4, 6, 5), **CONV)
then_norm(
    "conv, pool, neck",
    lambda m, x: m.n(F.adaptive_avg_pool2d(m.f(x), 1).flatten(1)).relu(),
    (2, 4, 6, 5), **CONV,
)  # fmt: skip
then_norm("conv, mean, neck", lambda m, x: m.n(m.f(x).mean((2, 3))), (2, 4, 6, 5), **CONV)
then_norm(
    "squeezed neck",
    lambda m, x: m.n(m.f(x).mean((2, 3), True).squeeze(3).squeeze(2)),
    (2, 4, 6, 5), **CONV,
)  # fmt: skip
then_norm(
    "conv, upsampled",
    lambda m, x: m.n(F.interpolate(m.f(x), scale_factor=2, mode="bilinear")).relu(),
    (2, 4, 6, 5), f=nn.Conv2d(4, 8, 3), n=nn.BatchNorm2d(8),
)  # fmt: skip
then_norm(
    "flattened features of a 1x1 map",
    lambda m, x: m.n(F.adaptive_avg_pool2d(m.f(x), 1).flatten(1)).relu(),
    (2, 4, 6, 5), f=nn.Conv2d(4, 8, 3, groups=2), n=nn.BatchNorm1d(8),
)  # fmt: skip


@pytest.mark.parametrize("name", BACKWARD)
def test_a_norm_moves_into_the_layer_before_it(name: str) -> None:
    model, shapes = BACKWARD[name]
    left, fused = left_over(model, *(image(*shape) for shape in shapes))
    assert left == 0 and not reasons(fused)


BEHIND: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "over tokens": (
        Net(lambda m, x: m.n(m.f(x).relu().flatten(2)), f=linear(6, 8), n=nn.BatchNorm1d(5)),
        (2, 5, 6, 6),
        "no convolution leads to it",
    ),
    "another axis": (
        Net(lambda m, x: m.n(m.f(x).flatten(2)), f=linear(6, 8), n=nn.BatchNorm1d(5)),
        (2, 5, 3, 6),
        "its channels are not those of linear 'f'",
    ),
    "one number per position": (
        Net(lambda m, x: m.n(m.f(x).flatten(1)), f=nn.Conv2d(4, 8, 3), n=nn.BatchNorm1d(16)),
        (2, 4, 3, 4),
        "its channels are not those of conv 3x3 'f'",
    ),
    "read before the norm": (
        Net(
            lambda m, x: m.n((y := m.f(x)).flatten(0, 1)).reshape_as(y) + y.softmax(-1),
            f=linear(6, 8),
            n=nn.BatchNorm1d(8),
        ),
        (2, 5, 6),
        "linear 'f' before it is also read elsewhere",
    ),
    "an axis that happens to have size one": (
        Net(lambda m, x: m.n(m.f(x).squeeze(3)), f=nn.Conv2d(4, 8, 3), n=nn.BatchNorm1d(8)),
        (2, 4, 6, 3),
        "its channels are not those of conv 3x3 'f'",
    ),
    "a padded pool": (
        Net(
            lambda m, x: m.n(F.avg_pool2d(m.f(x).flatten(2)[..., None], 3, 1, 1)),
            f=nn.Conv2d(4, 8, 3),
            n=nn.BatchNorm2d(8),
        ),
        (2, 4, 6, 5),
        "avg_pool2d: not merged with 'n'",
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_norm_after_something_else_stays(name: str) -> None:
    model, shape, reason = BEHIND[name]
    left, fused = left_over(model, image(*shape))
    assert left == 1 and reason in reasons(fused), reasons(fused)


def two(**options: Any) -> dict[str, nn.Module]:
    return {
        "a": nn.Conv2d(4, 4, 3, padding=1, **options),
        "b": nn.Conv2d(4, 4, 5, padding=2, **options),
    }


def twice(y: Tensor) -> Tensor:
    """Read by two, so that no region leads through the norm."""
    return y + torch.sigmoid(y) * y


JOINED: dict[str, nn.Module] = {
    "two kernels": Net(
        lambda m, x: twice(m.n(torch.cat([m.a(x), m.b(x)], 1))), **two(), n=nn.BatchNorm2d(8)
    ),
    "depthwise": Net(
        lambda m, x: twice(m.n(torch.cat([m.a(x), m.b(x)], 1))),
        **two(groups=4, bias=False),
        n=nn.BatchNorm2d(8),
    ),
    "different sources": Net(
        lambda m, x: torch.relu(m.n(torch.cat((m.a(torch.relu(x)), m.b(x)), dim=1))),
        **two(),
        n=nn.BatchNorm2d(8),
    ),
    "a concatenation of a concatenation": Net(
        lambda m, x: torch.relu(
            m.n(torch.concat([m.a(x.relu()), torch.cat([m.b(x), m.c(x.sigmoid())], -3)], dim=1))
        ),
        **two(),
        c=nn.Conv2d(4, 6, 1),
        n=nn.BatchNorm2d(14),
    ),
    "joined along the rows": Net(
        lambda m, x: torch.relu(m.n(torch.cat([m.a(x.relu()), m.b(x)], 2))),
        **two(),
        n=nn.BatchNorm2d(4),
    ),
    "a sum of different sources": Net(
        lambda m, x: torch.relu(m.n(m.a(x.relu()) - m.b(x))), **two(), n=nn.BatchNorm2d(4)
    ),
    "pooled, then joined": Net(
        lambda m, x: m.n(torch.cat([m.a(x.relu()).mean((2, 3)), m.b(x).mean((2, 3))], 1)),
        **two(),
        n=nn.BatchNorm1d(8),
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_norm_moves_into_all_that_is_joined(name: str) -> None:
    left, fused = left_over(JOINED[name], image(2, 4, 7, 6), image(1, 4, 5, 8))
    assert left == 0
    assert not any("n:" in r for r in reasons(fused).split(" | "))


APART: dict[str, tuple[nn.Module, str]] = {
    "one part is no layer": (
        Net(
            lambda m, x: torch.relu(m.n(torch.cat([m.a(x), m.b(x).relu()], 1))),
            **two(),
            n=nn.BatchNorm2d(8),
        ),
        "no convolution leads to it",
    ),
    "one part is read elsewhere": (
        Net(
            lambda m, x: m.n(torch.cat([y := m.a(x.relu()), m.b(x)], 1)).relu()[:, :4] * y,
            **two(),
            n=nn.BatchNorm2d(8),
        ),
        "'a' before it is also read elsewhere",
    ),
    "one part twice": (
        Net(
            lambda m, x: torch.relu(m.n(torch.cat([y := m.a(x.relu()), m.b(x), y], 1))),
            **two(),
            n=nn.BatchNorm2d(12),
        ),
        "'a' before it is also read elsewhere",
    ),
    "a sum that spreads one of its values": (
        Net(
            lambda m, x: torch.relu(m.n(m.a(x.relu()) + m.c(x))),
            **two(),
            c=nn.Conv2d(4, 1, 1),
            n=nn.BatchNorm2d(4),
        ),
        "its channels are not those of conv 1x1 'c'",
    ),
}


@pytest.mark.parametrize("name", APART)
def test_a_norm_of_more_than_layers_stays(name: str) -> None:
    model, reason = APART[name]
    left, fused = left_over(model, image(2, 4, 7, 6))
    assert left == 1 and reason in reasons(fused), reasons(fused)


def test_bnfold_moves_norms_too_and_not_through_branches() -> None:
    model, x = ready(FORWARD["pool, flatten"][0]), image(2, 8, 6, 5)
    folded = repfx.transform(model, ["bnfold"], example=x)
    assert count(folded, NORMS) == 0
    assert_same(model, folded, x, 1e-11)
    model = ready(JOINED["two kernels"])
    assert count(repfx.transform(model, ["bnfold"], example=image(2, 4, 7, 6)), NORMS) == 1


def test_a_head_that_is_called_twice_keeps_its_other_call() -> None:
    model = Net(
        lambda m, x: m.f(m.n(x.relu()).mean((2, 3))) * m.f(x.mean((2, 3))),
        n=nn.BatchNorm2d(8),
        f=linear(),
    )
    left, fused = left_over(model, image(2, 8, 6, 5))
    assert left == 0 and count(fused, nn.Linear) == 2


def test_inspect_says_what_fuse_does() -> None:
    model, x = ready(JOINED["two kernels"]), image(2, 4, 7, 6)
    found = repfx.inspect(model, example=x)
    assert [(r.ops, r.merged) for r in found.regions if r.name == "n"] == [
        (("bn", "conv 3x3", "conv 5x5"), "part of a, b")
    ]
    assert not any(d.where == "n" for d in found.declined)


SIZED: dict[str, nn.Module] = {
    "by name": Net(
        lambda m, x: m.n(m.f(x, output_size=[13, 11])),
        f=nn.ConvTranspose2d(4, 6, 3, 2, 1),
        n=nn.BatchNorm2d(6),
    ),
    "by place": Net(
        lambda m, x: m.n(m.f(x, (14, 12))).relu(),
        f=nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, bias=False),
        n=nn.BatchNorm2d(6),
    ),
    "that of another value": Net(
        lambda m, x: m.n(m.f(m.d(x).relu(), output_size=x.shape[2:])) + x,
        d=nn.Conv2d(4, 4, 3, 2, 1),
        f=nn.ConvTranspose2d(4, 4, 3, 2, 1, dilation=1),
        n=nn.BatchNorm2d(4),
    ),
    "behind a concatenation": Net(
        lambda m, x: m.n(torch.cat([m.f(x, output_size=[14, 12]), m.g(x.relu())], 1)),
        f=nn.ConvTranspose2d(4, 3, 3, 2, 1),
        g=nn.ConvTranspose2d(4, 2, 2, 2),
        n=nn.BatchNorm2d(5),
    ),
}


@pytest.mark.parametrize("name", SIZED)
def test_a_norm_after_a_transposed_convolution_of_a_given_size(name: str) -> None:
    left, fused = left_over(SIZED[name], image(2, 4, 7, 6))
    assert left == 0 and "n:" not in reasons(fused)


def test_a_transposed_convolution_of_a_given_size_that_is_called_twice() -> None:
    model = Net(
        lambda m, x: m.n(m.f(x, output_size=[13, 11])).relu() + m.f(x, output_size=[13, 11]),
        f=nn.ConvTranspose2d(4, 6, 3, 2, 1),
        n=nn.BatchNorm2d(6),
    )
    left, fused = left_over(model, image(2, 4, 7, 6))
    assert left == 0 and count(fused, nn.ConvTranspose2d) == 2


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 2, padding="same"),
        nn.Conv2d(4, 6, (4, 1), padding="same", groups=2),
        nn.Conv2d(4, 6, (2, 6), padding="same", dilation=(3, 1), bias=False),
        nn.Conv3d(4, 6, (2, 3, 4), padding="same"),
        nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"),
    ],
)
def test_a_norm_after_an_even_kernel(layer: Any) -> None:
    dims = len(layer.kernel_size)
    norm = NORMS[dims - 1](6)
    left, fused = left_over(nn.Sequential(layer, norm), image(2, 4, *(9, 8, 7)[:dims]))
    assert left == 0 and not reasons(fused)


def trained(model: nn.Module, x: Tensor, bn: str = "batch") -> tuple[int, Any]:
    """repq in float trains what the model trains; how many norms it leaves once it is fused."""
    model = ready(model)
    result = repfx.transform(model, [f"repq(bits=32, bn={bn})"], example=x)
    assert_same(model, result, x, 1e-11)
    plain, merged = copy.deepcopy(model).train(), copy.deepcopy(result).train()
    for _ in range(2):
        want, got = plain(x), merged(x)
        if bn in ("batch", "frozen"):
            assert float((want - got).detach().abs().amax()) < 1e-9
    for key, value in plain.state_dict().items():
        if "running_" in key and bn == "batch":
            assert float((merged.state_dict()[key] - value).detach().abs().amax()) < 1e-9, key
    plain.load_state_dict({k: merged.state_dict()[k] for k in plain.state_dict()})
    assert_same(plain.eval(), merged.eval(), x, 1e-9)
    fused = repfx.transform(merged.eval(), ["fuse"], example=x)
    assert_same(plain, fused, x, 1e-9)
    return count(fused, NORMS), result


TRAINED: dict[str, nn.Module] = {
    "a norm is read by a skip": Net(
        lambda m, x: (y := m.a(x)) + F.gelu(m.b(y)), a=conv_bn(4, 6, 1), b=conv_bn(6, 6, 1)
    ),
    "two skips": Net(
        lambda m, x: torch.sigmoid(y := m.a(x)) * (z := m.b(y)) + m.c(z),
        a=conv_bn(4, 4, 1),
        b=conv_bn(4, 4, 1),
        c=conv_bn(4, 4, 1),
    ),
    "a norm alone is read by a skip": Net(
        lambda m, x: F.gelu(m.b(y := m.n(m.a(x)))) + y,
        a=nn.Conv2d(4, 4, 3, padding=1),
        n=nn.BatchNorm2d(4),
        b=conv_bn(4, 4, 1),
    ),
}


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("name", TRAINED)
def test_repq_merges_the_parts_of_what_it_cannot_merge_whole(name: str, bn: str) -> None:
    left, result = trained(TRAINED[name], image(3, 4, 7, 6), bn)
    assert left == 0 and not result.meta["repfx"].declined


def test_repq_says_which_norm_stays() -> None:
    model = Net(
        lambda m, x: F.gelu(m.n((y := m.a(x)) + m.b(x))) * y,
        a=conv_bn(4, 4, 3),
        b=conv_bn(4, 4, 1),
        n=nn.BatchNorm2d(4),
    )
    left, _ = trained(model, image(3, 4, 7, 6))
    assert left == 1 and count(repfx.transform(ready(model), ["fuse"]), NORMS) == 1
    model = Net(
        lambda m, x: F.relu(m.n(m.a(x))) + F.relu(m.n(m.b(x))),
        a=nn.Conv2d(4, 4, 3),
        b=nn.Conv2d(4, 4, 3),
        n=nn.BatchNorm2d(4),
    )
    result = repfx.transform(ready(model), ["repq"], example=image(2, 4, 7, 6))
    assert {d.reason for d in result.meta["repfx"].declined} == {
        "a batch norm inside it is called more than once"
    }


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.3)


def five(m: Any) -> Tensor:
    """The 5x5 kernel of a 3x3 one after another."""
    return F.conv2d(m.a.transpose(0, 1), m.b.flip(2, 3), padding=2).transpose(0, 1)


WEIGHTS: dict[str, nn.Module] = {
    "3x3 after 3x3": Net(
        lambda m, x: torch.relu(m.n(F.conv2d(x, five(m), padding=2))),
        a=param(4, 3, 3, 3),
        b=param(8, 4, 3, 3),
        n=nn.BatchNorm2d(8),
    ),
    "without a norm": Net(
        lambda m, x: torch.relu(F.conv2d(x, five(m), m.c, padding=2)),
        a=param(4, 3, 3, 3),
        b=param(8, 4, 3, 3),
        c=param(8),
    ),
    "a product of matrices": Net(
        lambda m, x: torch.relu(m.n(F.linear(x.mean((2, 3)), F.linear(m.b, m.a.t())))),
        a=param(4, 3),
        b=param(8, 4),
        n=nn.BatchNorm1d(8),
    ),
    "transposed": Net(
        lambda m, x: torch.relu(m.n(F.conv2d(x, F.conv_transpose2d(m.b, m.a), padding=2))),
        a=param(4, 3, 3, 3),
        b=param(8, 4, 3, 3),
        n=nn.BatchNorm2d(8),
    ),
    "of a convolution of weights": Net(
        lambda m, x: torch.relu(m.n(F.conv2d(x, F.conv2d(F.conv2d(m.a, m.b), m.c)))),
        a=param(8, 4, 3, 3),
        b=param(5, 4, 1, 1),
        c=param(3, 5, 1, 1),
        n=nn.BatchNorm2d(8),
    ),
    "read by two": Net(
        lambda m, x: (
            torch.relu(m.n(F.conv2d(x, (w := F.conv2d(m.a, m.b))))) * F.conv2d(x, w * 2).sigmoid()
        ),
        a=param(8, 4, 3, 3),
        b=param(3, 4, 1, 1),
        n=nn.BatchNorm2d(8),
    ),
}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_made_of_weights_are_folded_after_training(name: str, bits: int) -> None:
    model, x = ready(WEIGHTS[name]), image(2, 3, 9, 8)
    fused = repfx.transform(model, ["fuse"], example=x)
    assert_same(model, fused, x, 1e-10)
    result = repfx.transform(model, [f"repq(bits={bits})"], example=x).train()
    result(x)
    deployed = repfx.transform(result.eval(), ["fuse"], example=x)
    assert_same(result, deployed, x, 1e-10)
    for net in (fused, deployed):
        held = {k.rpartition(".")[2] for k in net.state_dict()}
        assert held <= {"weight", "bias", "scale", "log_ratio"}, held
        layers = [n for n in net.graph.nodes if n.target in (F.conv2d, F.linear)]
        assert all(n.args[0].op != "get_attr" for n in layers)


def test_a_layer_of_weights_beside_the_input_stays_a_layer() -> None:
    model = ready(
        Net(
            lambda m, x: F.conv2d(x * F.linear(m.a, m.b).sum(), m.c * 2),
            a=param(3, 4),
            b=param(2, 4),
            c=param(8, 3, 3, 3),
        )
    )
    x = image(2, 3, 9, 8)
    assert_same(model, repfx.transform(model, ["fuse"], example=x), x, 1e-10)


def back(y: Tensor) -> Tensor:
    return y.permute(0, 3, 1, 2)


# A layer of channels last, and a norm of channels first behind it: a region whose layout turns.
TURNED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "images": (
        Net(
            lambda m, x: m.n(back(m.v(torch.relu(x.permute(0, 2, 3, 1))))),
            v=nn.Linear(6, 5, bias=False),
            n=nn.BatchNorm2d(5),
        ),
        (4, 6, 3, 7),
    ),
    "as many rows as channels": (
        Net(
            lambda m, x: m.n(back(m.v(torch.relu(x.permute(0, 2, 3, 1))))),
            v=nn.Linear(6, 6),
            n=nn.BatchNorm2d(6),
        ),
        (4, 6, 6, 7),
    ),
    "two layers": (
        Net(
            lambda m, x: m.n(back(m.w(m.v(torch.relu(x))))),
            v=nn.Linear(7, 9),
            w=nn.Linear(9, 2),
            n=nn.BatchNorm2d(2),
        ),
        (4, 6, 6, 7),
    ),
    "tokens": (
        Net(
            lambda m, x: m.n(m.v(torch.relu(x)).transpose(1, 2)).relu(),
            v=nn.Linear(6, 5),
            n=nn.BatchNorm1d(5),
        ),
        (4, 6, 6),
    ),
    "a sum": (
        Net(
            lambda m, x: m.n(back((y := torch.relu(x)) + m.v(y))),
            v=nn.Linear(6, 6),
            n=nn.BatchNorm2d(6),
        ),
        (4, 6, 5, 6),
    ),
    "a norm of the input": (
        Net(
            lambda m, x: back(m.v(m.n(back(torch.relu(x))).permute(0, 2, 3, 1))),
            v=nn.Linear(6, 6),
            n=nn.BatchNorm2d(6),
        ),
        (4, 6, 5, 6),
    ),
}


@pytest.mark.parametrize("bn", ["running", "estimate", "estimate_paper", "sampled", "batch"])
@pytest.mark.parametrize("name", TURNED)
def test_repq_measures_a_norm_behind_channels_last_over_its_channels(name: str, bn: str) -> None:
    model, shape = TURNED[name]
    model, x = ready(model), image(*shape)
    x = (x + image(*shape[1:])) * image(*shape[1:])  # no two positions are alike
    result = repfx.transform(model, [f"repq(bits=32, bn={bn})"], example=x)
    assert not result.meta["repfx"].declined
    plain, merged = copy.deepcopy(model).train(), result.train()
    want, got = plain(x), merged(x)
    state, kept = merged.state_dict(), plain.state_dict()
    assert torch.allclose(state["n.running_mean"], kept["n.running_mean"], rtol=1e-9, atol=1e-12)
    if bn in ("running", "sampled", "batch"):
        near = 0.3 if bn == "sampled" else 1e-9  # it leaves out the correction for the batch's size
        assert torch.allclose(state["n.running_var"], kept["n.running_var"], rtol=near)
    if bn == "batch":
        assert torch.allclose(want, got, rtol=1e-9, atol=1e-9)
    deployed = repfx.transform(merged.eval(), ["fuse"], example=x)
    assert_same(merged, deployed, x, 1e-9)
    assert count(deployed, NORMS) == 0


def sizes_of(v: Any) -> tuple[Any, ...] | None:
    return tuple(v.shape) if isinstance(v, Tensor) else None


CALLS: dict[str, list[tuple[Any, ...]]] = {
    "identity": [()],
    "clone": [()],
    "avgpool": [(2,), (3, 2, 1, False, False), (2, 2, 0, True), (3, 1, 1)],
    "average": [(1,), ((2, 3),), ((2, 3), True), (-1, True), (2,), ((3, 2),)],
    "pad": [((1, 2),), ((1, 2), "reflect"), ((-1, 0, 0, -1),), ((1, 1), "constant", 2.0)],
    "getitem": [((slice(None), slice(1, 3)),), ((..., 0),), ((0, slice(None), 1),)],
    "slice": [(1, 0, 2), (3, 1, 5, 2)],
    "narrow": [(2, 0, 2)],
    "index_select": [(1, torch.tensor([1, 0]))],
    "flip": [([2],), ([1, 3],)],
    "permute": [((0, 2, 3, 1),), ((3, 1, 0, 2),)],
    "transpose": [(1, 2), (-1, 0)],
    "movedim": [(1, -1), ((0, -2), (2, 1))],
    "flatten": [(), (1,), (1, 2), (2, -1), (0, 1)],
    "reshape": [
        ((2, 4, 30),),
        ((2, -1),),
        ((-1, 5),),
        ((8, 6, 5),),
        ((2, 4, 3, 10),),
        (-1,),
        (image(2, 4, 30),),
    ],
    "squeeze": [(1,), (-1,), (0,)],
    "resize": [
        ((12, 10),),
        (None, 2),
        ([12], False),
        ([12, 10], False),
        ([9, 7, 4], False),
        ([9],),
    ],
}
# A squeeze moves an affine only if an axis is known to have size one.
WIRED = [r for r in KINDS if r.spelled and r.wiring not in (None, wiring.squeeze)]


def called(row: Any) -> Iterator[tuple[Callable[..., Tensor], tuple[Any, ...], Tensor, Wiring]]:
    """The calls of a row that run, on values of three ranks, with their wiring."""
    shapes = ((2, 4, 6), (2, 4, 6, 5), (2, 4, 6, 5, 3))
    for spelling, rest, shape in itertools.product(row.spelled, CALLS[row.name], shapes):
        run = getattr(Tensor, spelling) if isinstance(spelling, str) else spelling
        name, x = str(getattr(spelling, "__name__", spelling)), image(*shape)
        if name.split(".")[0].endswith("_") or name.endswith(("out", "Dimname", "dtype")):
            continue
        at = At(len(shape), lambda v: v if v >= 0 else None, sizes_of)
        try:
            y, wired = run(x.clone(), *rest), row.wiring(at, x, *rest)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            continue  # arguments of another spelling
        if wired is not None and isinstance(y, Tensor) and not wired.needs:
            rank = y.dim()
            assert len(wired.sources) == rank, (spelling, rest)
            yield run, rest, x, wired


@pytest.mark.parametrize("row", WIRED, ids=lambda row: row.name)
def test_an_affine_moves_as_the_wiring_of_a_row_says(row: Any) -> None:
    """On every axis of x: the operator on scale * x + shift, and the affine moved behind it."""
    moved = 0
    for run, rest, x, wired in called(row):
        for axis, shifts in itertools.product(range(x.dim()), (False, True)):
            after = Layout(x.dim(), (axis,), shifts=shifts).through(wired)
            if after is None or (after.outer and after.inner):
                continue
            n, (at,), y = x.shape[axis], after.axes, run(x, *rest)
            scale, shift = image(n) + 3, image(n) * shifts
            shape = [n if i == axis else 1 for i in range(x.dim())]
            got = run(x * scale.reshape(shape) + shift.reshape(shape), *rest)
            m = y.shape[at]
            rows = [i // (m // n) if after.inner else i % n for i in range(m)]
            shape = [-1 if i == at else 1 for i in range(y.dim())]
            want = y * scale[rows].reshape(shape) + shift[rows].reshape(shape)
            assert torch.allclose(want, got, rtol=1e-9, atol=1e-9), (rest, axis)
            moved += 1
    assert moved


def test_a_scale_that_makes_several_channels_of_one_stays() -> None:
    model = ready(
        Net(
            lambda m, x: m.f((torch.relu(x) * m.s).mean((2, 3))),
            s=nn.Parameter(torch.rand(8, 1, 1) + 0.5),
            f=linear(),
        )
    )
    x = image(2, 1, 6, 5)
    fused = repfx.transform(model, ["fuse"], example=x)
    assert_same(model, fused, x, 1e-11)
    assert "s" in fused.state_dict()


@pytest.mark.parametrize("name", ["pool, flatten", "tokens", "positions first"])
def test_the_norm_of_an_exported_program_moves(name: str) -> None:
    model, shapes = FORWARD[name]
    model, x = ready(model), image(*shapes[0])
    fused = repfx.transform(torch.export.export(model, (x,)), ["fuse"], example=x)
    assert_same(model, fused, x, 1e-11)
    assert not any("batch_norm" in str(n.target) for n in fused.graph.nodes)
