"""Laws of Kernel as properties, on random maps: exact where it says so, refused where it must."""

from __future__ import annotations

import random
from dataclasses import replace
from math import gcd

import pytest
import torch
import torch.nn.functional as F

from repfx.algebra import Axis, Geometry, Kernel, impulse_response
from repfx.algebra.kernel import _regroup
from repfx.errors import Inexact

SIZES = (17, 18, 19, 20, 21)


def random_map(
    rng: random.Random, inputs: int, outputs: int, bias: bool | None = None, axes: int = 2
) -> Kernel:
    groups = rng.choice([d for d in (1, 1, 2, 4, 8) if gcd(inputs, outputs) % d == 0])
    lines = tuple(
        Axis(
            rng.choice([1, 1, 2, 3]),
            rng.choice([1, 1, 2, 3]),
            rng.choice([-1, 0, 0, 1, 2]),
            rng.choice([-1, 0, 0, 1, 2]),
        )
        for _ in range(axes)
    )
    has_bias = rng.random() < 0.5 if bias is None else bias
    geometry = Geometry(inputs, outputs, groups, lines, has_bias)
    weight = torch.randn(outputs, inputs // groups, *(a.taps for a in lines), dtype=torch.float64)
    return Kernel(geometry, weight, torch.randn(outputs, dtype=torch.float64) if has_bias else None)


def worst(f, g, channels: int, axes: int = 2) -> float:
    """Largest relative difference of two functions over inputs of odd and even sizes; infinite if
    shapes differ.
    """
    found = 0.0
    for size in SIZES:
        x = torch.randn(2, channels, *(size + i for i in range(axes)), dtype=torch.float64)
        a, b = f(x), g(x)
        if a.shape != b.shape:
            return float("inf")
        found = max(found, float((a - b).abs().max() / a.abs().max()))
    return found


def both(a: Kernel, b: Kernel) -> list[tuple[Axis, Axis]]:
    return list(zip(a.geometry.axes, b.geometry.axes, strict=True))


def test_call_is_the_convolution_it_says() -> None:
    x = torch.randn(2, 6, 9, 10, dtype=torch.float64)
    conv = torch.nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), groups=2).double()
    geometry = Geometry(6, 4, 2, (Axis(3, 2, 1, 1), Axis(2, 1, 0, 0)), True)
    assert torch.allclose(Kernel(geometry, conv.weight, conv.bias)(x), conv(x), rtol=0, atol=1e-13)
    depthwise = torch.nn.Conv2d(6, 6, 3, 2, 1, groups=6).double()
    geometry = Geometry(6, 6, 6, (Axis(3, 2, 1, 1), Axis(3, 2, 1, 1)), True)
    assert torch.allclose(
        Kernel(geometry, depthwise.weight, depthwise.bias)(x), depthwise(x), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_then_is_composition(axes: int) -> None:
    rng = random.Random(axes)
    exact = refused = 0
    for _ in range(250 if axes == 2 else 60):
        i, m, o = (rng.choice([2, 4, 8]) for _ in range(3))
        a, b = random_map(rng, i, m, axes=axes), random_map(rng, m, o, axes=axes)
        try:
            merged = a.then(b)
        except Inexact:
            refused += 1
            continue
        exact += 1
        assert merged.geometry == a.geometry.then(b.geometry)
        if axes < 3:
            assert worst(lambda x, a=a, b=b: b(a(x)), merged, i, axes) < 1e-12, (
                a.geometry,
                b.geometry,
            )
    assert exact >= 10 and refused >= 10


def test_refusals_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `then` refuses and both maps read more than their padding hides, forcing it gives a
    wrong border.
    """
    rng = random.Random(7)
    needless = forced = 0
    check = Geometry._paddable_by
    for _ in range(300):
        a, b = random_map(rng, 2, 4), random_map(rng, 4, 2)
        monkeypatch.setattr(Geometry, "_paddable_by", check)
        try:
            a.then(b)
        except Inexact:
            monkeypatch.setattr(Geometry, "_paddable_by", lambda *_: None)
            forced += 1
            needless += worst(lambda x, a=a, b=b: b(a(x)), a.then(b), 2) < 1e-12
    assert forced > 50
    assert (
        needless <= 0.02 * forced
    )  # strides that step over the border are refused though they would do


def test_plus_is_addition() -> None:
    rng = random.Random(3)
    exact = refused = 0
    for _ in range(400):
        a, b = random_map(rng, 4, 4), random_map(rng, 4, 4)
        if rng.random() < 0.3:  # two maps of one size are rare by chance: give b the sizes of a
            lines = [
                Axis(q.taps, p.stride, q.before, p.surplus + q.taps - q.before)
                for p, q in both(a, b)
            ]
            b = Kernel(replace(b.geometry, axes=tuple(lines)), b.weight, b.bias)
        same = all(p.stride == q.stride and p.surplus == q.surplus for p, q in both(a, b))
        try:
            merged = a + b
        except Inexact:
            refused += 1
            assert not same
            continue
        exact += 1
        assert same and worst(lambda x, a=a, b=b: a(x) + b(x), merged, 4) < 1e-12
    assert exact > 80 and refused > 80


def test_a_zero_valued_bias_is_a_bias() -> None:
    one = Kernel(Geometry.conv(4, 4, (1, 1), bias=True), torch.randn(4, 4, 1, 1), torch.zeros(4))
    three = Kernel(Geometry.conv(4, 4, (3, 3), pad=(1, 1)), torch.randn(4, 4, 3, 3))
    with pytest.raises(Inexact, match="bias is padded"):
        one.then(three)
    bare = Kernel(Geometry.conv(4, 4, (1, 1)), one.weight)
    assert bare.then(three).bias is None


def test_impulse_agrees_with_the_formula() -> None:
    rng = random.Random(5)
    for _ in range(60):
        a, b = random_map(rng, 4, 8), random_map(rng, 8, 4)
        try:
            merged = a.then(b)
        except Inexact:
            continue
        probed = impulse_response(lambda x, a=a, b=b: b(a(x)), merged.geometry)
        assert torch.allclose(probed.weight, merged.weight, rtol=0, atol=1e-12)
        assert (probed.bias is None) == (merged.bias is None)
        assert merged.bias is None or torch.allclose(probed.bias, merged.bias, rtol=0, atol=1e-12)


def test_impulse_is_differentiable() -> None:
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    geometry = Geometry.conv(2, 2, (3, 3), pad=(1, 1))
    kernel = impulse_response(lambda x: F.conv2d(x, w, padding=1), geometry)
    kernel.weight.square().sum().backward()
    assert torch.allclose(w.grad, 2 * w)


def test_groups_of_a_sum_are_those_both_have() -> None:
    grouped = Kernel(Geometry.conv(8, 8, (1, 1), groups=4), torch.randn(8, 2, 1, 1))
    identity = Kernel.identity(Geometry.identity(8, 2), grouped.weight)
    assert (grouped + identity).geometry.groups == 4
    assert (
        grouped + Kernel(Geometry.conv(8, 8, (1, 1), groups=2), torch.randn(8, 4, 1, 1))
    ).geometry.groups == 2


def test_mirrored_padding_composes_with_1x1_only() -> None:
    reflect = Geometry(4, 4, 1, (Axis(3, 1, 1, 1),) * 2, mode="reflect")
    point = Geometry.conv(4, 4, (1, 1), bias=True)
    assert point.then(reflect).mode == "reflect"
    with pytest.raises(Inexact, match="not 1x1"):
        Geometry.conv(4, 4, (3, 3)).then(reflect)
    with pytest.raises(Inexact, match="in different ways"):
        reflect + Geometry.conv(4, 4, (3, 3), pad=(1, 1))
    assert (reflect + point).mode == "reflect"


def test_dilated_kernels_that_interleave() -> None:
    """Taps 0 and 2 of one branch, tap 1 of another: together they have no gap."""
    x = torch.randn(1, 3, 9, 8, dtype=torch.float64)
    wide = Geometry(3, 3, 1, (Axis(3, 1, 1, 1, gap=2), Axis()))
    a = Kernel(wide, torch.randn(3, 3, 2, 1, dtype=torch.float64))
    b = Kernel(Geometry.conv(3, 3, (1, 1)), torch.randn(3, 3, 1, 1, dtype=torch.float64))
    both = a + b
    assert both.geometry.axes[0].gap == 1 and both.weight.shape[2] == 3
    assert wide.taps == a.weight.shape[2] == 2
    torch.testing.assert_close(both(x), a(x) + b(x))
    bare = Geometry(3, 3, 1, (Axis(3, gap=2), Axis()))
    then = a.then(Kernel(bare, a.weight.flip(1)))
    assert then.geometry.axes[0].gap == 2 and then.weight.shape[2] == 3


@pytest.mark.parametrize(("groups", "fewer"), [(4, 1), (4, 2), (6, 2), (6, 3), (12, 4)])
def test_groups_are_put_in_and_taken_out(groups: int, fewer: int) -> None:
    weight = torch.randn(24, 24 // groups, 3)
    block = _regroup(weight, groups, fewer)
    assert block.shape == (24, 24 // fewer, 3)
    assert torch.equal(_regroup(block, fewer, groups), weight)
    x = torch.randn(1, 24, 9)
    torch.testing.assert_close(F.conv1d(x, block, groups=fewer), F.conv1d(x, weight, groups=groups))
