"""qarep: every variant computes what the block did, keeps its norms where the paper has them, and
still merges to one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.blocks import DBB, ACNet, QARepVGG, RepVGG
from repfx.blocks.repvgg import VARIANTS
from repfx.testing import assert_same, randomise
from repfx.training.regularise import CustomL2

# Batch norms left in a block that has all three branches, and in one without an identity.
NORMS = {"S2": (2, 2), "S3": (1, 1), "S4": (2, 2), "S0": (3, 2), "Eq6": (3, 2), "S1": (3, 2)}
NORMS |= {"all BN + post": (4, 3), "no BN + post": (1, 1), "BN excl. Id + post": (3, 3)}
SHAPES = {
    "same": (4, 4, 3, 1, 1, 1, 1),
    "groups": (8, 8, 3, 1, 1, 1, 4),
    "stride": (4, 6, 3, 2, 1, 1, 2),
    "5x5": (4, 4, 5, 1, 2, 1, 1),
}
X = torch.randn(2, 8, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def net(shape: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomise(nn.Sequential(RepVGG(*SHAPES[shape]), nn.ReLU()).double().eval()), X[
        :, : SHAPES[shape][0]
    ]


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_trained_weights_are_kept_exactly(variant: str, shape: str) -> None:
    model, x = net(shape)
    result = repfx.transform(model, [f"qarep(variant={variant!r})"], example=x)
    assert_same(model, result, x, 1e-12)
    identity = shape in ("same", "groups", "5x5")
    assert count(result, nn.BatchNorm2d) == NORMS[variant][not identity]
    told, already = result.meta["repfx"].results[0], f"it has the form of {variant} already"
    if variant in ("S0", "Eq6", "S1") or (variant == "S2" and not identity):
        assert [d.reason for d in told.declined] == [already] and not told.inserted
    else:
        assert len(told.inserted) == 1 and not told.declined
    fused = repfx.transform(result, ["fuse"], example=x)
    assert_same(model, fused, x, 1e-12)
    assert (count(fused, nn.Conv2d), count(fused, nn.BatchNorm2d)) == (1, 0)
    trained = repfx.transform(result, ["repq(bits=32, bn=batch)"], example=x).train()
    (trained(x) * torch.randn_like(trained(x))).sum().backward()
    assert all(p.grad is not None for n, p in trained.named_parameters())


def test_the_post_norm_has_the_statistics_that_the_branches_imply() -> None:
    """Where the branches' inputs are white and their norms have seen them, the post norm sees mean
    0 and variance 1.
    """
    model = nn.Sequential(RepVGG(8, 8, 3, padding=1), nn.ReLU()).train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    for seed in range(6):
        model(torch.randn(32, 8, 12, 12, generator=torch.Generator().manual_seed(seed)))
    result = repfx.transform(model.eval(), ["qarep"])
    post = next(m for n, m in result.named_modules() if n.endswith("_post"))
    seen: list[Tensor] = []
    post.register_forward_pre_hook(lambda m, given: seen.append(given[0].detach()))
    result(torch.randn(64, 8, 12, 12))
    mean, std = seen[0].mean((0, 2, 3)), seen[0].std((0, 2, 3))
    assert float((mean - post.running_mean).abs().max()) < 0.15
    assert (
        float((std / post.running_var.sqrt() - 1).abs().max()) < 0.5
    )  # branches are not independent


def test_an_identity_without_a_1x1_branch_gets_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.skip = (
                nn.Conv2d(4, 4, 3, padding=1, bias=False),
                nn.BatchNorm2d(4),
                nn.BatchNorm2d(4),
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)) + self.skip(x))

    model, x = randomise(Two().double().eval()), X[:, :4]
    result = repfx.transform(model, ["qarep"], example=x)
    assert_same(model, result, x, 1e-12)
    assert count(result, nn.Conv2d) == 2 and "conv_1x1.weight" in result.state_dict()
    bare = repfx.transform(model, ["qarep", "repq", "fuse"], example=x)
    assert count(bare, nn.Conv2d) == 1


def test_what_is_left_alone_and_bad_options() -> None:
    for block in (ACNet(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)):
        model = randomise(nn.Sequential(block, nn.ReLU()).double().eval())
        result = repfx.transform(model, ["qarep"], example=X[:, :4])
        assert not result.meta["repfx"].results[0].inserted
        assert "no sum of a kxk branch" in result.meta["repfx"].declined[0].reason
        assert set(result.state_dict()) == set(model.state_dict())
    with pytest.raises(
        repfx.InputError, match=r"unknown variant 'S9'; choose one of: BN excl\. Id"
    ):
        repfx.transform(net("same")[0], ["qarep(variant=S9)"])
    fresh = repfx.transform(net("same")[0], ["qarep(init=reset)"])
    assert all(
        float(m.weight.detach().std()) == 0
        for m in fresh.modules()
        if isinstance(m, nn.BatchNorm2d)
    )


def test_shared_groups_that_differ_are_declined() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (
                nn.Conv2d(4, 4, 3, padding=1, bias=False),
                nn.Conv2d(4, 4, 1, groups=2, bias=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x) + self.b(x))

    model = Mixed().double().eval()
    result = repfx.transform(model, ["qarep"], example=X[:, :4])
    assert [d.reason for d in result.meta["repfx"].declined] == [
        "its branches have different groups"
    ]
    assert_same(model, result, X[:, :4], 1e-12)


def test_the_custom_decay_and_its_repair() -> None:
    model, x = net("same")
    custom, repaired = CustomL2.of(model, x), CustomL2.of(model, x, denominator=False)
    block = model[0]
    k3, k1 = block.main.conv.weight, custom.blocks[0][2].weight
    t3, t1 = (
        n.weight * torch.rsqrt(n.running_var + n.eps)
        for n in (custom.blocks[0][1], custom.blocks[0][3])
    )
    want, ring = 0.0, torch.ones(3, 3, dtype=k3.dtype)
    ring[1, 1] = 0
    for o in range(4):
        want += float((k3[o] * ring).square().sum())
        want += float(
            (k3[o, :, 1, 1] * t3[o] + k1[o, :, 0, 0] * t1[o]).square().sum()
            / (t3[o] ** 2 + t1[o] ** 2)
        )
    assert abs(float(custom.penalty().detach()) - want) < 1e-9
    for penalty in (custom, repaired):
        model.zero_grad()
        penalty.penalty().backward()
        assert all(m.weight.grad is None for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        assert all(k.grad is not None for k in penalty.kernels)
    before = custom.penalty().item(), repaired.penalty().item()
    with torch.no_grad():
        for norm in (custom.blocks[0][1], custom.blocks[0][3]):
            norm.weight.mul_(3)
    assert custom.penalty().item() == pytest.approx(before[0], rel=1e-12)
    assert repaired.penalty().item() > 1.5 * before[1]
    with pytest.raises(repfx.InputError, match="no sum of a kxk and a 1x1 branch"):
        CustomL2.of(nn.Sequential(nn.Conv2d(4, 4, 3)))


BLOCKS = {
    "RepVGG": RepVGG(4, 4, 3, 1, 1),
    "groups": RepVGG(4, 4, 3, 1, 1, groups=2),
    "stride": RepVGG(4, 6, 3, 2, 1),
    "with a norm of the sum": QARepVGG(4, 4, 3, 1, 1, variant="all BN + post"),
    "with a bare identity": QARepVGG(4, 4, 3, 1, 1, variant="BN excl. Id + post"),
}


@pytest.mark.parametrize("denominator", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_custom_decay_is_the_same_under_repq(name: str, denominator: bool) -> None:
    model = randomise(nn.Sequential(BLOCKS[name], nn.ReLU(), nn.Conv2d(4, 4, 1)).double())
    if name == "stride":
        model[2] = nn.Conv2d(6, 4, 1).double()
    x = X[:, :4]
    want = CustomL2.of(model, x, denominator)
    assert len(want.blocks) == 1
    for spec in ("repq", "repq(bits=32)", "repq(bn=live)", "repq(per_channel=False)"):
        other = repfx.transform(model, [spec], example=x)
        found = CustomL2.of(other, x, denominator)
        assert len(found.blocks) == 1
        assert float(found.penalty()) == pytest.approx(float(want.penalty()), rel=1e-12)
        found.penalty().backward()
        mine = dict(other.named_parameters())
        assert all(any(k is p for p in mine.values()) for k in found.kernels)
        assert all(k.grad is not None and bool(k.grad.any()) for k in found.kernels)
    with pytest.raises(repfx.InputError, match="no sum of a kxk and a 1x1 branch"):
        CustomL2.of(repfx.transform(model, ["fuse", "repq"], example=x), x)


@pytest.mark.parametrize("block", [DBB(4, 4, 3, padding=1), ACNet(4, 4, 3, padding=1)])
def test_the_custom_decay_is_for_its_own_blocks_alone(block: nn.Module) -> None:
    model = nn.Sequential(block, nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    for found in (model, repfx.transform(model.eval(), ["repq"], example=X[:, :4])):
        with pytest.raises(repfx.InputError, match="no sum of a kxk and a 1x1 branch"):
            CustomL2.of(found, X[:, :4])


@pytest.mark.parametrize("taps", [3, 4, 5])
def test_a_padding_by_name(taps: int) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, taps, padding="same", bias=False)
            self.b = nn.Conv2d(4, 4, 1, bias=False)
            self.na, self.nb, self.s = (nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.na(self.a(x)) + self.nb(self.b(x)) + self.s(x))

    model, x = randomise(Named().double().eval()).requires_grad_(False), X[:, :4]
    result = repfx.transform(model, ["qarep"], example=x)
    assert len(result.meta["repfx"].results[0].inserted) == 1
    assert_same(model, result, x, 1e-12)
    assert_same(model, repfx.transform(result, ["fuse"], example=x), x, 1e-12)
    assert not any(p.requires_grad for p in result.parameters()), "it was frozen"


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scale_of_0_is_kept(variant: str, scale: float) -> None:
    """A zero-initialised or pruned channel of the 1x1 branch: S2 would divide by it."""
    model, x = net("same")
    with torch.no_grad():
        model[0].point.norm.weight[1] = scale
        model[0].skip.weight[2] = scale
    result = repfx.transform(model, [f"qarep(variant={variant!r})"], example=x)
    assert_same(model, result, x, 1e-12)
    told = result.meta["repfx"].results[0]
    assert told.inserted or "already" in told.declined[0].reason
    assert max(float(p.detach().abs().max()) for p in result.parameters()) < 1e4


class Posted(nn.Module):
    """Branches, each with or without a norm and a bias, and a norm after their sum."""

    def __init__(self, norms: tuple[bool, bool, bool | None], bias: bool) -> None:
        super().__init__()
        main, point, skip = norms
        self.main = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=bias))
        self.point = nn.Sequential(nn.Conv2d(4, 4, 1, bias=bias))
        self.skip = nn.BatchNorm2d(4) if skip else nn.Identity() if skip is not None else None
        for branch, has in ((self.main, main), (self.point, point)):
            branch.extend([nn.BatchNorm2d(4)] if has else [])
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x) + self.point(x)
        return torch.relu(self.norm(y if self.skip is None else y + self.skip(x)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norms", [(True, True, True), (False, True, None), (True, False, False)])
def test_a_norm_after_the_sum_stays(
    norms: tuple[bool, bool, bool | None], bias: bool, variant: str
) -> None:
    torch.manual_seed(1)
    model, x = randomise(Posted(norms, bias).double().eval()), X[:, :4]
    result = repfx.transform(model, [f"qarep(variant={variant!r})"], example=x)
    assert_same(model, result, x, 1e-12)
    (told,) = (*result.meta["repfx"].results[0].declined, None)[:1]
    keep = VARIANTS[variant]
    if not keep.post:
        assert told is not None and "this variant has none there" in told.reason
        return
    same = all(has is None or has == wanted for has, wanted in zip(norms, keep[:3], strict=True))
    assert told is not None and "already" in told.reason if same else told is None
    posts = {n: m for n, m in result.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert torch.equal(posts["norm"].running_var, model.norm.running_var)
    assert len(posts) == len({n for n in posts if "post" not in n})
    # Its statistics are still those of what it reads.
    seen: list[Tensor] = []
    for one in (model.norm, posts["norm"]):
        one.register_forward_pre_hook(lambda m, args: seen.append(args[0] - _column(m)))
    model(x), result(x)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-12)


def _column(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean.view(1, -1, 1, 1)


def test_shifts_that_cancel_are_declined_where_rounding_would_show() -> None:
    model, x = net("same")
    with torch.no_grad():
        model[0].main.norm.bias.add_(1e4)
        model[0].point.norm.bias.sub_(1e4)
    result = repfx.transform(model, ["qarep"], example=x)
    assert result.meta["repfx"].results[0].inserted  # float64 holds both
    single = repfx.transform(model.float(), ["qarep"], example=x.float()).meta["repfx"].results[0]
    assert not single.inserted
    assert "rounding the weights of this variant would change" in single.declined[0].reason


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_main_convolution_without_a_norm_keeps_every_shift(variant: str, bias: bool) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=bias)
            self.skip = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + self.skip(x))

    model, x = randomise(Bare().double().eval()), X[:, :4]
    result = repfx.transform(model, [f"qarep(variant={variant!r})"], example=x)
    assert len(result.meta["repfx"].results[0].inserted) == 1
    assert_same(model, result, x, 1e-12)


def test_identities_and_a_literal_0_do_not_hide_a_block() -> None:
    class Official(nn.Module):
        """A block whose missing identity is the number 0."""

        def __init__(self, inputs: int, outputs: int, zero: int | nn.Module) -> None:
            super().__init__()
            self.dense = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
                nn.Identity(),
                nn.BatchNorm2d(outputs),
            )
            self.point = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, 2, 0, bias=False), nn.BatchNorm2d(outputs)
            )
            self.zero = zero

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.dense(x) + self.point(x + 0) + self.zero)

    x = X[:, :3]
    model = randomise(nn.Sequential(Official(3, 8, 0), Official(8, 8, 0)).double().eval())
    result = repfx.transform(model, ["qarep"], example=x)
    assert len(result.meta["repfx"].results[0].inserted) == 2
    assert not result.meta["repfx"].declined
    assert_same(model, result, x, 1e-12)
    other = randomise(nn.Sequential(Official(3, 8, 1)).double().eval())
    result = repfx.transform(other, ["qarep"], example=x)
    assert not result.meta["repfx"].results[0].inserted  # a 1 is no identity


def test_reset_touches_the_blocks_that_it_rewrites_alone() -> None:
    model = randomise(
        nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            RepVGG(4, 4, 3, padding=1),
            nn.ReLU(),
            RepVGG(4, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 2, 1),
        )
        .double()
        .eval()
    )
    given = {k: v.clone() for k, v in model.state_dict().items()}
    fresh = repfx.transform(model, ["qarep(init=reset)"], example=X[:, :4])
    assert all(torch.equal(v, given[k]) for k, v in model.state_dict().items())
    for name, value in fresh.state_dict().items():
        inside = name.startswith(("3.", "5."))
        if name in given and value.is_floating_point():
            assert torch.equal(value, given[name]) is not inside, name
