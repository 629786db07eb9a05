"""Models that a rewrite could get wrong without anyone seeing it: state that a forward keeps,
memory that values share, branches that differ where the example does not show it, layouts and types
that a guess would get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.graph.modes import TrainOnly
from repfx.testing import assert_same, randomise

X = torch.randn(2, 4, 12, 13, generator=torch.Generator().manual_seed(8))


class Net(nn.Module):
    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | Tensor | None) -> None:
        super().__init__()
        self.run, self.grid = run, None
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Branching(nn.Module):
    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.c, self.d, self.g = run, conv(), conv(), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(i: int = 4, o: int = 4, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2)


def fused(model: nn.Module, *sizes: tuple[int, ...], x: Tensor = X) -> nn.Module:
    model = randomise(model.eval())
    result = repfx.transform(model, ["fuse"], example=x)
    for size in (tuple(x.shape), *sizes):
        assert_same(
            model, result, torch.randn(size, generator=torch.Generator().manual_seed(1)), 2e-5
        )
    return result


BRANCHES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a gate that starts at zero": lambda m, x: m.c(x) + m.g * m.d(x) if m.training else m.c(x),
    "a clamp that is seldom reached": lambda m, x: m.c(x).clamp(-50, 50) if m.training else m.c(x),
    "a size that the example has": lambda m, x: (
        F.interpolate(m.c(x), size=(12, 13)) if m.training else m.c(x)
    ),
    "asked for with ==": lambda m, x: m.c(x) * 2 if m.training == True else m.c(x),  # noqa: E712
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_training_branch_that_differs_somewhere_is_not_taken(name: str) -> None:
    model = Branching(BRANCHES[name])
    result = fused(model, (2, 4, 7, 9))
    cut_out = any(isinstance(m, TrainOnly) for m in result.modules())
    deployed = any(fact.startswith("eval mode") for fact in result.meta["repfx"].facts)
    assert cut_out != deployed
    with torch.no_grad():
        for m in (model, result):
            m.get_parameter("g").fill_(1)
    assert_same(model, result, 100 * X, 2e-5)
    if deployed:
        with pytest.raises(repfx.InputError, match="something else in training"):
            result.train()(X)
        result = repfx.transform(model, ["repq(bits=32)"], example=X)  # its own forward trains
        with torch.no_grad():
            result.get_parameter("g").fill_(1)
    assert torch.allclose(model.train()(X), result.train()(X), atol=1e-5)


def aliased(view: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(x)
        z, a = view(y), m.a(y)
        z.mul_(2)
        return a + m.b(y)

    return run


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda y: +y,
    "moveaxis": lambda y: y.moveaxis(1, 2),
    "cpu": lambda y: y.cpu(),
    "by keyword": lambda y: torch.flatten(input=y, start_dim=2),
    "split with sizes": lambda y: y.split_with_sizes([1, 3], 1)[0],
    "broadcast": lambda y: torch.broadcast_tensors(y, y)[0],
    "atleast": lambda y: torch.atleast_1d(y),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_through_any_alias_is_seen(name: str) -> None:
    fused(Net(aliased(VIEWS[name]), a=conv(), b=conv()))


def written(write: Callable[[nn.Module, Tensor], object]) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = x * 1.5
        a = m.a(y)
        write(m, y)
        return a + m.b(y)

    return run


class Doubles(nn.Module):
    """Writes its input, and cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if float(x.sum()) > -1e9 else x


WRITES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "a layer, by keyword": lambda m, y: m.act(input=y),
    "a function, by keyword": lambda m, y: torch.clamp_(input=y, min=0),
    "a list": lambda m, y: torch._foreach_mul_([y], 2.0),
    "a module that is not traced": lambda m, y: m.own(y),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_in_any_spelling_is_seen(name: str) -> None:
    fused(Net(written(WRITES[name]), a=conv(), b=conv(), act=nn.ReLU(inplace=True), own=Doubles()))


def test_a_write_that_stays_is_made_once() -> None:
    """The changed value is read outside, so the change stays, and what merges must not make it
    again.
    """

    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.sigmoid(x)
        u = y.sub_(m.w, alpha=2)
        return m.n(m.a(u)), u

    fused(Net(run, a=conv(k=1), n=nn.BatchNorm2d(4), w=torch.rand(4, 1, 1) + 0.5))


def keeps_state(m: Any, x: Tensor) -> Tensor:
    m.buf[0] = x.mean()
    m.calls += 1
    if m.grid is None or m.grid.shape != x.shape[2:]:
        m.grid = torch.linspace(0, 1, x.shape[2] * x.shape[3]).reshape(x.shape[2:])
    return m.c(x) * m.buf + m.grid


def test_state_that_a_forward_keeps() -> None:
    model = Net(
        keeps_state, c=conv(), buf=torch.ones(1), calls=torch.zeros((), dtype=torch.long)
    ).eval()
    result = repfx.transform(model, ["fuse"], example=X)
    assert model.grid is None and int(model.calls) == 0 and float(model.buf) == 1
    assert int(result.get_buffer("calls")) == 0 and float(result.get_buffer("buf")) == 1
    for size in ((2, 4, 12, 13), (2, 4, 12, 13), (3, 4, 5, 6)):
        assert_same(model, result, torch.randn(size), 2e-5)


