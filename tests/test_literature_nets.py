"""Blocks of whole families of nets, as their repositories train them: what is one convolution
merges, and no more does.

    RepMixer  x + ls*(M(x) - N(x))
    RepLKNet      B[Ck x] + B[Cs x]
    RepViT    B[(B[C3 x] + C1 x) + x], x + B[Ck x]
    UniRepLKNet   B[B[Ck x] + sum_i B[Ci,d x]]
              (L1(B v) + L2(B v)) / 2
    YOLO          silu(B[C3 x] + a*B[C1 x] + B[x]), m*(C1(i + x) + b)

A block ends where the next one would make it dearer, at an activation, and at a residual of another
source."""

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

shared = itemgetter("DropPath", "Net", "Ran", "X", "check", "conv", "conv_bn", "param", "ready")
FILE = str(Path(__file__).with_name("literature.py"))
DropPath, Net, Ran, X, check, conv, conv_bn, param, ready = shared(runpy.run_path(FILE))


class MobileOne(nn.Module):
    """Depthwise, without activation: branches, a scale and a skip."""

    def __init__(self, c: int, k: int, branches: int = 1, scale: bool = True) -> None:
        super().__init__()
        self.rbr_skip, self.rbr_scale = nn.BatchNorm2d(c), conv_bn(c, c, 1, g=c) if scale else None
        self.rbr_conv = nn.ModuleList(conv_bn(c, c, k, g=c) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        identity_out = self.rbr_skip(x)
        scale_out = 0
        if self.rbr_scale is not None:
            scale_out = self.rbr_scale(x)
        out = scale_out + identity_out
        for ix in range(len(self.rbr_conv)):
            out += self.rbr_conv[ix](x)
        return out


class RepMixer(nn.Module):
    def __init__(self, dim: int = 8, k: int = 3, layer_scale: bool = True) -> None:
        super().__init__()
        self.norm, self.mixer = MobileOne(dim, k, branches=0, scale=False), MobileOne(dim, k)
        self.use_layer_scale, self.layer_scale = layer_scale, param(dim, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_layer_scale:
            x = x + self.layer_scale * (self.mixer(x) - self.norm(x))
        else:
            x = x + self.mixer(x) - self.norm(x)
        return x


class FastViTBlock(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.token_mixer, self.layer_scale = RepMixer(), param(8, 1, 1)
        self.convffn = nn.Sequential(
            conv_bn(k=7, g=8), conv(8, 24, 1, bias=True), nn.GELU(), conv(24, 8, 1, bias=True)
        )
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.drop_path(self.layer_scale * self.convffn(x))


class LargeKernel(nn.Module):
    """RepLKNet: a large depthwise kernel beside a small one."""

    def __init__(
        self, k: int, small: int, s: int = 1, g: int | None = None, c: int = 8, norm=nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.lkb_origin, self.small_conv = (
            conv_bn(c, c, n, s, g=g or c, norm=norm) for n in (k, small)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.lkb_origin(inputs)
        if hasattr(self, "small_conv"):
            out += self.small_conv(inputs)
        return out


class DilatedReparam(nn.Module):
    """UniRepLKNet: a large depthwise kernel, smaller ones dilated to its size, each with its
    norm."""

    DILATED = {5: "31 32", 7: "51 32 33", 9: "51 52 33 34", 13: "51 72 33 34 35"}  # noqa: RUF012  (kernel, dilation)

    def __init__(self, k: int, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.lk_origin, self.origin_bn = conv(k=k, g=8), norm(8)
        self.kernel_sizes, self.dilates = zip(
            *(map(int, pair) for pair in self.DILATED[k].split()), strict=True
        )
        for n, r in zip(self.kernel_sizes, self.dilates, strict=True):
            self.__setattr__(f"dil_conv_k{n}_{r}", conv(k=n, p=(r * (n - 1) + 1) // 2, d=r, g=8))
            self.__setattr__(f"dil_bn_k{n}_{r}", norm(8))

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin_bn(self.lk_origin(x))
        for k, r in zip(self.kernel_sizes, self.dilates, strict=True):
            out = out + self.__getattr__(f"dil_bn_k{k}_{r}")(
                self.__getattr__(f"dil_conv_k{k}_{r}")(x)
            )
        return out


class UniRepLKNetBlock(nn.Module):
    """Its pointwise layers are linears on (N, H, W, C), the last one with a norm on (N, C, H, W)
    behind it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dwconv, self.norm, self.gamma = (
            DilatedReparam(9, nn.SyncBatchNorm),
            nn.SyncBatchNorm(8),
            param(8),
        )
        self.pwconv1, self.pwconv2, self.bn = (
            nn.Linear(8, 24),
            nn.Linear(24, 8, bias=False),
            nn.SyncBatchNorm(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.pwconv1(self.norm(self.dwconv(x)).permute(0, 2, 3, 1)))
        y = self.bn(self.pwconv2(y).permute(0, 3, 1, 2))
        return x + self.gamma.view(1, -1, 1, 1) * y


class Residual(nn.Module):
    def __init__(self, m: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.m, self.drop = m, drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop > 0:
            keep = (
                torch.rand(x.size(0), 1, 1, 1, device=x.device)
                .ge_(self.drop)
                .div(1 - self.drop)
                .detach()
            )
            return x + self.m(x) * keep
        return x + self.m(x)


class RepVGGDW(nn.Module):
    def __init__(self, ed: int = 8, k: int = 3) -> None:
        super().__init__()
        self.conv, self.conv1, self.bn = (
            conv_bn(ed, ed, k, g=ed),
            conv(ed, ed, 1, g=ed, bias=True),
            nn.BatchNorm2d(ed),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)


class Classifier(nn.Module):
    """RepViT: two heads whose mean is the answer; `apart` gives them one by one while they train,
    as distillation does.
    """

    def __init__(self, apart: bool | None) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))
        self.head_dist = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x1, x2 = self.head(x), self.head_dist(x)
        if self.apart is not None and self.training and self.apart:
            return x1, x2
        return (x1 + x2) / 2


class RepConv(nn.Module):
    """YOLO's RepVGG block, its activation shared by the whole net; eps as in its configurations."""

    default_act = nn.SiLU()

    def __init__(self, i=8, o=8, k=3, s=1, g=1, identity=True, alpha=False, act=True) -> None:
        super().__init__()
        self.act = self.default_act if act else nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(i, eps=1e-3) if identity and i == o and s == 1 else None
        self.rbr_dense, self.rbr_1x1 = (
            conv_bn(i, o, k, s, g=g, eps=1e-3),
            conv_bn(i, o, 1, s, g=g, eps=1e-3),
        )
        self.alpha = param(1) if alpha else None

    def forward(self, inputs: Tensor) -> Tensor:
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        if self.alpha is not None:
            return self.act(self.rbr_dense(inputs) + self.alpha * self.rbr_1x1(inputs) + id_out)
        return self.act(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out)


class BottleRep(nn.Module):
    def __init__(self, act: bool = True, weight: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2, self.alpha = (
            RepConv(act=act),
            RepConv(act=act),
            param(1) if weight else 1.0,
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.conv2(self.conv1(x))
        return outputs + self.alpha * x


class C2f(nn.Module):
    """A list of chunks that grows: each block reads the last of them, a layer reads them all."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = (
            nn.Sequential(conv_bn(8, 16, 1), nn.SiLU()),
            nn.Sequential(conv_bn(32, 8, 1), nn.SiLU()),
        )
        self.m = nn.ModuleList([RepConv(), Residual(RepConv(identity=False))])

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Detect(nn.Module):
    """Two levels, decoded on a grid that is made anew when the size of the input changes."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = [torch.zeros(1)] * 2
        self.m = nn.ModuleList(
            nn.Sequential(RepConv(8, 8), conv(8, 12, 1, bias=True)) for _ in range(2)
        )

    def forward(self, x: list[Tensor]) -> Tensor:
        z = []
        for i in range(2):
            y = self.m[i](x[i])
            bs, _, ny, nx = y.shape
            y = y.view(bs, 2, 6, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            if self.grid[i].shape[2:4] != y.shape[2:4]:
                yv, xv = torch.meshgrid([torch.arange(ny), torch.arange(nx)], indexing="ij")
                self.grid[i] = torch.stack((xv, yv), 2).view((1, 1, ny, nx, 2)).to(y.dtype)
            y = y.sigmoid()
            xy = (y[..., 0:2] * 2.0 - 0.5 + self.grid[i]) * 8.0
            z.append(torch.cat((xy, y[..., 2:]), -1).view(bs, -1, 6))
        return torch.cat(z, 1)


def implicit() -> nn.Module:
    return Net(
        lambda m, x: m.m * m.c(m.i + x),
        i=param(1, 8, 1, 1),
        c=conv(8, 12, 1, bias=True),
        m=param(1, 12, 1, 1),
    )


def replk_block() -> nn.Module:
    parts = {
        "norm": nn.BatchNorm2d(8),
        "pw1": conv_bn(8, 16, 1),
        "lk": LargeKernel(13, 5, c=16),
        "pw2": conv_bn(16, 8, 1),
    }
    return Net(
        lambda m, x: x + m.drop(m.pw2(F.relu(m.lk(F.relu(m.pw1(m.norm(x))))))),
        drop=DropPath(),
        **parts,
    )


def ffn(c: int) -> Residual:
    return Residual(nn.Sequential(conv_bn(c, 2 * c, 1), nn.GELU(), conv_bn(2 * c, c, 1)))


CASES: dict[
    str, tuple[Callable[[], nn.Module], int, int]
] = {  # maps left, and arithmetic: residuals and their scales
    "RepMixer": (RepMixer, 1, 0),
    "RepMixer k7": (partial(RepMixer, k=7), 1, 0),
    "RepMixer without layer scale": (partial(RepMixer, layer_scale=False), 1, 0),
    "RepMixer, RepMixer": (lambda: nn.Sequential(RepMixer(), RepMixer()), 2, 0),
    "RepMixer, 1x1": (lambda: nn.Sequential(RepMixer(), conv_bn(8, 16, 1), nn.GELU()), 2, 0),
    "FastViT": (lambda: nn.Sequential(FastViTBlock(), FastViTBlock()), 8, 2),
    "FastViT drop path": (partial(FastViTBlock, drop=0.2), 4, 1),
    "RepCPE": (lambda: Net(lambda m, x: m.pe(x) + x, pe=conv(k=7, g=8, bias=True)), 1, 0),
    "RepLKNet 31": (lambda: LargeKernel(31, 5), 1, 0),
    "RepLKNet 13 s2": (lambda: LargeKernel(13, 5, s=2), 1, 0),
    "RepLKNet 7 s2 g2": (lambda: LargeKernel(7, 3, s=2, g=2), 1, 0),
    "RepLKNet synchronised": (lambda: LargeKernel(9, 5, norm=nn.SyncBatchNorm), 1, 0),
    "RepLKNet block": (replk_block, 3, 1),
    **{
        f"UniRepLKNet {k}": (lambda k=k: nn.Sequential(DilatedReparam(k), nn.BatchNorm2d(8)), 1, 0)
        for k in (5, 7, 9, 13)
    },
    "UniRepLKNet block": (UniRepLKNetBlock, 3, 1),
    "RepViT": (RepVGGDW, 1, 0),
    "RepViT k5": (partial(RepVGGDW, k=5), 1, 0),
    "RepViT residual": (lambda: Residual(conv_bn(g=8)), 1, 0),
    # Its training branch draws by the batch size inside one `if`: to follow .train() it stays as
    # written, its child merges.
    "RepViT residual drop path": (lambda: Residual(conv_bn(g=8), drop=0.1), 1, 1),
    "RepViT stage": (
        lambda: nn.Sequential(conv_bn(s=2, g=8), conv_bn(8, 16, 1), ffn(16), RepVGGDW(16), ffn(16)),
        7,
        2,
    ),
    "RepViT head": (partial(Classifier, apart=None), 1, 0),
    "RepViT head with a flag": (partial(Classifier, apart=False), 1, 0),
    "YOLO": (RepConv, 1, 0),
    "YOLO g2 s2": (partial(RepConv, g=2, s=2), 1, 0),
    "YOLO alpha wider": (partial(RepConv, o=12, alpha=True), 1, 0),
    "YOLO depthwise": (partial(RepConv, k=5, g=8, identity=False), 1, 0),
    "YOLO 7x7 and 3x3": (
        lambda: Net(lambda m, x: F.silu(m.a(x) + m.b(x)), a=conv_bn(k=7, g=8), b=conv_bn(g=8)),
        1,
        0,
    ),
    "YOLO shared activation": (
        lambda: nn.Sequential(RepConv(), RepConv(o=12, s=2), RepConv(12, 8, alpha=True)),
        3,
        0,
    ),
    "C2f": (C2f, 4, 1),
    "BottleRep": (BottleRep, 2, 2),
    "BottleRep linear": (partial(BottleRep, act=False), 2, 2),
    "YOLO implicit": (implicit, 1, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_one_convolution_becomes_one(name: str) -> None:
    make, maps, arithmetic = CASES[name]
    check(make(), maps, 0, arithmetic)


def test_heads_that_train_apart() -> None:
    """In train mode the model answers with a pair: its heads may stay two, without their norms."""
    model = ready(Classifier(apart=True))
    result = repfx.transform(model, ["fuse"], example=X)
    assert_same(model, result, X, 1e-12)
    after = Ran(result, X)
    assert len(after.maps) <= 2 and after.norms == 0
    assert isinstance(Ran(result.train(), X).out, tuple)


def test_a_head_that_follows_sizes_costs_the_backbone_nothing() -> None:
    net = Net(
        lambda m, x: m.head([y := m.stem(x), F.max_pool2d(y, 2)]), stem=RepConv(), head=Detect()
    )
    result = check(net, 5, 0, None)
    assert not result.meta["repfx"].untraced
