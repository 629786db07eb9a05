"""What the papers' algebra says must hold in training, one test each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.algebra import Geometry, KernelNorm, Moments
from repfx.blocks import BLOCKS, DBB, ECB, ACNet, QARepVGG, RepVGG
from repfx.calibration import match_statistics
from repfx.errors import InputError
from repfx.passes import QARep, RepQ
from repfx.quant import Grid, search_scale
from repfx.testing import assert_same, randomise


def classifier(*blocks: nn.Module, width: int = 8) -> nn.Module:
    layers = [layer for block in blocks for layer in (block, nn.ReLU())]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    ).double()


def pictures(channels: int = 8, n: int = 16) -> Tensor:
    return (
        torch.randn(
            n, channels, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        + 0.3
    )


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    x, y = pictures(), torch.arange(16) % 5
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_parallel_norms_have_one_beta_forever(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    """Lemma 3.1: the betas of what is added get one gradient, so what starts equal stays equal, to
    the bit.
    """
    torch.manual_seed(1)
    model = classifier(
        RepVGG(8, 8, 3, padding=1), QARepVGG(8, 8, 3, padding=1, variant="S2")
    ).train()
    steps(model, optimizer(model.parameters(), lr=0.05), 12)
    s0, s2 = model[0], model[2]
    assert bool(s0.main.norm.bias.any())
    assert torch.equal(s0.main.norm.bias, s0.point.norm.bias)
    assert torch.equal(s0.main.norm.bias, s0.skip.bias)
    assert torch.equal(s2.norm.bias, s2.point.norm.bias)


def test_the_post_norm_takes_the_gradient_of_the_inner_beta() -> None:
    torch.manual_seed(1)
    model = classifier(QARepVGG(8, 8, 3, padding=1)).train()
    F.cross_entropy(model(pictures()), torch.arange(16) % 5).backward()
    inner, post = model[0].main.norm.bias.grad, model[0].norm.bias.grad
    assert float(post.abs().max()) > 1e-4
    assert float(inner.abs().max()) < 1e-4 * float(post.abs().max())


class NoNorm(nn.Module):
    """conv 3x3 + conv 1x1 + identity, with biases and strides, and a border of its own."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.full, self.point = nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 8, 1, groups=groups)
        self.skew = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.full(F.pad(x, (1, 1, 1, 1))) + self.point(x) * 0.5 + x + self.skew(x)


