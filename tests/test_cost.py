"""What a merge costs: kernels stay sparse, and parameters grow only where that saves work."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repfx
from repfx.algebra import Axis, Geometry, Kernel
from repfx.errors import Inexact
from repfx.rewrite.results import Report


class Largest(TorchDispatchMode):
    """Notes the number of values of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for v in torch.utils._pytree.tree_leaves(out):
            if isinstance(v, Tensor):
                self.found = max(self.found, v.untyped_storage().nbytes() // v.element_size())
        return out


def fused(model: nn.Module, x: Tensor) -> tuple[nn.Module, Report, int]:
    """The fused model, its report, and the size of the largest tensor, after a comparison."""
    model = model.eval()
    with Largest() as largest:
        result = repfx.transform(model, ["fuse"], example=x)
    with torch.no_grad():
        want, got = model(x), result(x)
    assert float((want - got).abs().amax()) <= 1e-5 * float(want.abs().amax())
    return result, result.meta["repfx"], largest.found


def convs(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d))]


class Branches(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum(b(x) for b in self.branches))


def dilated(c: int, d: int, **options: Any) -> nn.Module:
    return nn.Conv2d(c, c, 3, padding=d, dilation=d, bias=False, **options)


DILATED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "norm": (lambda: nn.Sequential(dilated(16, 36), nn.BatchNorm2d(16)), (3, 3), (36, 36)),
    "branches": (
        lambda: Branches(dilated(16, 24), dilated(16, 24), nn.Conv2d(16, 16, 1)),
        (3, 3),
        (24, 24),
    ),
    "chain": (
        lambda: nn.Sequential(
            nn.Conv2d(16, 32, 1, bias=False), dilated(32, 30), nn.BatchNorm2d(32)
        ),
        (3, 3),
        (30, 30),
    ),
    "one axis": (
        lambda: nn.Sequential(
            nn.Conv2d(16, 16, (3, 3), padding=(1, 40), dilation=(1, 40)), nn.BatchNorm2d(16)
        ),
        (3, 3),
        (1, 40),
    ),
    "multiples": (
        lambda: nn.Sequential(
            nn.Conv2d(16, 16, 3, dilation=18, groups=16, padding=36),
            nn.Conv2d(16, 16, (2, 1), dilation=(36, 1), groups=16),
        ),
        (5, 3),
        (18, 18),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(16, 16, 3, dilation=31, padding=31), nn.BatchNorm2d(16)
        ),
        (3, 3),
        (31, 31),
    ),
}


@pytest.mark.parametrize("kind", DILATED)
def test_a_dilated_kernel_keeps_its_dilation(kind: str) -> None:
    build, taps, dilation = DILATED[kind]
    model = build()
    result, report, largest = fused(model, torch.randn(1, 16, 5, 6))
    wide = max(c.in_channels for c in convs(model))
    assert largest < 2 * wide * 9 * (dilation[0] + 4) * (dilation[1] + 4)  # the columns of a proof
    if kind == "multiples":  # 5x3 taps in place of 3x3 and 2x1: more work
        assert not report.merged
        return
    assert len(report.merged) == 1
    (conv,) = convs(result)
    assert (conv.kernel_size, conv.dilation) == (taps, dilation)
    again = repfx.inspect(model, example=torch.randn(1, 16, 5, 6)).regions
    assert all(r.params_after <= r.params_before for r in again)


@pytest.mark.parametrize("pair", [(36, 1), (30, 29), (12, 18)], ids=str)
def test_two_dilations_are_weighed_before_a_kernel_is_made(pair: tuple[int, int]) -> None:
    a, b = pair
    model = Branches(
        nn.Sequential(dilated(8, a), nn.BatchNorm2d(8)),
        nn.Sequential(dilated(8, b), nn.BatchNorm2d(8)),
    )
    result, report, largest = fused(model, torch.randn(1, 8, 6, 6))
    assert [c.dilation for c in convs(result)] == [(a, a), (b, b)]
    assert any("multiply-accumulates" in d.reason for d in report.declined)
    assert largest < 2 * 8 * 9 * (a + 2) ** 2  # the columns of a proof, and no 73x73 kernel


def test_two_dilations_merge_where_that_saves_work() -> None:
    """5x5 has the taps of 3x3 with dilation 2: together they take 25 instead of 34."""
    model = Branches(dilated(8, 2), nn.Conv2d(8, 8, 5, padding=2))
    result, report, _ = fused(model, torch.randn(1, 8, 9, 10))
    assert [(c.kernel_size, c.dilation) for c in convs(result)] == [((5, 5), (1, 1))]
    assert len(report.merged) == 1


