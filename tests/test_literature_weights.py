"""Blocks whose forward resists tracing merge all the same: borders written in place, weights
computed, two forwards.

    DBB      B[Ck x] + B[C1 x] + B[Avg(P B[C1 x])] + B[Ck(P B[C1' x])]  P pads with the norm's shift
    OREPA    relu(B[conv(x, W(w...))])        W is einsums of parameters and priors
    ECB      C3 x + sum_j Sj(P(C1 x)) + x     trains as branches, evaluates W(w...)

Given in train mode they merge alike; wrong borders are in the tests of operators.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.testing import assert_same

shared = itemgetter("Ran", "X", "check", "conv_bn", "ready")
Ran, X, check, conv_bn, ready = shared(
    runpy.run_path(str(Path(__file__).with_name("literature.py")))
)


class IdentityBasedConv1x1(nn.Conv2d):
    def __init__(self, c: int, g: int) -> None:
        super().__init__(c, c, 1, groups=g, bias=False)
        self.id_tensor = torch.zeros(c, c // g, 1, 1)
        for i in range(c):
            self.id_tensor[i, i % (c // g), 0, 0] = 1

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.weight + self.id_tensor.to(self.weight.device).type_as(self.weight)
        return F.conv2d(
            input, kernel, None, stride=1, padding=0, dilation=self.dilation, groups=self.groups
        )


class BNAndPad(nn.Module):
    def __init__(self, pad: int, c: int, affine: bool) -> None:
        super().__init__()
        self.bn, self.pad_pixels = nn.BatchNorm2d(c, affine=affine), pad

    def forward(self, input: Tensor) -> Tensor:
        output = self.bn(input)
        if self.pad_pixels > 0:
            scale = torch.sqrt(self.bn.running_var + self.bn.eps)
            if self.bn.affine:
                pad_values = (
                    self.bn.bias.detach() - self.bn.running_mean * self.bn.weight.detach() / scale
                )
            else:
                pad_values = -self.bn.running_mean / scale
            output = F.pad(output, [self.pad_pixels] * 4)
            pad_values = pad_values.view(1, -1, 1, 1)
            output[:, :, 0 : self.pad_pixels, :] = pad_values
            output[:, :, -self.pad_pixels :, :] = pad_values
            output[:, :, :, 0 : self.pad_pixels] = pad_values
            output[:, :, :, -self.pad_pixels :] = pad_values
        return output


class DBB(nn.Module):
    def __init__(self, o: int = 8, k: int = 3, s: int = 1, g: int = 1, affine: bool = True) -> None:
        super().__init__()
        p, first = k // 2, nn.Conv2d(8, 16, 1, groups=g, bias=False)
        self.dbb_origin, self.nonlinear = conv_bn(8, o, k, s, g=g), nn.ReLU()
        pool: list[nn.Module] = [nn.AvgPool2d(k, s, p)]
        if g < o:
            pool = [
                nn.Conv2d(8, o, 1, groups=g, bias=False),
                BNAndPad(p, o, affine),
                nn.AvgPool2d(k, s, 0),
            ]
            self.dbb_1x1 = conv_bn(8, o, 1, s, g=g)
            first = IdentityBasedConv1x1(8, g)
        self.dbb_avg = nn.Sequential(*pool, nn.BatchNorm2d(o))
        self.dbb_1x1_kxk = nn.Sequential(first, BNAndPad(p, first.out_channels, affine))
        self.dbb_1x1_kxk.extend(conv_bn(first.out_channels, o, k, s, 0, g))

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.dbb_origin(inputs)
        if hasattr(self, "dbb_1x1"):
            out += self.dbb_1x1(inputs)
        out += self.dbb_avg(inputs)
        out += self.dbb_1x1_kxk(inputs)
        return self.nonlinear(out)


class OREPA(nn.Module):
    def __init__(self, o: int = 8, k: int = 3, s: int = 1, g: int = 1) -> None:
        super().__init__()
        i, internal, e = 8, 8 if g <= 4 else 16, 8
        self.i, self.o, self.k, self.stride, self.groups = i, o, k, s, g
        full, point = (o, i // g, k, k), (o, i // g, 1, 1)
        squeezed, expanded = (
            [(internal, i // g, 1, 1), (o, internal // g, k, k)],
            [(i * e, 1, k, k), (o, i * e // g, 1, 1)],
        )
        names = [
            "origin",
            "avg_conv",
            "pfir_conv",
            "1x1",
            "1x1_kxk_conv1",
            "1x1_kxk_conv2",
            "gconv_dw",
            "gconv_pw",
        ]
        for name, shape in zip(
            names, [full, point, point, point, *squeezed, *expanded], strict=True
        ):
            self.register_parameter(f"weight_orepa_{name}", nn.Parameter(torch.randn(shape)))
        self.register_buffer("weight_orepa_avg_avg", torch.ones(k, k).mul(1.0 / k / k))
        if internal == i:
            self.register_buffer("id_tensor", torch.zeros(i, i // g, 1, 1))
            for c in range(i):
                self.id_tensor[c, c % (i // g), 0, 0] = 1
        self.vector, self.bn = nn.Parameter(torch.randn(6, o)), nn.BatchNorm2d(o)
        prior, half = torch.Tensor(o, k, k), o / 2
        for c in range(o):
            for h in range(k):
                for w in range(k):
                    prior[c, h, w] = math.cos(
                        math.pi * ((h if c < half else w) + 0.5) * (c + 1 - (c >= half) * half) / k
                    )
        self.register_buffer("weight_orepa_prior", prior)

    def weight_gen(self) -> Tensor:
        each = "oihw,o->oihw"
        origin = torch.einsum(each, self.weight_orepa_origin, self.vector[0, :])
        pool = torch.einsum(
            "oi,hw->oihw",
            self.weight_orepa_avg_conv.squeeze(3).squeeze(2),
            self.weight_orepa_avg_avg,
        )
        avg = torch.einsum(each, pool, self.vector[1, :])
        prior = torch.einsum(
            "oi,ohw->oihw",
            self.weight_orepa_pfir_conv.squeeze(3).squeeze(2),
            self.weight_orepa_prior,
        )
        pfir = torch.einsum(each, prior, self.vector[2, :])
        conv1 = self.weight_orepa_1x1_kxk_conv1.squeeze(3).squeeze(2)
        if hasattr(self, "id_tensor"):
            conv1 = (self.weight_orepa_1x1_kxk_conv1 + self.id_tensor).squeeze(3).squeeze(2)
        conv2 = self.weight_orepa_1x1_kxk_conv2
        if self.groups > 1:
            g = self.groups
            t, ig = conv1.size()
            o, tg, h, w = conv2.size()
            conv1, conv2 = conv1.view(g, int(t / g), ig), conv2.view(g, int(o / g), tg, h, w)
            kxk = torch.einsum("gti,gothw->goihw", conv1, conv2).reshape(o, ig, h, w)
        else:
            kxk = torch.einsum("ti,othw->oihw", conv1, conv2)
        kxk = torch.einsum(each, kxk, self.vector[3, :])
        point = torch.einsum(
            each, F.pad(self.weight_orepa_1x1, [self.k // 2] * 4), self.vector[4, :]
        )
        full = self.dwsc2full(
            self.weight_orepa_gconv_dw, self.weight_orepa_gconv_pw, self.i, self.groups
        )
        return origin + avg + pfir + kxk + point + torch.einsum(each, full, self.vector[5, :])

    def dwsc2full(
        self, weight_dw: Tensor, weight_pw: Tensor, groups: int, groups_conv: int
    ) -> Tensor:
        t, ig, h, w = weight_dw.size()
        o, _, _, _ = weight_pw.size()
        tg, i, ogc, groups_gc = (
            int(t / groups),
            int(ig * groups),
            int(o / groups_conv),
            int(groups / groups_conv),
        )
        weight_dw = weight_dw.view(groups_conv, groups_gc, tg, ig, h, w)
        weight_pw = weight_pw.squeeze().view(ogc, groups_conv, groups_gc, tg)
        weight_dsc = torch.einsum("cgtihw,ocgt->cogihw", weight_dw, weight_pw)
        return weight_dsc.reshape(o, int(i / groups_conv), h, w)

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight_gen()
        out = F.conv2d(inputs, weight, None, self.stride, self.k // 2, 1, self.groups)
        return F.relu(self.bn(out))


class SeqConv3x3(nn.Module):
    """C1 with bias, its border filled with that bias, then a free 3x3 or a frozen mask with a
    learned scale.
    """

    MASKS = {  # noqa: RUF012
        "conv1x1-sobelx": [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]],
        "conv1x1-sobely": [[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]],
        "conv1x1-laplacian": [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]],
    }

    def __init__(
        self, kind: str, i: int, o: int, multiplier: float, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.type: Any = kind
        self.inp_planes, self.out_planes, self.dtype = i, o, dtype
        self.mid_planes = int(o * multiplier) if kind == "conv1x1-conv3x3" else o
        conv0 = nn.Conv2d(i, self.mid_planes, kernel_size=1, padding=0)
        self.k0, self.b0 = conv0.weight, conv0.bias
        if kind == "conv1x1-conv3x3":
            conv1 = nn.Conv2d(self.mid_planes, o, kernel_size=3)
            self.k1, self.b1 = conv1.weight, conv1.bias
        else:
            self.scale, self.bias = (
                nn.Parameter(torch.randn(o, 1, 1, 1)),
                nn.Parameter(torch.randn(o)),
            )
            self.mask = torch.zeros((o, 1, 3, 3), dtype=torch.float32)
            for c in range(o):
                self.mask[c, 0] = torch.tensor(self.MASKS[kind])
            self.mask = nn.Parameter(data=self.mask, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y0 = F.conv2d(input=x, weight=self.k0, bias=self.b0, stride=1)
        y0 = F.pad(y0, (1, 1, 1, 1), "constant", 0)
        b0_pad = self.b0.view(1, -1, 1, 1)
        y0[:, :, 0:1, :] = b0_pad
        y0[:, :, -1:, :] = b0_pad
        y0[:, :, :, 0:1] = b0_pad
        y0[:, :, :, -1:] = b0_pad
        if self.type == "conv1x1-conv3x3":
            return F.conv2d(input=y0, weight=self.k1, bias=self.b1, stride=1)
        return F.conv2d(
            input=y0,
            weight=self.scale * self.mask,
            bias=self.bias,
            stride=1,
            groups=self.out_planes,
        )

    def rep_params(self) -> tuple[Tensor, Tensor]:
        index = self.k0.get_device()
        device = None if index < 0 else index
        if self.type == "conv1x1-conv3x3":
            k1, b1 = self.k1, self.b1
        else:
            tmp = self.scale * self.mask
            k1 = torch.zeros(
                (self.out_planes, self.out_planes, 3, 3), device=device, dtype=self.dtype
            )
            for i in range(self.out_planes):
                k1[i, i, :, :] = tmp[i, 0, :, :]
            b1 = self.bias
        rk = F.conv2d(input=k1, weight=self.k0.permute(1, 0, 2, 3))
        rb = torch.ones(1, self.mid_planes, 3, 3, device=device, dtype=self.dtype) * self.b0.view(
            1, -1, 1, 1
        )
        return rk, F.conv2d(input=rb, weight=k1).view(-1) + b1


class ECB(nn.Module):
    """`dtype`: of the constants its eval forward makes."""

    def __init__(
        self,
        o: int = 8,
        multiplier: float = 2.0,
        idt: bool = True,
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        super().__init__()
        self.out_planes, self.with_idt, self.act, self.dtype = (
            o,
            idt,
            nn.PReLU(num_parameters=o),
            dtype,
        )
        self.conv3x3 = nn.Conv2d(8, o, kernel_size=3, padding=1)
        self.conv1x1_3x3 = SeqConv3x3("conv1x1-conv3x3", 8, o, multiplier, dtype)
        self.conv1x1_sbx = SeqConv3x3("conv1x1-sobelx", 8, o, -1, dtype)
        self.conv1x1_sby = SeqConv3x3("conv1x1-sobely", 8, o, -1, dtype)
        self.conv1x1_lpl = SeqConv3x3("conv1x1-laplacian", 8, o, -1, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = (
                self.conv3x3(x)
                + self.conv1x1_3x3(x)
                + self.conv1x1_sbx(x)
                + self.conv1x1_sby(x)
                + self.conv1x1_lpl(x)
            )
            if self.with_idt:
                y += x
        else:
            rk, rb = self.rep_params()
            y = F.conv2d(input=x, weight=rk, bias=rb, stride=1, padding=1)
        return self.act(y)

    def rep_params(self) -> tuple[Tensor, Tensor]:
        rk: Tensor = self.conv3x3.weight
        rb: Any = self.conv3x3.bias
        for branch in (self.conv1x1_3x3, self.conv1x1_sbx, self.conv1x1_sby, self.conv1x1_lpl):
            k, b = branch.rep_params()
            rk, rb = rk + k, rb + b
        if self.with_idt:
            index = rk.get_device()
            device = None if index < 0 else index
            k_idt = torch.zeros(
                self.out_planes, self.out_planes, 3, 3, device=device, dtype=self.dtype
            )
            for i in range(self.out_planes):
                k_idt[i, i, 1, 1] = 1.0
            rk, rb = rk + k_idt, rb + 0.0
        return rk, rb


CASES: dict[str, Callable[[], nn.Module]] = {
    "DBB": DBB,
    "DBB g2 k5": partial(DBB, g=2, k=5),
    "DBB depthwise": partial(DBB, g=8),
    "DBB depthwise k5 s2": partial(DBB, g=8, k=5, s=2),
    "DBB s2 wider": partial(DBB, o=12, s=2),
    "DBB without affine": partial(DBB, g=2, affine=False),
    "OREPA": OREPA,
    "OREPA s2 wider": partial(OREPA, o=12, s=2),
    "OREPA g2": partial(OREPA, g=2),
    "OREPA depthwise s2": partial(OREPA, g=8, s=2),
    "OREPA g4 k5": partial(OREPA, g=4, k=5),
    "ECB": ECB,
    "ECB wider": partial(ECB, o=12, multiplier=1.0, idt=False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_block_becomes_one_convolution(name: str) -> None:
    check(CASES[name]())


@pytest.mark.parametrize("name", ["DBB", "OREPA g2", "ECB"])
def test_given_in_train_mode(name: str) -> None:
    model = ready(CASES[name]()).train()
    result = repfx.transform(model, ["fuse"], example=X)
    assert result.training and model.training
    assert_same(model, result, X, 1e-12)
    assert len(Ran(result.eval(), X).maps) == 1
    if name == "ECB":  # it has no norm: what trains is what evaluates
        torch.testing.assert_close(
            Ran(result.train(), X).out, Ran(model.train(), X).out, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("seed", range(6))
def test_constants_in_single_precision(seed: int) -> None:
    """The eval forward of ECB as published makes float32 constants, and its two forwards differ by
    their rounding.
    """
    torch.manual_seed(seed)
    model = ready(ECB(dtype=None)).float()
    result = repfx.transform(model, ["fuse"], example=X.float())
    assert_same(model, result, X.float())
    assert len(Ran(result, X.float()).maps) == 1


def test_a_net_of_them() -> None:
    """Every block by itself: the activations between them stay."""
    check(nn.Sequential(DBB(), ECB(), nn.MaxPool2d(2), OREPA(s=2)), 3)
