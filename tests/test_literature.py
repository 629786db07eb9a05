"""Blocks of the literature, written as their papers train them: each becomes the one convolution
its formula implies.

    RepVGG     relu(se(B[C3 x] + B[C1 x] + B[x]))
    MobileOne   relu(se(sum_i B[Ck x] + B[C1 x] + B[x]))
    QARepVGG   relu(B[B[C3 x] + C1 x + x])
    RepOpt      relu(B[s3*C3 x + s1*C1 x + sid*x])
    ACNet      relu(B[Ck x] + B[C(k,1) x] + B[C(1,k) x])

Groups, strides and every number that trains are away from their defaults; a gate, and the norm
behind it, stay."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.testing import assert_same

shared = itemgetter("DropPath", "Net", "Ran", "X", "check", "conv", "conv_bn", "ready")
DropPath, Net, Ran, X, check, conv, conv_bn, ready = shared(
    runpy.run_path(str(Path(__file__).with_name("literature.py")))
)


class SE(nn.Module):
    def __init__(self, c: int, fixed: bool = False) -> None:
        super().__init__()
        self.down, self.up, self.c, self.fixed = (
            nn.Conv2d(c, c // 4, 1),
            nn.Conv2d(c // 4, c, 1),
            c,
            fixed,
        )

    def forward(self, inputs: Tensor) -> Tensor:
        _, _, h, w = inputs.size()
        x = (
            F.avg_pool2d(inputs, kernel_size=[h, w])
            if self.fixed
            else F.adaptive_avg_pool2d(inputs, output_size=(1, 1))
        )
        x = torch.sigmoid(self.up(F.relu(self.down(x))))
        return inputs * x.view(-1, self.c, 1, 1)


class RepVGG(nn.Module):
    def __init__(self, i: int = 8, o: int = 8, s: int = 1, g: int = 1, se: bool = False) -> None:
        super().__init__()
        self.nonlinearity, self.se = nn.ReLU(), SE(o) if se else nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(i) if i == o and s == 1 else None
        self.rbr_dense, self.rbr_1x1 = conv_bn(i, o, 3, s, g=g), conv_bn(i, o, 1, s, g=g)

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.se(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out))


class QARepVGG(nn.Module):
    """S4 by default: a norm behind the dense branch and one behind the sum."""

    def __init__(
        self, o=8, s=1, g=1, inner=True, every=False, affine=True, se=False, avg=False, drop=0.0
    ) -> None:
        super().__init__()
        same = o == 8 and s == 1
        self.rbr_dense, self.rbr_1x1 = (conv_bn(8, o, k, s, g=g, affine=affine) for k in (3, 1))
        if not inner:
            self.rbr_dense = self.rbr_dense[0]
        if not every:
            self.rbr_1x1 = self.rbr_1x1[0]
        self.rbr_identity = (
            (nn.BatchNorm2d(o, affine=affine) if every else nn.Identity()) if same else None
        )
        self.rbr_avg = nn.AvgPool2d(kernel_size=3, stride=s, padding=1) if avg and same else None
        self.bn, self.se = nn.BatchNorm2d(o, affine=affine), SE(o) if se else nn.Identity()
        self.act, self.drop_path = nn.ReLU(), DropPath(drop)

    def forward(self, inputs: Tensor) -> Tensor:
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        avg_out = 0 if self.rbr_avg is None else self.rbr_avg(inputs)
        out = self.se(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out + avg_out)
        return self.act(self.bn(self.drop_path(out)))


class ScaleLayer(nn.Module):
    def __init__(self, c: int, frozen: bool) -> None:
        super().__init__()
        self.num_features, self.weight = (
            c,
            nn.Parameter(torch.rand(c) + 0.5, requires_grad=not frozen),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight.view(1, self.num_features, 1, 1)


class RepOpt(nn.Module):
    """The linear-add block the optimizer is derived from; csla freezes the scales of its
    convolutions.
    """

    def __init__(
        self, o: int = 8, s: int = 1, g: int = 1, csla: bool = False, se: bool = False
    ) -> None:
        super().__init__()
        self.conv, self.conv_1x1 = conv(8, o, 3, s, g=g), conv(8, o, 1, s, g=g)
        self.scale_conv, self.scale_1x1 = ScaleLayer(o, csla), ScaleLayer(o, csla)
        if o == 8 and s == 1:
            self.scale_identity = ScaleLayer(o, False)
        self.bn, self.relu, self.post_se = (
            nn.BatchNorm2d(o),
            nn.ReLU(),
            SE(o) if se else nn.Identity(),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.scale_conv(self.conv(inputs)) + self.scale_1x1(self.conv_1x1(inputs))
        if hasattr(self, "scale_identity"):
            out += self.scale_identity(inputs)
        return self.post_se(self.relu(self.bn(out)))


class ACBlock(nn.Module):
    def __init__(self, k: int, p: int, s: int, g: int, affine: bool = True) -> None:
        super().__init__()
        self.crop = max(k // 2 - p, 0)
        ver_padding, hor_padding = (
            ([p, p - k // 2], [p - k // 2, p]) if p >= k // 2 else ([p, 0], [0, p])
        )
        self.square = conv_bn(8, 8, k, s, p, g, affine=affine)
        self.ver = conv_bn(8, 8, (k, 1), s, ver_padding, g, affine=affine)
        self.hor = conv_bn(8, 8, (1, k), s, hor_padding, g, affine=affine)

    def forward(self, input: Tensor) -> Tensor:
        ver_input = hor_input = input
        if self.crop > 0:
            ver_input = input[:, :, :, self.crop : -self.crop]
            hor_input = input[:, :, self.crop : -self.crop, :]
        return F.relu(self.square(input) + self.ver(ver_input) + self.hor(hor_input))


class MobileOne(nn.Module):
    def __init__(self, o=8, k=3, s=1, g=8, branches=1, skip=True, scale=True, se=False) -> None:
        super().__init__()
        self.num_conv_branches, self.se, self.activation = (
            branches,
            SE(o, fixed=True) if se else nn.Identity(),
            nn.ReLU(),
        )
        self.rbr_skip = nn.BatchNorm2d(8) if skip and o == 8 and s == 1 else None
        self.rbr_conv = nn.ModuleList(conv_bn(8, o, k, s, g=g) for _ in range(branches))
        self.rbr_scale = conv_bn(8, o, 1, s, g=g) if scale and k > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity_out = 0
        if self.rbr_skip is not None:
            identity_out = self.rbr_skip(x)
        scale_out = 0
        if self.rbr_scale is not None:
            scale_out = self.rbr_scale(x)
        out = scale_out + identity_out
        for ix in range(self.num_conv_branches):
            out += self.rbr_conv[ix](x)
        return self.activation(self.se(out))


class Summed(nn.Module):
    """sum() over a ModuleList, as many write a block of branches; `post` is its second norm."""

    def __init__(self, *branches: nn.Module, post: bool = False) -> None:
        super().__init__()
        self.branches, self.post = (
            nn.ModuleList(branches),
            nn.BatchNorm2d(8) if post else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.post(sum(branch(x) for branch in self.branches)))


def repvgg(kind: type[nn.Module], norm: type[nn.Module], s: int = 1) -> nn.Module:
    dense, point = (nn.Sequential(kind(8, 8, k, s, k // 2, bias=False), norm(8)) for k in (3, 1))
    return Summed(dense, point, *[norm(8)] * (s == 1))


def resnet() -> nn.Module:
    parts = {"a": conv_bn(8, 16, s=2), "b": conv_bn(16, 16), "down": conv_bn(8, 16, 1, 2)}
    return Net(lambda m, x: F.relu(m.b(F.relu(m.a(x))) + m.down(x)), **parts)


def mbconv() -> nn.Module:
    parts = {"up": conv_bn(8, 32, 1), "dw": conv_bn(32, 32, g=32), "down": conv_bn(32, 8, 1)}
    return Net(lambda m, x: x + m.down(m.se(F.silu(m.dw(F.silu(m.up(x)))))), se=SE(32), **parts)


def preactivation() -> nn.Module:
    parts = {"norm": nn.BatchNorm2d(8), "a": conv_bn(8, 16, 1), "b": conv(16, 4)}
    return Net(lambda m, x: torch.cat([x, m.b(F.relu(m.a(F.relu(m.norm(x)))))], 1), **parts)


SE_MAPS, SE_GATE = 2, 1
SHAPES = [
    (8, 1, 1),
    (8, 1, 2),
    (8, 1, 8),
    (8, 2, 8),
    (12, 1, 1),
    (12, 2, 2),
]  # outputs, stride, groups
CASES: dict[str, Callable[[], nn.Module]] = {
    "QARepVGG without inner norm": partial(QARepVGG, inner=False),
    "QARepVGG norms everywhere": partial(QARepVGG, every=True),
    "QARepVGG without affine": partial(QARepVGG, every=True, affine=False),
    "QARepVGG pool": partial(QARepVGG, avg=True),
    "QARepVGG pool depthwise": partial(QARepVGG, avg=True, g=8, every=True),
    "QARepVGG drop path": partial(QARepVGG, drop=0.3),
    "RepOpt csla": partial(RepOpt, csla=True),
    "MobileOne 4 branches": partial(MobileOne, branches=4),
    "MobileOne s2 4 branches": partial(MobileOne, s=2, branches=4),
    "MobileOne pointwise": partial(MobileOne, k=1, g=1, branches=4),
    "MobileOne pointwise wider": partial(MobileOne, k=1, g=1, o=12),
    "MobileOne k5": partial(MobileOne, k=5, branches=2),
    "MobileOne without scale": partial(MobileOne, branches=2, scale=False),
    "MobileOne without skip": partial(MobileOne, branches=3, skip=False, scale=False),
    "sum of a list": lambda: Summed(
        conv_bn(), conv(k=1, bias=True), nn.BatchNorm2d(8), nn.Identity(), post=True
    ),
    "sum of a list depthwise": lambda: Summed(
        *(conv_bn(k=k, g=8) for k in (1, 3, 5)), nn.Identity()
    ),
}
CASES |= {
    f"{kind.__name__} o{o} s{s} g{g}": partial(kind, o=o, s=s, g=g)
    for kind in (RepVGG, QARepVGG, RepOpt, MobileOne)
    for o, s, g in SHAPES
}
CASES |= {
    f"ACNet k{k} p{p} s{s} g{g}": partial(ACBlock, k, p, s, g, affine=g != 2)
    for s in (1, 2)
    for (k, p), g in zip(
        ((3, 1), (3, 0), (3, 2), (5, 2), (5, 1), (5, 0)), (1, 2, 8) * 2, strict=True
    )
}
GATED: dict[str, tuple[Callable[[], nn.Module], int]] = {  # the norm behind a gate stays
    "RepVGG": (partial(RepVGG, se=True), 0),
    "RepVGG s2 g2": (partial(RepVGG, se=True, s=2, g=2), 0),
    "QARepVGG": (partial(QARepVGG, se=True), 1),
    "RepOpt": (partial(RepOpt, se=True), 0),
    "MobileOne": (partial(MobileOne, se=True), 0),
}
ORDINARY: dict[
    str, tuple[Callable[[], nn.Module], int, int, int]
] = {  # maps, norms and arithmetic left
    "ResNet": (resnet, 3, 0, 1),
    "MBConv": (mbconv, 3 + SE_MAPS, 0, 1 + SE_GATE),
    "pre-activation": (preactivation, 2, 1, 0),
    "linear bottleneck": (lambda: nn.Sequential(conv_bn(8, 2, 1), conv_bn(2, 8, 1)), 2, 0, 0),
    "depthwise, pointwise": (
        lambda: nn.Sequential(conv_bn(g=8), conv_bn(8, 16, 1), nn.ReLU()),
        2,
        0,
        0,
    ),
    "11x1 of 1x11": (lambda: nn.Sequential(conv(k=(1, 11)), conv(k=(11, 1), bias=True)), 2, 0, 0),
    "norms alone": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), conv(k=1), nn.ReLU()
        ),
        1,
        1,
        0,
    ),
}
DIMENSIONS = {
    "1d": (nn.Conv1d, nn.BatchNorm1d, (11,)),
    "3d": (nn.Conv3d, nn.BatchNorm3d, (5, 8, 7)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_block_becomes_one_convolution(name: str) -> None:
    model = CASES[name]()
    groups = {m.groups for m in model.modules() if isinstance(m, nn.Conv2d)}
    result = check(model)
    merged = [m for m in result.modules() if isinstance(m, nn.Conv2d)]
    assert len(merged) == 1 and {m.groups for m in merged} == groups and merged[0].bias is not None


@pytest.mark.parametrize("name", GATED)
def test_a_gate_ends_the_block(name: str) -> None:
    make, norms = GATED[name]
    check(make(), 1 + SE_MAPS, norms, SE_GATE)


@pytest.mark.parametrize(
    "name",
    ["RepVGG o8 s1 g1", "QARepVGG drop path", "RepOpt csla", "ACNet k5 p1 s2 g2", "MobileOne k5"],
)
def test_given_in_train_mode(name: str) -> None:
    model = ready(CASES[name]()).train()
    result = repfx.transform(model, ["fuse"], example=X)
    assert result.training and model.training
    assert_same(model, result, X, 1e-12)
    assert len(Ran(result.eval(), X).maps) == 1


def test_blocks_in_a_row() -> None:
    """Each block ends at its activation; one of them is used twice and stays one."""
    shared = RepVGG()
    check(
        nn.Sequential(QARepVGG(), shared, MobileOne(se=True), shared, RepOpt(o=12, s=2)),
        5 + SE_MAPS,
        0,
        SE_GATE,
    )


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_nets_stay_as_cheap(name: str) -> None:
    """A norm without a convolution stays, and so do two that cost less than one."""
    make, *left = ORDINARY[name]
    check(make(), *left)


@pytest.mark.parametrize("name", DIMENSIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_other_dimensions(name: str, stride: int) -> None:
    kind, norm, size = DIMENSIONS[name]
    check(repvgg(kind, norm, stride), x=torch.randn(2, 8, *size).double())