def test_a_program_trains_a_dilated_kernel() -> None:
    model = Branches(
        nn.Sequential(dilated(8, 9), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)),
    )
    x = torch.randn(4, 8, 12, 13)
    for bn in ("running", "estimate", "batch"):
        trained = repfx.transform(model.train(), [f"repq(bits=32, bn={bn})"], example=x)
        trained(x).sum().backward()
        assert trained.get_parameter("branches.0.0.weight").grad is not None
        assert any(n.args[5] == (9, 9) for n in trained.graph.nodes if len(n.args) == 7)
    want = repfx.transform(model.eval(), ["fuse"], example=x)(x)
    got = repfx.transform(model.eval(), ["repq(bits=32)"], example=x)(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def depthwise(c: int, k: int) -> nn.Module:
    return nn.Conv2d(c, c, k, padding=k // 2, groups=c)


class Halves(nn.Module):
    """One depthwise layer, its two halves scaled apart, and joined again."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(c, c, 7, groups=c, bias=False), nn.BatchNorm2d(c)
        self.b, self.c = depthwise(c // 2, 1), depthwise(c // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.norm(self.a(x)).chunk(2, 1)
        return torch.relu(torch.cat([self.b(u), self.c(v)], 1))


class Pieces(nn.Module):
    """Each piece of the channels has a depthwise layer of its own."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([depthwise(c // 8, 7) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(
            torch.cat([f(p) for f, p in zip(self.parts, x.chunk(8, 1), strict=True)], 1)
        )


class Sum(nn.Module):
    """The two halves of a concatenation are added."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = depthwise(c, 7), depthwise(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.cat([self.a(x), self.b(x)], 1).split(self.a.out_channels, 1)
        return torch.relu(u + v)


class Turned(nn.Module):
    """The channels are turned around twice, with scales in between."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = depthwise(c, 7), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.a(x).flip(1)).flip(1))


@pytest.mark.parametrize("kind", [Halves, Pieces, Sum, Turned])
def test_depthwise_kernels_stay_depthwise(kind: type[nn.Module]) -> None:
    channels = 1024
    model, x = kind(channels), torch.randn(1, channels, 8, 9)
    repfx.transform(kind(16).eval(), ["fuse"], example=x[:, :16])  # imports are not timed
    start = time.process_time()
    result, report, largest = fused(model, x)
    assert time.process_time() - start < 4
    (conv,) = convs(result)
    assert conv.groups == channels and conv.kernel_size == (7, 7) and len(report.merged) == 1
    assert largest <= 8 * channels * 49


class Joined(nn.Module):
    """Two dense layers side by side: their links are as large as their weights."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.norm = nn.BatchNorm2d(2 * c)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))


def test_dense_layers_side_by_side_are_cheap_too() -> None:
    fused(Joined(16), torch.randn(1, 16, 5, 5))
    start = time.process_time()
    _, report, largest = fused(Joined(1024), torch.randn(1, 1024, 5, 5))
    assert len(report.merged) == 1 and time.process_time() - start < 2
    assert largest <= 2 * 1024 * 1024


class Pooled(nn.Module):
    def __init__(self, conv: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.pool(self.conv(x)))


POOLED = {
    "1x1": Pooled(nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2)),
    "norm": Pooled(nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)), nn.AvgPool2d(3, 3)),
    "grouped": Pooled(nn.Conv2d(16, 8, (1, 2), groups=4), nn.AvgPool2d((2, 1), (2, 1))),
}


@pytest.mark.parametrize("kind", POOLED)
def test_parameters_do_not_grow_for_nothing(kind: str) -> None:
    model, x = POOLED[kind].eval(), torch.randn(2, 16, 12, 12)
    result, report, _ = fused(model, x)
    assert sum(p.numel() for p in result.parameters()) <= sum(p.numel() for p in model.parameters())
    assert [m for m in result.modules() if isinstance(m, nn.AvgPool2d)]
    assert any("would save no work" in d.reason for d in report.declined)


def test_parameters_may_grow_where_work_is_saved() -> None:
    model, x = Pooled(nn.Conv2d(16, 8, 1), nn.AvgPool2d(3, 4)).eval(), torch.randn(1, 16, 15, 15)
    _, report, _ = fused(model, x)
    (merged,) = report.merged
    assert merged.params_after > merged.params_before and merged.macs_after < merged.macs_before
    (region,) = [r for r in repfx.inspect(model, example=x).regions if r.merged]
    assert (region.params_before, region.params_after) == (136, 1160)
    assert "136 → 1,160" in str(repfx.inspect(model, example=x))


def random_kernel(rng: random.Random, inputs: int, outputs: int) -> Kernel:
    """A depthwise, grouped or dense kernel, with moved channels and a dilation."""
    groups = rng.choice([g for g in (1, 2, 4, 8) if inputs % g == outputs % g == 0])
    axes = tuple(
        Axis(d * (n - 1) + 1, 1, rng.choice([0, 1]), rng.choice([0, 1]), d if n > 1 else 1)
        for n, d in [(rng.choice([1, 2, 3]), rng.choice([1, 2, 3])) for _ in range(2)]
    )
    geometry = Geometry(inputs, outputs, groups, axes, bias := rng.random() < 0.5)
    shape = (outputs, inputs // groups, *(len(a.places) for a in axes))
    shift = torch.randn(outputs, dtype=torch.float64) if bias else None
    return Kernel(geometry, torch.randn(shape, dtype=torch.float64), shift)


def taken(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    return torch.stack([x[:, r] if r >= 0 else torch.zeros_like(x[:, 0]) for r in rows], 1)


@pytest.mark.parametrize("seed", range(3))
def test_sums_and_compositions_of_linked_kernels(seed: int) -> None:
    rng, linked, exact = random.Random(seed), 0, 0
    torch.manual_seed(seed)
    x = torch.randn(1, 8, 15, 16, dtype=torch.float64)
    for _ in range(150):
        a, b = random_kernel(rng, 8, 8), random_kernel(rng, 8, 8)
        rows = tuple(rng.choice([-1, *range(8)]) for _ in range(8))
        back = tuple(rng.choice([-1, *range(8)]) for _ in range(8))
        try:
            moved = a.moved(rows)
            whole = moved.then(b).moved(back) + moved.moved(back).then(b)
        except Inexact:
            continue
        exact += 1
        linked += whole.geometry.links is not None
        part = taken(a(x), rows)
        want = taken(b(part), back) + b(taken(part, back))
        torch.testing.assert_close(moved(x), part, rtol=0, atol=1e-12)
        torch.testing.assert_close(whole(x), want, rtol=0, atol=1e-12)
        assert whole.plain.geometry.links is None
    assert exact > 20 and linked > 5
