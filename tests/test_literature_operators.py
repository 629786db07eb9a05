"""What a net does between its convolutions: cat, slices, shuffles, permutes, pads and transposed
convolutions.

    cat(A x, B x) = [A; B] x     (W x)[:, :k] = W[:k] x     S(W x) = (S W) x
    pad(u - c) + c = pad u with c

What would cost more as one stays in its parts, what the algebra does not cover as well, and then
the report says why."""

from __future__ import annotations

import copy
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

shared = itemgetter("Net", "Ran", "X", "check", "conv", "conv_bn", "param", "ready")
Net, Ran, X, check, conv, conv_bn, param, ready = shared(
    runpy.run_path(str(Path(__file__).with_name("literature.py")))
)


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    b, c, h, w = x.size()
    x = x.view(b, groups, c // groups, h, w)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(b, -1, h, w)


def reshaped(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, 4, c // 4, h, w).permute(0, 2, 1, 3, 4).reshape(b, c, h, w)


def swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return torch.cat([second, first], dim=1)


def space_to_depth(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return (
        x.view(b, c, h // 2, 2, w // 2, 2)
        .permute(0, 1, 3, 5, 2, 4)
        .reshape(b, 4 * c, h // 2, w // 2)
    )


def between(
    move: Callable[[Tensor], Tensor], first: nn.Module, last: nn.Module | None = None
) -> nn.Module:
    """A function of channels between two layers."""
    return Net(
        lambda m, x: F.relu(m.last(move(m.first(x)))), first=first, last=last or conv_bn(8, 8, 1)
    )


def joined(a: nn.Module, b: nn.Module, last: nn.Module, dim: int = 1) -> nn.Module:
    return Net(lambda m, x: F.relu(m.last(torch.cat([m.a(x), m.b(x)], dim))), a=a, b=b, last=last)


def tokens(f: nn.Module, x: Tensor) -> Tensor:
    return f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def padded(m: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
    """The value padded with `shift`, without a write in place."""
    shift = shift.view(1, -1, 1, 1)
    return m.b(F.pad(m.a(x) - shift, (1, 1, 1, 1)) + shift)


def norm_shift(n: nn.BatchNorm2d) -> Tensor:
    return n.bias - n.running_mean * n.weight / torch.sqrt(n.running_var + n.eps)


class Border(nn.Module):
    """C(p0)(pad(B[C1 x])) whose `write` fills the border: y padded by `pad`, c the norm's shift, d
    another one's.
    """

    def __init__(
        self, write: Callable[[Tensor, Tensor, Tensor], None], pad: int | list[int] = 1
    ) -> None:
        super().__init__()
        self.write, self.sides = write, [pad] * 4 if isinstance(pad, int) else pad
        self.first, self.last, self.other = conv_bn(k=1), conv_bn(p=0), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        c, d = norm_shift(self.first[1]), norm_shift(self.other)
        y = F.pad(self.first(x), self.sides)
        self.write(y, c.view(1, -1, 1, 1), d.view(1, -1, 1, 1))
        return self.last(y)


def fill(y: Tensor, top=None, bottom=None, left=None, right=None, n: int = 1) -> None:
    for value, rows in ((top, slice(0, n)), (bottom, slice(-n, None))):
        if value is not None:
            y[:, :, rows, :] = value
    for value, columns in ((left, slice(0, n)), (right, slice(-n, None))):
        if value is not None:
            y[:, :, :, columns] = value


def columns_first(y: Tensor, c: Tensor, d: Tensor) -> None:
    y[:, :, :, :1] = c
    y[:, :, :, -1:] = c
    fill(y, c, c)


UP = partial(nn.ConvTranspose2d, 8, 16, 4, 2, 1)
BN = nn.BatchNorm2d
CASES: dict[str, tuple[nn.Module, int, int, int]] = {  # maps, norms and arithmetic left
    "transposed, norm": (nn.Sequential(UP(bias=False), BN(16), nn.ReLU()), 1, 0, 0),
    "transposed g2, norm": (nn.Sequential(UP(groups=2), BN(16), nn.ReLU()), 1, 0, 0),
    "transposed depthwise k3, norm": (
        nn.Sequential(nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, 8), BN(8)),
        1,
        0,
        0,
    ),
    "transposed, norm, 1x1": (nn.Sequential(UP(), BN(16), *conv_bn(16, 8, 1), nn.ReLU()), 1, 0, 0),
    "shuffle": (between(shuffle, conv_bn(k=1, g=2)), 1, 0, 0),
    "shuffle 4, 3x3": (between(partial(shuffle, groups=4), conv_bn(s=2)), 1, 0, 0),
    "shuffle reshaped": (between(reshaped, conv_bn(k=1, g=2)), 1, 0, 0),
    "shuffle layer": (between(nn.ChannelShuffle(4), conv_bn(k=1, g=2)), 1, 0, 0),
    "halves swapped": (between(swapped, conv_bn()), 1, 0, 0),
    "halves summed": (between(lambda y: y[:, :4] + y[:, 4:], conv(), BN(4)), 1, 0, 0),
    "slice": (between(lambda y: y[:, 2:7], conv(8, 12), BN(5)), 1, 0, 0),
    "narrow": (between(lambda y: y.narrow(1, 0, 6), conv(8, 12, s=2), BN(6)), 1, 0, 0),
    "cat, norm": (joined(conv(8, 4, 1), conv(8, 8, 1, bias=True), BN(12)), 1, 0, 0),
    "cat, norm, 1x1": (
        joined(conv_bn(8, 4, 1), conv(8, 8, 1), nn.Sequential(BN(12), conv(12, 8, 1))),
        1,
        0,
        0,
    ),
    "cat of 3x3, norm": (joined(conv_bn(8, 4, s=2), conv(8, 6, s=2), BN(10), -3), 1, 0, 0),
    "linear on (N, H, W, C)": (
        Net(lambda m, x: F.relu(tokens(m.l, x) + m.c(x)), l=nn.Linear(8, 12), c=conv_bn(8, 12, 1)),
        1,
        0,
        0,
    ),
    "linear on (N, H, W, C), norm": (
        Net(lambda m, x: m.n(tokens(m.l, x)), l=nn.Linear(8, 12), n=BN(12)),
        1,
        0,
        0,
    ),
    "pad with the bias": (
        Net(lambda m, x: padded(m, x, m.a.bias), a=conv(k=1, bias=True), b=conv(p=0)),
        1,
        0,
        0,
    ),
    "pad with the shift": (
        Net(lambda m, x: padded(m, x, norm_shift(m.a[1])), a=conv_bn(k=1), b=conv_bn(s=2, p=0)),
        1,
        0,
        0,
    ),
    "pad before a biased 1x1": (
        Net(lambda m, x: m.b(m.a(F.pad(x, (1, 1, 1, 1)))), a=conv(k=1, bias=True), b=conv(p=0)),
        1,
        0,
        0,
    ),
    "border": (Border(lambda y, c, d: fill(y, c, c, c, c)), 1, 0, 0),
    "border, columns first": (Border(columns_first), 1, 0, 0),
    "border of two": (Border(lambda y, c, d: fill(y, c, c, c, c, 2), 2), 1, 0, 0),
    "border on two sides": (Border(lambda y, c, d: fill(y, c, None, c), [1, 0, 1, 0]), 1, 0, 0),
    "cropped": (between(lambda y: y[:, :, 1:, :-2], conv_bn(k=1), conv_bn(p=0)), 1, 0, 0),
    "grouped, shuffle, grouped 3x3": (between(shuffle, conv_bn(g=4), conv_bn(g=4)), 2, 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left(name: str) -> None:
    model, *left = CASES[name]
    result = check(copy.deepcopy(model), *left)
    transposed = [m for m in result.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert len(transposed) == name.startswith("transposed")
    if name in ("slice", "narrow", "halves summed"):
        ran = Ran(result, X)
        assert ran.maps[0][0] == ran.out.shape[1], "what is cut off is still computed"


REFLECTED = partial(nn.Conv2d, 8, 8, 3, padding=1, padding_mode="reflect")
# maps and norms left, and what the report must say; None where nothing linear was left alone
DECLINED: dict[str, tuple[nn.Module, int | None, int | None, str | None]] = {
    "ETDS": (
        Net(lambda m, x: m.b(F.relu(m.a(x))) + m.r(x), a=conv(), b=conv(), r=conv()),
        3,
        0,
        "relu",
    ),
    "adaptive pool": (
        Net(lambda m, x: m.n(F.adaptive_avg_pool2d(m.a(x), 3)), a=conv(), n=BN(8)),
        1,
        0,  # the norm moves into the convolution, the pool stays
        None,
    ),
    "pixel shuffle": (
        Net(lambda m, x: m.n(F.pixel_shuffle(m.a(x), 2)), a=conv(8, 32), n=BN(8)),
        1,
        1,
        "shuffle",
    ),
    "two sources": (
        Net(lambda m, x: m.a(F.relu(x)) + m.b(x.sigmoid()), a=conv(), b=conv(k=1)),
        2,
        0,
        "different sources",
    ),
    "cat of two sources": (
        Net(
            lambda m, x: m.n(torch.cat([m.a(F.relu(x)), m.b(x.sigmoid())], 1)),
            a=conv(),
            b=conv(),
            n=BN(16),
        ),
        2,
        0,  # the norm moves into both
        None,
    ),
    "reflect, reflect": (nn.Sequential(REFLECTED(), REFLECTED()), 2, 0, "reflect"),
    "reflect beside zeros": (
        Net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=REFLECTED()),
        2,
        0,
        "pad",
    ),
    "biased 1x1, padded 3x3": (nn.Sequential(conv(8, 4, 1, bias=True), conv(4, 8)), 2, 0, "bias"),
    "norm, padded 3x3": (nn.Sequential(conv_bn(8, 4, 1), conv(4, 8)), 2, 0, "bias"),
    "biased 1x1, transposed": (
        nn.Sequential(conv(k=1, bias=True), UP(bias=False)),
        2,
        0,
        "bias|transpos",
    ),
    "another's shift": (
        Net(lambda m, x: padded(m, x, m.c), a=conv(k=1, bias=True), b=conv(p=0), c=param(8)),
        2,
        0,
        "bias|pad|constant",
    ),
    "border, a side left at zero": (Border(lambda y, c, d: fill(y, c, c, c)), 2, 0, ""),
    "border, rows only": (Border(lambda y, c, d: fill(y, c, c)), 2, 0, ""),
    "border, another's shift": (Border(lambda y, c, d: fill(y, d, d, d, d)), 2, 0, ""),
    "border, another's shift on a side": (Border(lambda y, c, d: fill(y, c, c, c, d)), 2, 0, ""),
    "border, wider than the pad": (Border(lambda y, c, d: fill(y, c, c, c, c, 2)), 2, 0, ""),
    "border, narrower than the pad": (Border(lambda y, c, d: fill(y, c, c, c, c), 2), 2, 0, ""),
    "border, a number": (Border(lambda y, c, d: fill(y, *[0.5] * 4)), 2, 0, ""),
    "pixels into channels": (between(space_to_depth, conv(8, 4), conv_bn(16, 8, 1)), 2, 0, None),
    "channels into the batch": (
        between(lambda y: y.reshape(-1, 4, y.shape[2], y.shape[3]), conv(), conv_bn(4, 4, 1)),
        2,
        0,
        None,
    ),
    "height and width swapped": (
        between(lambda y: y.transpose(2, 3), conv(), conv_bn(8, 8, 1)),
        2,
        0,
        None,
    ),
    "one picture of the batch": (between(lambda y: y[:1], conv(), conv_bn(8, 8, 1)), 2, 0, None),
    "flipped": (between(lambda y: y.flip(3), conv(), conv_bn(8, 8, 1)), 2, 0, None),
    "every second row": (between(lambda y: y[:, :, ::2], conv(), conv_bn(8, 8, 1)), None, 0, None),
    "joined by height": (joined(conv(), conv(), BN(8), 2), 2, None, None),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_with_its_reason(name: str) -> None:
    model, maps, norms, words = DECLINED[name]
    even = torch.randn(2, 8, 10, 14).double()
    declined = check(copy.deepcopy(model), maps, norms, None, even, step=2).meta["repfx"].declined
    assert all(d.where and d.reason for d in declined)
    assert words is None or any(
        re.search(words, f"{d.where}: {d.reason}", re.IGNORECASE) for d in declined
    ), declined


def test_an_equal_value_is_not_the_same_constant() -> None:
    """Padded with a copy of the bias: exact today, wrong after a step of training."""
    model = ready(
        Net(lambda m, x: padded(m, x, m.c), a=conv(k=1, bias=True), b=conv(p=0), c=param(8))
    )
    with torch.no_grad():
        model.c.copy_(model.a.bias)
    result = repfx.transform(model, ["fuse"], example=X)
    assert_same(model, result, X, 1e-12)
    assert len(Ran(result, X).maps) == 2
