"""blocks.md's negative list: each is left alone, computes the same, and the report gives the right
reason.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import repfx
from repfx.testing import Scale, assert_same, randomise


def bn(channels: int, **options) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


class Net(nn.Module):
    """Holds parts as attributes and runs a function of them and x."""

    def __init__(self, run, **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(
    i: int = 4,
    o: int = 4,
    k: int = 3,
    s: int = 1,
    p: int | None = None,
    bias: bool = False,
    **options,
) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, s, k // 2 if p is None else p, bias=bias, **options)


X = torch.randn(2, 4, 12, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fused(net: nn.Module) -> tuple[fx.GraphModule, str]:
    net = randomise(net.double().eval())
    result = repfx.transform(net, ["fuse"], example=X)
    assert_same(net, result, X, 1e-12)
    return result, " | ".join(f"{d.where}: {d.reason}" for d in result.meta["repfx"].declined)


def kinds(model: nn.Module, kind: type) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


def changed_between(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.relu(x)
    first = m.a(y)
    y += 1
    return first + m.b(y), y


CASES = {
    "biased 1x1 into a padded 3x3": (
        Net(lambda m, x: m.b(m.a(x)), a=conv(4, 4, 1, bias=True), b=conv(4, 2)),
        "conv 1x1 'a' has a bias and conv 3x3 'b' pads with zeros",
    ),
    "zero-valued bias": (
        Net(lambda m, x: m.b(m.a(x)), a=conv(4, 4, 1, bias=True), b=conv(4, 2)),
        "conv 1x1 'a' has a bias and conv 3x3 'b' pads with zeros",
    ),
    "padded 3x3 into a padded 3x3": (
        Net(lambda m, x: m.b(m.a(x)), a=conv(4, 4), b=conv(4, 4)),
        "a padding after a map of 3 taps",
    ),
    "nonlinearity inside": (
        Net(lambda m, x: m.b(torch.relu(m.a(x))) + x, a=conv(), b=conv()),
        "'relu' inside it is not linear",
    ),
    "count_include_pad=False": (
        Net(
            lambda m, x: m.a(x) + m.p(x), a=conv(), p=nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        ),
        "an average pool that does not count its padding",
    ),
    "track_running_stats=False": (
        Net(lambda m, x: m.n(m.a(x)), a=conv(), n=bn(4, track_running_stats=False)),
        "a batch norm without running statistics",
    ),
    "two different sources": (
        Net(lambda m, x: m.a(torch.relu(x)) + m.b(torch.sigmoid(x)), a=conv(), b=conv()),
        "it sums values of different sources",
    ),
    "mixed strides": (
        Net(lambda m, x: m.a(x) + m.b(x), a=conv(s=2, p=7), b=conv()),
        "the operands have different strides",
    ),
    "per-column scale": (
        Net(lambda m, x: m.s(m.a(x)), a=conv(), s=Scale(torch.rand(13) + 0.5)),
        "is not one number per channel",
    ),
    "norm alone": (
        Net(lambda m, x: m.a(torch.relu(m.n(x))), a=conv(), n=bn(4)),
        "no convolution leads to it",
    ),
    "depthwise then pointwise": (
        Net(lambda m, x: m.b(m.a(x)), a=conv(groups=4), b=conv(4, 8, 1)),
        "one convolution would take",
    ),
    "linear bottleneck": (
        Net(lambda m, x: m.b(m.a(x)), a=conv(4, 1, 1), b=conv(1, 4, 1)),
        "one convolution would take",
    ),
    "11x1 of 1x11": (
        Net(
            lambda m, x: m.b(m.a(x)),
            a=nn.Conv2d(4, 4, (1, 11), padding=(0, 5), bias=False),
            b=nn.Conv2d(4, 4, (11, 1), padding=(5, 0)),
        ),
        "one convolution would take",
    ),
    "average pool with ceil_mode": (
        Net(lambda m, x: m.a(m.p(x)), a=conv(4, 4, 1), p=nn.AvgPool2d(2, ceil_mode=True)),
        "ceil_mode",
    ),
    "pad with a constant": (
        Net(lambda m, x: m.a(F.pad(x, (1, 1, 1, 1), value=0.5)), a=conv(p=0)),
        "it pads with a value other than the constant of its input",
    ),
    "two mirrored paddings": (
        Net(
            lambda m, x: m.b(m.a(x)), a=conv(padding_mode="reflect"), b=conv(padding_mode="reflect")
        ),
        "a 'reflect' padding after a map that is not 1x1",
    ),
    "quantity computed from the input as weight": (
        Net(lambda m, x: F.conv2d(m.a(x), m.a.weight * x.mean()), a=conv()),
        "quantized or computed from the input",
    ),
    "source changed in place between its readers": (
        Net(changed_between, a=conv(p=0), b=conv(p=0)),
        "changed in place",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_declined_with_its_reason(name: str) -> None:
    net, reason = CASES[name]
    if name == "zero-valued bias":
        nn.init.zeros_(net.a.bias)
    before = kinds(net, nn.Conv2d)
    result, reasons = fused(net)
    assert reason in reasons
    assert kinds(result, nn.Conv2d) == before


def test_a_gate_between_sum_and_norm() -> None:
    """The sum merges, the norm behind the gate cannot."""

    def run(m, x):
        y = m.a(x) + m.b(x)
        return m.n(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))

    result, reasons = fused(Net(run, a=conv(), b=conv(4, 4, 1), n=bn(4)))
    assert (kinds(result, nn.Conv2d), kinds(result, nn.BatchNorm2d)) == (1, 1)
    assert "n: no convolution leads to it" in reasons and "a product of two values" in reasons


def test_batch_norm_traced_in_train_mode() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), bn(4)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm
            return F.batch_norm(
                self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, self.training
            )

    net = randomise(Functional().double())
    baked = fx.symbolic_trace(net.train())
    report = repfx.transform(baked, ["fuse"]).meta["repfx"]
    assert not report.merged
    assert "a batch norm that runs on batch statistics" in str(report.declined[0])
    # Traced here, the same code follows the mode and merges.
    assert len(repfx.transform(net, ["fuse"], example=X).meta["repfx"].merged) == 1


def test_exported_in_train_mode() -> None:
    net = randomise(nn.Sequential(conv(), bn(4)).double()).train()
    program = torch.export.export(net, (X,))
    report = repfx.transform(program, ["fuse"]).meta["repfx"]
    assert not report.merged and "batch statistics" in str(report.declined[0])


def test_a_branch_read_elsewhere_stays() -> None:
    net = Net(
        lambda m, x: (y := m.n(m.a(x))) + m.b(torch.relu(y + m.b(x))), a=conv(), b=conv(), n=bn(4)
    )
    result, _ = fused(net)
    assert kinds(result, nn.BatchNorm2d) == 0  # bn went into conv a, whose value two readers share

    shared = Net(lambda m, x: torch.relu(y := m.a(x)) * torch.sigmoid(m.n(y)), a=conv(), n=bn(4))
    result, reasons = fused(shared)
    assert kinds(result, nn.BatchNorm2d) == 1
    assert "is also read elsewhere and must stay" in reasons


def test_layer_scale_is_not_vacuous() -> None:
    """With O(1) scales and a branch that must not merge, a wrong merge would show."""
    net = Net(
        lambda m, x: x + m.s(m.a(torch.relu(x))), a=conv(), s=Scale(torch.rand(4, 1, 1) + 0.5)
    )
    result, reasons = fused(net)
    assert len(result.meta["repfx"].merged) == 1 and "'relu' inside it is not linear" in reasons


class Upsamples(nn.Module):
    """A transposed convolution, of one of three spellings, between convolutions."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.how, self.norm = how, nn.BatchNorm2d(8) if how == "norm" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.how == "function":
            x = F.conv_transpose2d(x, self.up.weight, self.up.bias, 2)
        else:
            x = self.norm(self.up(x))
        return self.last(torch.relu(x))


@pytest.mark.parametrize("passes", [["ptq"], ["repq"], ["fuse", "ptq"], ["fuse", "repq"]])
@pytest.mark.parametrize("how", ["module", "function", "norm"])
def test_a_transposed_convolution_that_stays_in_float_is_told(how: str, passes: list[str]) -> None:
    model, x = Upsamples(how).eval(), torch.randn(2, 3, 12, 12)
    report = repfx.transform(model, passes, example=x).meta["repfx"]
    told = [d for d in report.declined if "transposed convolutions stay in float" in d.reason]
    assert {d.where for d in told} <= {"up", "up.merged", "norm", "conv_transpose2d"} and told
