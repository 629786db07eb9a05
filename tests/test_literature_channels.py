"""Blocks that cut and join channels, pad before they map, or end where nothing linear goes on;
their nets stay as cheap.

    ChunkConv   cat(i, S(s), M(m), L(l)),  (i, s, m, l) = chunk(x)
    RepSR     x + sum C1(B[C3 x])
    RepGhost    u = [relu]B[C1 x],  [relu](B[C3 u] + B[u] [+ u])
    Conv3XC   C1 C3 C1 pad(x) + C1 x
    GhostV3     cat(sum_i B[C1 x], sum_i B[C3 u])[:k]
    RepMLP    is not one map: it knows positions

A biased or padded map before a padded one stays by itself, and so does what costs less than the one
it could become."""

from __future__ import annotations

import re
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

shared = itemgetter("Net", "Ran", "X", "check", "conv", "conv_bn", "ready")
Net, Ran, X, check, conv, conv_bn, ready = shared(
    runpy.run_path(str(Path(__file__).with_name("literature.py")))
)


class RepDWConvS(nn.Module):
    def __init__(self, c: int, s: int = 1) -> None:
        super().__init__()
        self.conv_3_3, self.conv_3_h, self.conv_3_w = (
            conv(c, c, k, s, g=c, bias=True) for k in (3, (3, 1), (1, 3))
        )
        self.conv_2_2 = conv(c, c, 2, s, p=1, g=c, d=2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_3_3(x) + self.conv_3_h(x) + self.conv_3_w(x) + self.conv_2_2(x)


class RepDWConvM(nn.Module):
    def __init__(self, c: int, s: int = 1) -> None:
        super().__init__()
        self.conv_7_7, self.conv_5_3, self.conv_3_5 = (
            conv(c, c, k, s, g=c, bias=True) for k in (7, (5, 3), (3, 5))
        )
        self.conv_7_w, self.conv_7_h = (
            conv(c, c, (1, 7), (1, s), g=c),
            conv(c, c, (7, 1), (s, 1), g=c, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.conv_7_7(x) + self.conv_5_3(x) + self.conv_3_5(x) + self.conv_7_h(self.conv_7_w(x))
        )


def strip(c: int, s: int = 1) -> nn.Sequential:
    """RepNeXt's L: 11x1 of 1x11; as one kernel it would cost five times as much."""
    return nn.Sequential(
        conv(c, c, (1, 11), (1, s), g=c), conv(c, c, (11, 1), (s, 1), g=c, bias=True)
    )


class ChunkConv(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv_i, self.conv_s, self.conv_m, self.conv_l = (
            nn.Identity(),
            RepDWConvS(c),
            RepDWConvM(c),
            strip(c),
        )

    def forward(self, x: Tensor) -> Tensor:
        i, s, m, l = torch.chunk(x, 4, dim=1)  # noqa: E741
        return torch.cat((self.conv_i(i), self.conv_s(s), self.conv_m(m), self.conv_l(l)), dim=1)


class RepGhost(nn.Module):
    def __init__(
        self, i: int = 8, o: int = 8, k: int = 3, relu: bool = True, identity: bool = False
    ) -> None:
        super().__init__()
        self.primary_conv = nn.Sequential(
            *conv_bn(i, o, 1), nn.ReLU(inplace=True) if relu else nn.Sequential()
        )
        self.fusion_conv = nn.Sequential(nn.Identity(), *[nn.Identity()] * identity)
        self.fusion_bn = nn.Sequential(nn.BatchNorm2d(o), *[nn.Identity()] * identity)
        self.cheap_operation = conv_bn(o, o, k, g=o)
        self.relu = nn.ReLU(inplace=False) if relu else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        for conv, bn in zip(self.fusion_conv, self.fusion_bn, strict=True):
            x2 = x2 + bn(conv(x1))
        return self.relu(x2)


class GhostV3(nn.Module):
    """Half of the outputs from three 1x1 each with its norm, half from depthwise ones of those;
    gated by strips.
    """

    def __init__(self, o: int = 16, relu: bool = True, gate: bool = False) -> None:
        super().__init__()
        h = -(-o // 2)
        self.oup, self.act = o, nn.ReLU() if relu else nn.Sequential()
        self.primary = nn.ModuleList([*(conv_bn(8, h, 1) for _ in range(3)), nn.BatchNorm2d(8)])
        self.cheap = nn.ModuleList(
            [*(conv_bn(h, h, 3, g=h) for _ in range(3)), conv_bn(h, h, 1, g=h), nn.BatchNorm2d(h)]
        )
        strips = (*conv_bn(8, o, 1), *conv_bn(o, o, (1, 5), g=o), *conv_bn(o, o, (5, 1), g=o))
        self.short_conv = nn.Sequential(*strips) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.act(sum(branch(x) for branch in self.primary))
        x2 = self.act(sum(branch(x1) for branch in self.cheap))
        out = torch.cat([x1, x2], dim=1)[:, : self.oup, :, :]
        if self.short_conv is None:
            return out
        res = torch.sigmoid(self.short_conv(F.avg_pool2d(x, kernel_size=2, stride=2)))
        return out * F.interpolate(res, size=(out.shape[-2], out.shape[-1]), mode="nearest")


class Conv3XC(nn.Module):
    def __init__(self, o: int = 8, gain: int = 2, s: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.stride, self.has_relu = s, relu
        self.sk = nn.Conv2d(8, o, 1, s)
        self.conv = nn.Sequential(
            nn.Conv2d(8, 8 * gain, 1),
            nn.Conv2d(8 * gain, o * gain, 3, s),
            nn.Conv2d(o * gain, o, 1),
        )
        self.eval_conv = nn.Conv2d(8, o, 3, s, 1).requires_grad_(False)
        self.update_params()

    def update_params(self) -> None:
        (w1, b1), (w2, b2), (w3, b3) = (
            (m.weight.data.clone().detach(), m.bias.data.clone().detach()) for m in self.conv
        )
        w = (
            F.conv2d(w1.flip(2, 3).permute(1, 0, 2, 3), w2, padding=2, stride=1)
            .flip(2, 3)
            .permute(1, 0, 2, 3)
        )
        b = (w2 * b1.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b2
        weight = (
            F.conv2d(w.flip(2, 3).permute(1, 0, 2, 3), w3, padding=0, stride=1)
            .flip(2, 3)
            .permute(1, 0, 2, 3)
        )
        bias = (w3 * b.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b3
        self.eval_conv.weight.data = weight + F.pad(
            self.sk.weight.data.clone().detach(), [1, 1, 1, 1]
        )
        self.eval_conv.bias.data = bias + self.sk.bias.data.clone().detach()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            out = self.conv(F.pad(x, (1, 1, 1, 1), "constant", 0)) + self.sk(x)
        else:
            self.update_params()
            out = self.eval_conv(x)
        return F.leaky_relu(out, negative_slope=0.05) if self.has_relu else out


def repsr(k: int) -> nn.Module:
    branches = [
        nn.Sequential(
            nn.Conv2d(8, 16, k, padding="same"), nn.BatchNorm2d(16), conv(16, 8, 1, bias=True)
        )
        for _ in "ab"
    ]
    return Net(
        lambda m, x: F.relu(x + sum(b(x) for b in m.branches)), branches=nn.ModuleList(branches)
    )


def repnext_block() -> nn.Module:
    mlp = nn.Sequential(conv(32, 64, 1, bias=True), nn.GELU(), conv(64, 32, 1, bias=True))
    return Net(
        lambda m, x: x + m.mlp(m.norm(m.mixer(x))),
        mixer=ChunkConv(8),
        norm=nn.BatchNorm2d(32),
        mlp=mlp,
    )


def ghost_bottleneck() -> nn.Module:
    """From the first activation to the sum everything is linear: as one convolution it would be
    many times dearer.
    """
    short = nn.Sequential(*conv_bn(8, 8, s=2, g=8), *conv_bn(8, 16, 1))
    parts = {
        "ghost1": RepGhost(8, 12),
        "dw": conv_bn(12, 12, s=2, g=12),
        "ghost2": RepGhost(12, 16, relu=False),
    }
    return Net(lambda m, x: m.ghost2(m.dw(m.ghost1(x))) + m.short(x), short=short, **parts)


def copies() -> nn.Module:
    return Net(
        lambda m, x: torch.cat((m.s(x), m.m(x)), dim=1), s=RepDWConvS(8, 2), m=RepDWConvM(8, 2)
    )


CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # maps and arithmetic left
    "RepNeXt S": (lambda: RepDWConvS(8), 1, 0),
    "RepNeXt S s2": (lambda: RepDWConvS(8, 2), 1, 0),
    "RepNeXt M": (lambda: RepDWConvM(8), 1, 0),
    "RepNeXt M s2": (lambda: RepDWConvM(8, 2), 1, 0),
    "RepNeXt L": (lambda: strip(8), 2, 0),
    "RepNeXt L s2": (lambda: strip(8, 2), 2, 0),
    "RepNeXt chunks": (lambda: ChunkConv(2), 4, 0),
    "RepNeXt copies": (copies, 2, 0),
    "RepSR": (lambda: repsr(3), 1, 0),
    "RepSR k5": (lambda: repsr(5), 1, 0),
    "Conv3XC": (Conv3XC, 1, 0),
    "Conv3XC s2 wider": (partial(Conv3XC, o=12, gain=1, s=2), 1, 0),
    "Conv3XC linear": (partial(Conv3XC, relu=False), 1, 0),
    "Conv3XC in a row": (lambda: nn.Sequential(Conv3XC(), Conv3XC(relu=False), Conv3XC()), 3, 0),
    "RepGhost": (RepGhost, 2, 0),
    "RepGhost wider": (partial(RepGhost, o=12), 2, 0),
    "RepGhost k5 identity": (partial(RepGhost, k=5, identity=True), 2, 0),
    "RepGhost linear": (partial(RepGhost, relu=False), 2, 0),
    "RepGhost linear identity": (partial(RepGhost, o=16, relu=False, identity=True), 2, 0),
    "RepGhost bottleneck": (ghost_bottleneck, 7, 1),
    "GhostV3": (GhostV3, 2, 0),
    "GhostV3 odd": (partial(GhostV3, o=15), 2, 0),
    "GhostV3 linear": (partial(GhostV3, relu=False), 2, 0),
    "GhostV3 gated": (partial(GhostV3, gate=True), 5, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_one_convolution_becomes_one(name: str) -> None:
    make, maps, arithmetic = CASES[name]
    check(make(), maps, 0, arithmetic)


def test_a_block_of_chunks_in_its_net() -> None:
    """S and M become one each, L stays two, the norm goes into the layer behind it."""
    check(repnext_block(), 6, 0, 1, torch.randn(2, 32, 11, 14).double())


def test_conv3xc_follows_train_and_eval() -> None:
    """Its eval forward writes a layer that its train forward does not read: given in train mode, it
    merges alike.
    """
    model = ready(Conv3XC()).train()
    result = repfx.transform(model, ["fuse"], example=X)
    assert result.training and model.training
    assert_same(model, result, X, 1e-12)
    for mode in (False, True):
        ran = Ran(result.train(mode), X)
        assert len(ran.maps) == 1
        torch.testing.assert_close(ran.out, Ran(model.train(mode), X).out, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_conv3xc_in_single_precision(seed: int) -> None:
    """Its two forwards differ by their rounding, which must not decide what merges."""
    torch.manual_seed(seed)
    model = ready(Conv3XC()).float()
    result = repfx.transform(model, ["fuse"], example=X.float())
    assert_same(model, result, X.float())
    assert len(Ran(result, X.float()).maps) == 1


class RepMLP(nn.Module):
    """Windows of 4x4: a linear over all positions of a window beside convolutions in it, behind a
    global perceptron.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = conv(8, 4, 1, bias=True), conv(4, 8, 1, bias=True)
        self.fc3, self.fc3_bn = (
            nn.Conv2d(4 * 4 * 2, 4 * 4 * 2, 1, groups=2, bias=False),
            nn.BatchNorm2d(2),
        )
        self.repconv1, self.repconv3 = conv_bn(2, 2, 1, g=2), conv_bn(2, 2, 3, g=2)

    def forward(self, x: Tensor) -> Tensor:
        global_vec = torch.sigmoid(
            self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, output_size=(1, 1)))))
        )
        n, c, h, w = x.size()
        parts = x.reshape(-1, c // 2, 2, h // 4, 4, w // 4, 4).permute(0, 1, 3, 5, 2, 4, 6)
        fc3_out = self.fc3_bn(self.fc3(parts.reshape(-1, 32, 1, 1)).reshape(-1, 2, 4, 4))
        conv_inputs, conv_out = parts.reshape(-1, 2, 4, 4), 0
        for k in (1, 3):
            conv_out += self.__getattr__(f"repconv{k}")(conv_inputs)
        fc3_out += conv_out
        out = (
            fc3_out.reshape(n, c // 2, h // 4, w // 4, 2, 4, 4)
            .permute(0, 1, 4, 2, 5, 3, 6)
            .reshape(n, c, h, w)
        )
        return out * global_vec


def test_positions_that_differ_are_declined() -> None:
    """The convolutions in the windows merge; the layer that tells positions apart is not one of
    them, nor is the sum.
    """
    result = check(RepMLP(), 4, None, None, torch.randn(2, 8, 8, 12).double(), step=4)
    assert any(
        re.search("reshape|view|source|linear|shape", d.reason)
        for d in result.meta["repfx"].declined
    )
