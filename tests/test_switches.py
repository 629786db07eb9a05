"""A quantizer's scale and its switch are two things, and what is switched for a while goes back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import repfx
from repfx.quant import FakeQuant, Grid, in_eval, in_float, observing, quantizers_of, same_modes

X = torch.linspace(-1, 1, 64)


class Stop(Exception):
    pass


def test_off_is_not_uncalibrated() -> None:
    quant = FakeQuant(Grid(4), torch.tensor(0.1))
    rounded = quant(X)
    with in_float([quant]):
        assert quant.calibrated and not quant.on
        assert torch.equal(quant(X), X) and repr(quant).endswith(", off)")
    assert torch.equal(quant(X), rounded) and not torch.equal(rounded, X)
    raw = FakeQuant(Grid(4))
    assert raw.on and not raw.calibrated and torch.equal(raw(X), X)


def test_a_learned_scale_is_not_set_while_it_is_off() -> None:
    quant = FakeQuant(Grid(4), learned=True).train()
    with in_float([quant]):
        assert torch.equal(quant(X), X)
    assert not quant.calibrated
    quant(X)
    assert quant.calibrated and bool(quant.scale > 0)


def test_switches_go_back_whatever_happens_inside() -> None:
    on, off = FakeQuant(Grid(4), torch.tensor(0.1)), FakeQuant(Grid(4), torch.tensor(0.1))
    off.on = False
    with pytest.raises(Stop), in_float([on, off]), observing([on]):
        raise Stop
    assert on.on and not off.on and on.observer is None
    with in_float([on]), in_float([on, off]):
        pass
    assert on.on and not off.on


def test_observers_see_what_the_quantizer_is_given() -> None:
    a, b = (FakeQuant(Grid(8), torch.tensor(0.1)) for _ in range(2))
    with observing([a]) as seen:
        assert torch.equal(a(X), X)
        a(3 * X)
        b(X)
    assert list(seen) == [a] and seen[a].seen == 128
    assert float(seen[a].scale("max")) == pytest.approx(3 / 127)


def test_modes_go_back_one_by_one() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3)))
    model.train()[1].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(Stop), in_eval(model):
        assert not any(m.training for m in model.modules())
        raise Stop
    assert [m.training for m in model.modules()] == modes
    other = nn.Dropout()
    with same_modes(model, other):
        model.train(), other.eval()
    assert [m.training for m in model.modules()] == modes and other.training


def test_a_switch_is_of_the_moment_and_not_in_the_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    model = repfx.calibrate(repfx.transform(net, ["ptq(bits=4)"], example=x), [x])
    assert len(quantizers_of(model)) == 4 and len(quantizers_of(model, of_weight=True)) == 2
    keys, want = list(model.state_dict()), model(x)
    with in_float(quantizers_of(model).values()):
        repfx.save(model, tmp_path / "off.pt")
        assert torch.allclose(model(x), net(x), atol=1e-5)
        assert list(model.state_dict()) == keys
        assert all(not m.on for m in quantizers_of(copy.deepcopy(model)).values())
    assert torch.equal(repfx.load(tmp_path / "off.pt")(x), want)
