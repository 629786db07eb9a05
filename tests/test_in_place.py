"""Changes in place and shared memory: what a data-flow graph hides, and a merge must not disturb."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.testing import assert_same, randomise


class Parts(nn.Module):
    """A convolution, a norm, activations in place and dropout, run by a function of them."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run = run
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.point, self.drop = nn.Conv2d(4, 4, 1, bias=False), nn.Dropout()

    def forward(self, *xs: Tensor) -> Tensor:
        return self.run(self, *xs)


class One(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Two(Parts):
    """Two inputs: no example can be guessed, so nothing but the graph itself can be right."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.run(self, x, z)


def x() -> Tensor:
    return torch.randn(2, 4, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def discarded_module(m, x, z=0):
    y = m.conv(x)
    m.act(y)
    return m.norm(y) * (z + 1)


def discarded_method(m, x, z=0):
    y = m.conv(x)
    y.relu_()
    return m.norm(y) * (z + 1)


def discarded_function(m, x, z=0):
    y = m.conv(x)
    torch.relu_(y)
    return m.norm(y) * (z + 1)


def through_dropout(m, x, z=0):
    x = x.tanh()
    a = m.conv(x)
    r = m.act(m.drop(x))
    return m.norm(a).tanh() + r + z


def through_a_slice(m, x, z=0):
    x = x.tanh()
    a = m.conv(x)
    p = x[:, :2].mul_(3)
    return m.norm(a).tanh() + p.mean() + z


def augmented_alias(m, x, z=0.5):
    h = m.conv(x)
    skip = h
    h += z
    return m.norm(h) * skip


def changed_between_branches(m, x, z=0):
    y = torch.relu(x)
    a = m.conv(y)
    y += 1
    return a + m.point(y) + z


def weight_read_elsewhere(m, x, z=0):
    return m.norm(m.conv(x)).relu() + F.conv2d(x, m.conv.weight, padding=1) + m.conv.bias.sum() + z


RUNS = [
    discarded_module,
    discarded_method,
    discarded_function,
    through_dropout,
    through_a_slice,
    augmented_alias,
    changed_between_branches,
    weight_read_elsewhere,
]


@pytest.mark.parametrize("run", RUNS, ids=lambda f: f.__name__)
def test_equal_with_and_without_an_example(run) -> None:
    one = randomise(One(run).double().eval())
    want = one(x())
    assert torch.allclose(repfx.transform(one, ["fuse"]).eval()(x()), want, rtol=0, atol=1e-12)
    two = randomise(Two(run).double().eval())
    want = two(x(), x())
    assert torch.allclose(repfx.transform(two, ["fuse"]).eval()(x(), x()), want, rtol=0, atol=1e-11)


def test_the_usual_in_place_idioms_still_merge() -> None:
    def residual(m, x):
        y = m.norm(m.conv(x))
        y += m.point(x)
        y += x
        return m.act(y)

    model = randomise(One(residual).double().eval())
    result = repfx.transform(model, ["fuse"])
    assert_same(model, result, x(), 1e-12)
    assert sum(isinstance(m, nn.Conv2d) for m in result.modules()) == 1


def test_shared_quantizers_do_not_span_a_change() -> None:
    def two_readers(m, x):
        y = torch.relu(x)
        a = m.conv(y)
        y += 5
        return a + torch.relu(m.point(y))

    model = One(two_readers).eval()
    quantized = repfx.transform(model, ["ptq"])
    repfx.calibrate(quantized, [x().float()])
    assert repfx.verify(model, quantized, x().float()).sqnr > 30


def test_a_forward_that_writes_to_buffers_does_not_change_the_model() -> None:
    class Counting(One):
        def __init__(self) -> None:
            super().__init__(None)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.norm(self.conv(x))

    model = Counting().eval()
    repfx.transform(model, ["fuse"])
    assert float(model.calls) == 0


def test_dropout_before_a_layer_survives() -> None:
    model = One(lambda m, x: m.norm(m.conv(m.drop(torch.relu(x))))).double().eval()
    result = repfx.transform(model, ["fuse"])
    assert len(result.meta["repfx"].merged) == 1
    result.train()
    assert not torch.equal(result(x()), result(x()))


def test_integer_pictures() -> None:
    model = randomise(One(lambda m, x: m.norm(m.point(x / 255.0))).eval())
    picture = torch.randint(0, 255, (2, 4, 9, 9), dtype=torch.uint8)
    result = repfx.transform(model, ["fuse"], example=picture)
    assert_same(model, result, (picture,), 1e-6)
    assert len(result.meta["repfx"].merged) == 1