@pytest.mark.parametrize("groups", [1, 4])
def test_without_norms_the_merged_gradients_are_the_branches(groups: int) -> None:
    torch.manual_seed(groups)
    model, x = classifier(NoNorm(groups)), pictures().requires_grad_()
    merged = repfx.transform(model, [RepQ(bits=32)], example=x)
    for net in (model, merged):
        x.grad = None
        out = net.train()(x)
        (
            out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        ).sum().backward()
        given: Any = x.grad
        net.given = given.clone()
    torch.testing.assert_close(merged.given, model.given, rtol=0, atol=1e-12)
    mine = dict(merged.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            mine[name].grad, p.grad, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("mode", ["estimate", "estimate_paper", "sampled", "batch", "running"])
@pytest.mark.parametrize("block", ["repvgg", "qarepvgg", "acnet", "dbb", "orepa", "mobileone"])
def test_a_trained_net_changes_its_statistics_and_nothing_else(block: str, mode: str) -> None:
    torch.manual_seed(3)
    model = randomise(
        classifier(nn.Conv2d(8, 8, 1), BLOCKS[block](8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    ).eval()
    x = pictures()
    other = repfx.transform(model, [RepQ(bits=32, bn=mode)], example=x)
    before = copy.deepcopy(dict(other.state_dict()))
    assert match_statistics(other, [x[:8], x[8:]]) is other
    assert_same(model, other, x, 1e-11)
    moved = [
        n
        for n, v in other.state_dict().items()
        if n.endswith("running_var") and not torch.equal(v, before[n])
    ]
    assert len(moved) == sum(isinstance(m, KernelNorm) for m in other.modules()) > 0
    norms = {n: m for n, m in other.named_modules() if isinstance(m, KernelNorm)}
    for norm in norms.values():
        norm.momentum = 0.0  # so that a forward in training leaves the statistics
    if mode not in ("running", "batch"):  # these keep the unbiased variance
        for m in match_statistics(other, [x]).modules():
            m.train()
        want = other.eval()(x)
        torch.testing.assert_close(other.train()(x), want, rtol=0, atol=1e-9)


def test_matching_refuses_what_it_cannot_keep() -> None:
    model, x = classifier(RepVGG(8, 8, 3, padding=1)).eval(), pictures()
    with pytest.raises(InputError, match="no batch norm"):
        match_statistics(repfx.transform(model, ["fuse"], example=x), [x])
    trained = repfx.transform(model, ["repq(bn=estimate)"], example=x)
    with pytest.raises(InputError, match="at least one batch"):
        match_statistics(trained, [])
    bare = (
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU())
        .double()
        .eval()
    )
    with pytest.raises(InputError, match="affine=False"):
        match_statistics(repfx.transform(bare, ["repq"], example=x), [x])


@pytest.mark.parametrize("variant", ["S4", "all BN + post", "no BN + post"])
def test_a_norm_that_qarep_adds_gets_the_statistics_of_the_data(variant: str) -> None:
    torch.manual_seed(4)
    model = randomise(classifier(RepVGG(8, 8, 3, padding=1), RepVGG(8, 8, 3, padding=1))).eval()
    x = pictures()
    other = repfx.transform(model, [QARep(variant=variant)], example=x)
    norms = [m for m in other.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0  # so that a forward in training leaves the statistics
    off = (other.train()(x) - other.eval()(x)).abs().max()
    match_statistics(other, [x])
    assert_same(model, other, x, 1e-11)
    for norm in norms:
        count = x.numel() / x.shape[1]
        assert norm.running_var is not None
        norm.running_var.mul_((count - 1) / count)  # training divides by the count
        norm.weight.data *= ((count - 1) / count) ** 0.5
    assert_same(model, other, x, 1e-4)  # eps is not scaled
    assert (other.train()(x) - model(x)).abs().max() < 1e-2 * off


class Edges(nn.Module):
    """A norm after each of a learned kernel, an average and a filter for edges."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.point = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)
        laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        self.register_buffer("filter", laplacian.expand(8, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norms[1](F.avg_pool2d(self.point(x), 3, 1, 1))
        edge = self.norms[2](F.conv2d(x, self.scale * self.filter, None, 1, 1, 1, 8))
        return self.norms[0](self.full(x)) + mean + edge


@pytest.mark.parametrize("mode", ["estimate", "estimate_paper"])
def test_averages_and_edge_filters_have_their_true_variance(mode: str) -> None:
    torch.manual_seed(5)
    model = classifier(Edges()).train()
    smooth = F.avg_pool2d(
        torch.randn(16, 8, 20, 20, dtype=torch.float64), 5, 1, 2
    )  # neighbours have much in common
    merged = repfx.transform(
        copy.deepcopy(model).eval(), [RepQ(bits=32, bn=mode)], example=smooth
    ).train()
    for m in (*model.modules(), *merged.modules()):
        if isinstance(m, (nn.BatchNorm2d, KernelNorm)):
            m.momentum = 1.0
    model(smooth), merged(smooth)
    true, got = dict(model.named_buffers()), dict(merged.named_buffers())
    off = [
        (got[f"0.norms.{i}.running_var"] / true[f"0.norms.{i}.running_var"] - 1).abs().max()
        for i in range(3)
    ]
    assert off[0] > 0.1  # the learned kernel, by channel
    assert max(off[1:]) < 2e-3  # 6399 against 6400 values


MODES = ("running", "batch", "sampled", "estimate", "estimate_paper")


def statistics(mode: str, x: Tensor, weight: Tensor, autocast: bool = False) -> tuple[Tensor, ...]:
    """The mean and the variance that a norm after a 1x1 convolution of x takes for its output."""
    point = Geometry.conv(weight.shape[1], weight.shape[0], (1, 1))
    norm = KernelNorm(nn.BatchNorm2d(weight.shape[0]), point, mode).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mean, _, var = norm.measure(Moments(True, True).train()(x), weight, None)
    return mean, var


@pytest.mark.parametrize("mode", MODES)
def test_a_small_variance_about_a_large_mean(mode: str) -> None:
    """One channel that hardly varies: E[x^2] - E[x]^2 has no correct digit in float32."""
    g = torch.Generator().manual_seed(0)
    weight = torch.tensor([1.0, -0.5, 2.0]).reshape(3, 1, 1, 1)
    for level in (-200.0, 50.0, 3000.0):
        x = level + 0.05 * torch.randn(8, 1, 16, 16, generator=g)
        mean, var = statistics(mode, x, weight)
        u = F.conv2d(x.double(), weight.double())
        assert torch.allclose(mean.double(), u.mean((0, 2, 3)), rtol=1e-5)
        assert torch.allclose(var.double(), u.var((0, 2, 3)), rtol=0.02), (level, var)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_float32_in_autocast(mode: str) -> None:
    """What comes in is bfloat16 there, but the moments of that are not rounded to it once more."""
    g = torch.Generator().manual_seed(0)
    x = (4 + 0.3 * torch.randn(16, 1, 16, 16, generator=g)).bfloat16()
    weight = torch.tensor([1.0, -0.5, 2.0]).reshape(3, 1, 1, 1)
    found, wanted = statistics(mode, x, weight, True), statistics(mode, x.float(), weight)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, b, rtol=5e-3)


@pytest.mark.parametrize("mode", ["estimate", "estimate_paper"])
def test_the_estimated_variance_is_that_of_each_tap(mode: str) -> None:
    """sum K^2 V, with V of the padded input at each tap, or of all of the input."""
    x, weight = (
        pictures(4) * torch.rand(1, 1, 9, 10, dtype=torch.float64),
        torch.randn(6, 4, 3, 2, dtype=torch.float64),
    )
    g = Geometry.conv(4, 6, (3, 2), (1, 2), (2, 0))
    norm = KernelNorm(nn.BatchNorm2d(6).double(), g, mode).train()
    var = norm.measure(Moments(True, True).train()(x), weight, None)[1]
    seen = F.unfold(x, (3, 2), padding=(2, 0), stride=(1, 2)).reshape(16, 4, 6, -1)
    spread = seen.var((0, 3), correction=0).reshape(4, 3, 2)
    if mode == "estimate_paper":
        spread = x.var((0, 2, 3), correction=0)[:, None, None]
    torch.testing.assert_close(var, (weight.square() * spread).sum((1, 2, 3)))


def test_fixed_filters_are_told_from_learned_ones_in_the_blocks() -> None:
    def exact(block: nn.Module) -> dict[str, bool]:
        model = repfx.transform(classifier(block).eval(), [RepQ(bn="estimate")], example=pictures())
        return {
            n.removeprefix("0."): m.exact
            for n, m in model.named_modules()
            if isinstance(m, KernelNorm)
        }

    assert not any(exact(ACNet(8, 8, 3, padding=1)).values())
    assert not exact(ECB(8, 8, 3, padding=1))
    averaged = [n for n, on in exact(DBB(8, 8, 3, padding=1)).items() if on]
    assert len(averaged) == 1 and "average" in averaged[0], averaged


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_least_error_is_no_worse_than_the_largest_value(bits: int) -> None:
    v = torch.randn(6, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) ** 3
    for grid in (Grid(bits), Grid(bits, axis=0)):
        largest = v.abs().amax(1) if grid.axis == 0 else v.abs().max()
        errors = [
            (grid.quantize(v, s) - v).square().flatten(1 if grid.axis == 0 else 0).sum(-1)
            for s in (search_scale(v, grid, 2.0), largest / grid.high)
        ]
        assert bool((errors[0] <= errors[1] * (1 + 1e-12)).all())
        assert bits > 4 or bool((errors[0] < 0.99 * errors[1]).all())


def test_statistics_of_what_is_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    x = torch.randn(8, 3, 6, 6)
    x[0, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match="NaN or infinity"):
        match_statistics(model, [x])
    assert float(model[0].running_mean.abs().sum()) == 0


def test_an_empty_batch_leaves_the_statistics() -> None:
    model = classifier(RepVGG(8, 8, 3, padding=1)).eval()
    x = pictures()
    trained = repfx.transform(model, [RepQ(bits=32)], example=x).train()
    before = copy.deepcopy(dict(trained.named_buffers()))
    trained(x[:0])
    after = dict(trained.named_buffers())
    assert all(torch.equal(v, after[k]) for k, v in before.items() if "running" in k)


def test_few_values_are_not_sampled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.BatchNorm1d(64))
    x = torch.randn(32, 5)
    trained = repfx.transform(model.eval(), [RepQ(bits=32)], example=x).train()
    torch.testing.assert_close(trained(x), model.train()(x), rtol=1e-4, atol=1e-5)