def test_the_users_tensors_stay() -> None:
    model, given = (
        Net(lambda m, x: m.c(x.mul_(3.0)), c=nn.Sequential(conv(), nn.BatchNorm2d(4))),
        X.clone(),
    )
    result = repfx.transform(randomise(model.eval()), ["fuse"], example=given)
    assert torch.equal(given, X) and len(result.meta["repfx"].merged) == 1


def test_layouts_and_types_are_not_guessed() -> None:
    tokens = Net(
        lambda m, x: (m.l(x.transpose(1, 2)) * m.g).transpose(1, 2),
        l=nn.Linear(7, 7),
        g=torch.rand(7) + 0.5,
    )
    fused(tokens, x=torch.randn(2, 7, 5, 7))
    fused(
        Net(lambda m, x: m.c(x)[:, 2:], c=conv()), x=torch.randn(4, 10, 12)
    )  # no batch: a crop of the rows
    gray = Net(
        lambda m, x: m.c((x - m.mean) / m.std),
        c=conv(3),
        mean=torch.rand(3, 1, 1),
        std=torch.rand(3, 1, 1) + 0.5,
    )
    fused(gray, (1, 1, 9, 9), x=torch.randn(2, 1, 8, 8))
    wide = Net(lambda m, x: m.c(x) * m.s, c=conv(), s=torch.rand(4, 1, 1, dtype=torch.float64))
    assert repfx.transform(wide.eval(), ["fuse"], example=X)(X).dtype == torch.float64
    pixels = torch.randint(0, 256, (2, 4, 8, 8), dtype=torch.uint8)
    scaled = Net(lambda m, x: m.c(x / 255), c=conv()).eval()
    assert torch.allclose(scaled(pixels), repfx.transform(scaled, ["fuse"])(pixels), atol=1e-5)
    every = Net(lambda m, x: m.b(m.a(x[:, ::2, ::2])), a=nn.Linear(13, 6), b=nn.Linear(6, 13))
    report = fused(every).meta["repfx"]
    assert all(m.macs_after <= m.macs_before for m in report.merged)


def test_a_shuffle_of_one_batch_size_only() -> None:
    """At two pictures it shuffles channels; at three it mixes pictures, and the rest of the shape
    still fits.
    """

    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y.reshape(2, 2, 2, -1).transpose(1, 2).reshape(y.shape))

    fused(Net(run, a=conv(k=1), b=conv(k=1)), (4, 4, 6, 8), x=torch.randn(2, 4, 5, 7))


def test_a_border_of_one_size_only() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = F.pad(m.n(m.c(x)), [1] * 4)
        v = (m.n.bias - m.n.running_mean * m.n.weight / torch.sqrt(m.n.running_var + m.n.eps)).view(
            1, -1, 1, 1
        )
        y[:, :, :1], y[:, :, :, :1], y[:, :, :, -1:], y[:, :, 13:14] = v, v, v, v
        return m.d(y)

    model = Net(run, c=conv(k=1), n=nn.BatchNorm2d(4), d=nn.Conv2d(4, 4, 3))
    fused(model, (2, 4, 20, 13))


@dataclass
class Pair:
    first: Tensor
    second: Tensor


def test_constants_that_are_not_what_they_seem(tmp_path: Path) -> None:
    fused(Net(lambda m, x: m.c(x) / m.n, c=conv(), n=torch.tensor([2, 3, 4, 5]).reshape(4, 1, 1)))
    padded = Net(
        lambda m, x: m.d(F.pad(m.c(x) - m.c.bias.abs().view(-1, 1, 1), [1] * 4)),
        c=conv(k=1),
        d=nn.Conv2d(4, 4, 3),
    )
    nn.init.constant_(padded.c.bias, -0.7)
    fused(padded)
    fused(Net(lambda m, x: m.c(x)[:, :0].sum() + m.c(x), c=conv()))
    spectral = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(conv()), nn.BatchNorm2d(4)
    ).train()
    repfx.transform(spectral, ["fuse"], example=X)
    top = Net(lambda m, x: Pair(m.c(x), x), c=conv()).eval()  # type: ignore[return-value]
    with pytest.raises(repfx.InputError, match="cannot save: function 'Pair'"):
        repfx.save(repfx.transform(top, [], example=X), tmp_path / "top.pt")
    assert not list(tmp_path.iterdir())


def test_expand_on_awkward_layers() -> None:
    zero = (
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double().eval()
    )
    nn.init.zeros_(randomise(zero)[0].weight)
    for block in ("acnet", "dbb", "orepa"):
        assert_same(zero, repfx.transform(zero, [f"expand(block={block})"]), X.double(), 1e-11)
    frozen = nn.Sequential(conv(), nn.BatchNorm2d(4)).train()
    frozen.requires_grad_(False)[1].eval()
    wide = repfx.transform(frozen, ["expand"], example=X)
    assert not any(p.requires_grad for p in wide.parameters())
    assert not any(m.training for m in wide.modules() if isinstance(m, nn.BatchNorm2d))
    tied = nn.Sequential(conv(), nn.ReLU(), conv()).eval()
    tied[2].weight = tied[0].weight
    report = repfx.transform(tied, ["expand"], example=X).meta["repfx"]
    assert ["shared with another" in d.reason for d in report.declined] == [True, True]
    for options in ({"block": 3}, {"layers": 3}, {"kernel": "3x3"}, {"block": nn.Conv2d}):
        with pytest.raises(repfx.InputError):
            repfx.transform(zero, [repfx.passes.Expand(**options)])
