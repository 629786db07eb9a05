"""Grids, ranges and calibration."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.blocks import RepVGG
from repfx.calibration import correct_biases
from repfx.quant import METHODS, FakeQuant, Grid, Observer, search_scale
from repfx.quant.histogram import LARGE, RUN, RUNS
from repfx.testing import assert_same, randomise

POWERS = {"mse": 2.0, "mae": 1.0}


def error(v: Tensor, scale: Tensor, grid: Grid, power: float) -> float:
    return float((grid.quantize(v, scale) - v).abs().pow(power).sum())


@pytest.mark.parametrize(
    "grid", [Grid(8), Grid(4), Grid(8, signed=False), Grid(2), Grid(8, full=True)], ids=str
)
def test_codes_stay_in_range_and_quantizing_is_idempotent(grid: Grid) -> None:
    v, scale = torch.randn(1000) * 3, torch.tensor(0.037)
    codes = grid.codes(v, scale)
    assert codes.min() >= grid.low and codes.max() <= grid.high
    assert torch.equal(codes, codes.round())
    q = grid.quantize(v, scale)
    assert torch.allclose(q, codes * scale, atol=1e-6)
    assert torch.equal(grid.codes(q, scale), codes)


def test_the_straight_through_gradient_is_one_inside_and_zero_outside() -> None:
    grid, scale = Grid(4), torch.tensor(0.5)
    v = torch.tensor([-10.0, -1.3, 0.2, 3.4, 3.6, 9.0], requires_grad=True)
    grid.quantize(v, scale).sum().backward()
    assert v.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_ties_round_to_even() -> None:
    assert Grid(8).codes(torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.tensor(1.0)).tolist() == [
        0,
        2,
        2,
        0,
    ]


@pytest.mark.parametrize("bits", [16, 10, 8, 6, 4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("method", "power"), POWERS.items())
def test_streamed_ranges_are_as_good_as_exact_ones(
    method: str, power: float, signed: bool, bits: int
) -> None:
    """The histogram's choice has at most 1 % more error than the best of 2000 scales tried on the
    values themselves.
    """
    generator = torch.Generator().manual_seed(bits)
    grid = Grid(bits, signed)
    v = torch.randn(40000, generator=generator) * torch.rand(40000, generator=generator)
    v = v if signed else v.relu()
    observer = Observer(grid)
    for part in v[v.abs().argsort()].split(
        [100, 1000, 8900, 30000]
    ):  # growing, so that the histogram widens often
        observer.see(part)
    top = v.abs().max() / grid.high
    best = min(error(v, top * i / 2000, grid, power) for i in range(20, 2001, 4))
    assert error(v, observer.scale(method), grid, power) <= 1.01 * best
    assert torch.isclose(observer.scale("max"), top)
    small = Observer(grid)
    small.see(v * 1e-25)
    assert float(small.scale(method)) * 1e25 == pytest.approx(
        float(observer.scale(method)), rel=0.03
    )


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("channels", [16, 96, 210])
def test_a_sample_of_a_large_tensor_stands_for_all_of_it(method: str, channels: int) -> None:
    """Channels of different sizes, side by side in memory: the sample sees each of them alike."""
    generator = torch.Generator().manual_seed(channels)
    sizes = torch.arange(1, channels + 1) / channels
    x = torch.randn(2**21 // (channels * 64), channels, 8, 8, generator=generator) * sizes.reshape(
        1, -1, 1, 1
    )
    sampled, whole = Observer(Grid(6)), Observer(Grid(6))
    sampled.see(x.to(memory_format=torch.channels_last))
    for part in x.split((LARGE - 1) // (channels * 64)):
        assert part.numel() < LARGE
        whole.see(part)
    assert float(sampled.scale("max")) == float(whole.scale("max")) == float(x.abs().max() / 31)
    scales = sampled.scale(method), whole.scale(method)
    if method in POWERS:
        errors = [error(x, scale, Grid(6), POWERS[method]) for scale in scales]
        assert errors[0] <= 1.02 * errors[1]
    else:
        near = 0.2 if method == "entropy" else 0.01  # the divergence is flat about its least value
        assert float(scales[0]) == pytest.approx(float(scales[1]), rel=near)
    assert sampled.histogram is not None
    assert float(sampled.histogram.counts().sum()) == pytest.approx(x.numel(), rel=1e-3)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("method", ["percentile", "mse", "mae"])
def test_the_tail_of_a_large_tensor_is_counted(method: str, signed: bool) -> None:
    """A sample would miss large values, or count one of them for many; here channels and pictures
    differ as well.
    """
    torch.manual_seed(0)
    shape, grid = (30, 24, 40, 41), Grid(8, signed)
    sizes = torch.exp(torch.randn(1, 24, 1, 1))
    batches = [
        torch.randn(shape) / torch.rand(shape).sqrt() * sizes * torch.exp(torch.randn(30, 1, 1, 1))
        for _ in "abc"
    ]
    counted, exact = Observer(grid), Observer(grid)
    for x in batches:
        x = -x.abs() if signed and x is batches[0] else x
        counted.see(x.to(memory_format=torch.channels_last))
        for picture in x.split(1):
            assert picture.numel() < LARGE < x.numel()
            exact.see(picture)
    assert counted.histogram is not None and exact.histogram is not None
    assert float(counted.scale("max")) == float(exact.scale("max"))
    assert float(counted.histogram.counts().sum()) == pytest.approx(
        float(exact.histogram.counts().sum()), rel=0.01
    )
    if method == "percentile":
        assert float(counted.scale(method)) == pytest.approx(float(exact.scale(method)), rel=0.01)
    else:
        all_of = [
            sum(error(x, o.scale(method), grid, POWERS[method]) for x in batches)
            for o in (counted, exact)
        ]
        assert all_of[0] <= 1.02 * all_of[1]


@pytest.mark.parametrize("pictures", [4, 8])
def test_large_values_at_one_place_of_every_picture_are_counted(pictures: int) -> None:
    """As in a token of a transformer. Blocks that find it in several pictures would count it
    once."""
    torch.manual_seed(0)
    observer, large = Observer(Grid(8)), 0
    for _ in range(4):
        x = torch.randn(pictures, 197, 384)
        x[:, 0] = 100 + 100 * torch.rand(pictures, 384)
        observer.see(x)
        large += int((x > 90).sum())
    assert observer.histogram is not None
    counts = observer.histogram.counts()
    assert float(counts[int(90 / observer.histogram.limit * len(counts)) :].sum()) == pytest.approx(
        large, rel=0.35
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["mse", "mae"])
def test_pictures_may_differ_in_size(method: str, bits: int) -> None:
    """Blocks alone would count one of those of the one large picture for many."""
    torch.manual_seed(0)
    batches = [torch.randn(1, 64, 36, 36) * (10 if i == 3 else 1) for i in range(8)]
    sampled, whole = Observer(Grid(bits)), Observer(Grid(bits))
    for x in batches:
        sampled.see(x)
        for part in x.flatten().split(LARGE - 1):
            whole.see(part)
    errors = [
        sum(error(x, o.scale(method), Grid(bits), POWERS[method]) for x in batches)
        for o in (sampled, whole)
    ]
    assert errors[0] <= 1.2 * errors[1]


def test_the_best_range_may_be_a_small_share_of_the_largest_value() -> None:
    """Between coarse steps of the search, where all but one value would round to 0."""
    v = torch.cat(
        [
            torch.randint(-3, 4, (50000,), generator=torch.Generator().manual_seed(0)).float(),
            torch.tensor([2000.0]),
        ]
    )
    observer, grid = Observer(Grid(4)), Grid(4)
    observer.see(v)
    best = min(error(v, torch.tensor(2000 / 7 * i / 256), grid, 1.0) for i in range(1, 257))
    assert error(v, observer.scale("mae"), grid, 1.0) <= 1.05 * best


@pytest.mark.parametrize("bits", [4, 8, 10])
@pytest.mark.parametrize("outlier", [1e3, 1e4, 1e5, 1e7])
def test_most_values_may_lie_in_the_first_bin(outlier: float, bits: int) -> None:
    """Where they fill little of it, no clip does them good: to give up the outlier would be for
    nothing.
    """
    v = torch.cat(
        [torch.randn(40000, generator=torch.Generator().manual_seed(0)), torch.tensor([outlier])]
    )
    for method, power in POWERS.items():
        observer, grid = Observer(Grid(bits)), Grid(bits)
        observer.see(v)
        best = min(
            error(v, torch.tensor(outlier / grid.high * i / 256), grid, power)
            for i in range(1, 257, 5)
        )
        assert error(v, observer.scale(method), grid, power) <= 1.02 * best


@pytest.mark.parametrize("histogram", [True, False])
def test_whole_numbers_are_values_too(histogram: bool) -> None:
    for x in (
        torch.tensor([3, 200], dtype=torch.uint8),
        torch.full((3 * LARGE,), 200, dtype=torch.uint8),
    ):
        observer = Observer(Grid(8), histogram)
        observer.see(x)
        assert float(observer.scale("max")) * 127 == pytest.approx(200)


@pytest.mark.parametrize("pictures", [63, 64])  # the first makes a step of 16 n, if nothing is done
def test_a_large_channel_is_spread_over_the_blocks(pictures: int) -> None:
    """Else its values fill some blocks, which count one value each."""
    random = torch.Generator().manual_seed(0)
    several = [torch.randn(pictures, 16, 32, 32, generator=random) for _ in range(8)]
    observer = Observer(Grid(8))
    for x in several:
        x[:, 3] *= 100
        observer.see(x.to(memory_format=torch.channels_last))
    assert observer.histogram is not None
    counts = observer.histogram.counts()
    for size in (30, 100, 200, 300):
        above = counts[int(size / observer.histogram.limit * len(counts)) :].sum()
        exact = sum(int((x.abs() > size).sum()) for x in several)
        # The body is a sample: three standard errors.
        sampled = exact * RUNS * RUN / several[0].numel()
        assert float(above) == pytest.approx(exact, rel=0.02 + 3 / sampled**0.5), size


def test_a_large_place_in_every_picture_is_spread_over_the_blocks() -> None:
    for pictures, channels, size in ((128, 64, 8), (32, 16, 32), (100, 24, 16), (134, 32, 16)):
        x = torch.randn(pictures, channels, size, size, generator=torch.Generator().manual_seed(0))
        x[:, :, 2:4, 2:4] *= 20
        observer = Observer(Grid(8))
        observer.see(x.to(memory_format=torch.channels_last))
        exact = float(x.abs().flatten().kthvalue(x.numel() - x.numel() // 10000).values)
        assert float(observer.scale("percentile")) * 127 == pytest.approx(exact, rel=0.01), pictures


def test_the_body_is_sampled_at_all_places_and_sizes_weigh_by_their_values() -> None:
    """Rows of different size, where a regular step would read some rows only; a small tensor beside
    a large one.
    """
    torch.manual_seed(0)
    large = torch.randn(32, 64, 56, 56) * torch.linspace(0.3, 2, 56).reshape(-1, 1)
    for batches in ([large], [large[:8], large[:8, :, :14, :14] * 8, large[8:16]]):
        for method in ("mse", "mae"):
            sampled, whole = Observer(Grid(4)), Observer(Grid(4))
            for x in batches:
                sampled.see(x)
                for part in x.flatten().split(LARGE - 1):
                    whole.see(part)
            errors = [
                sum(error(x, o.scale(method), Grid(4), POWERS[method]) for x in batches)
                for o in (sampled, whole)
            ]
            assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize("histogram", [True, False])
@pytest.mark.parametrize("size", [4, 64])
def test_parts_of_a_tensor_are_values_too(size: int, histogram: bool) -> None:
    """What lies between them in memory, and past their end, is not."""
    whole = torch.full((8, 64, size, 2 * size), 9.0)
    for part in (
        whole[:, ::2],
        whole[..., ::2],
        whole[:, 4:20, :, 1:].to(memory_format=torch.channels_last)[:, 1:],
    ):
        part.copy_(torch.rand(part.shape, generator=torch.Generator().manual_seed(size)))
        observer = Observer(Grid(8), histogram)
        observer.see(part)
        assert float(observer.scale("max")) * 127 == pytest.approx(float(part.max()))
        assert observer.histogram is None or float(
            observer.histogram.counts().sum()
        ) == pytest.approx(part.numel(), rel=1e-3)


@pytest.mark.parametrize("size", [300, 3 * LARGE])
def test_precision_may_change_between_batches(size: int) -> None:
    observer, x = Observer(Grid(8)), torch.randn(size, generator=torch.Generator().manual_seed(0))
    kinds = (torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float64)
    for kind in kinds:
        observer.see(x.to(kind))
    assert observer.histogram is not None and observer.seen == len(kinds) * size
    assert float(observer.histogram.counts().sum()) == pytest.approx(len(kinds) * size, rel=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_lone_peak_in_a_large_tensor_is_not_missed(method: str) -> None:
    for at in (1, 12345, -1):
        x = torch.zeros(2**20)
        x[at] = 3.0
        observer = Observer(Grid(8, signed=False))
        observer.see(x)
        scale = float(observer.scale(method))
        assert (
            (scale < 3 / 254)
            if method == "percentile"
            else scale == pytest.approx(3 / 255, rel=0.01)
        )


@pytest.mark.parametrize("signed", [True, False])
def test_entropy_is_the_least_divergence(signed: bool) -> None:
    """Against the divergence as it is defined, bin by bin, for every clip at the end of a bin."""
    generator, grid = torch.Generator().manual_seed(0), Grid(4, signed)
    observer = Observer(grid)
    values = torch.randn(20000, generator=generator).abs() ** 2
    values[:3] *= 4
    observer.see(values)
    assert observer.histogram is not None
    counts, levels = observer.histogram.counts(), grid.high + 1

    def divergence(stop: int) -> float:
        p, q = counts[:stop].clone(), torch.zeros(stop, dtype=torch.float64)
        p[-1] += counts[stop:].sum()
        edges = torch.linspace(0, stop, levels + 1).round().long().tolist()
        for a, b in itertools.pairwise(edges):
            held = counts[a:b] > 0
            q[a:b][held] = counts[a:b].sum() / held.sum().clamp(min=1)
        p, q = p / p.sum(), (q / q.sum()).clamp(min=1e-12)
        return float(torch.xlogy(p, p / q).sum())

    bins = 4096
    found = round(float(observer.scale("entropy")) * grid.high / observer.histogram.limit * bins)
    assert levels < found < 0.9 * bins
    assert divergence(found) <= min(divergence(stop) for stop in range(levels, bins + 1, 7)) + 2e-3


def test_entropy_of_few_values_clips_none() -> None:
    """Clips at whole numbers lose no entropy, the narrowest neither."""
    observer = Observer(Grid(8))
    observer.see(torch.randint(-5, 6, (400,), generator=torch.Generator().manual_seed(0)))
    assert float(observer.scale("entropy")) == float(observer.scale("max"))


def test_percentile_clips_the_share_it_says() -> None:
    grid, v = Grid(8), torch.randn(200000, generator=torch.Generator().manual_seed(0))
    observer = Observer(grid)
    observer.see(v)
    clip = observer.scale("percentile") * grid.high
    assert 0.5e-4 < float((v.abs() > clip).float().mean()) < 1.5e-4
    relu = Observer(Grid(8, signed=False))
    relu.see(v.relu())  # half zeros: they count among the values
    clip = relu.scale("percentile") * 255
    assert 0.5e-4 < float((v > clip).float().mean()) < 1.5e-4


def test_entropy_clips_outliers_and_keeps_a_uniform_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(100000, generator=generator).relu()
    v[:100] *= 50
    outliers = Observer(Grid(6, signed=False))
    outliers.see(v)
    assert outliers.scale("entropy") < 0.3 * outliers.scale("max")
    uniform = Observer(Grid(6, signed=False))
    uniform.see(torch.rand(100000, generator=generator))
    assert uniform.scale("entropy") > 0.9 * uniform.scale("max")


def test_mae_clips_at_least_as_hard_as_mse() -> None:
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(100000, generator=generator).relu()
    v[:100] *= 50
    observer = Observer(Grid(6, signed=False))
    observer.see(v)
    assert observer.scale("mae") <= observer.scale("mse") < observer.scale("max")


def test_search_per_channel_beats_the_largest_value() -> None:
    w = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, axis=0)
    best, largest = search_scale(w, grid, 2.0), grid.amax(w) / grid.high
    assert best.shape == (8,) and error(w, best, grid, 2.0) < error(w, largest, grid, 2.0)
    one = torch.stack([search_scale(row, Grid(4), 2.0) for row in w])
    assert torch.allclose(best, one)


def model() -> nn.Module:
    blocks = RepVGG(3, 8, 3, padding=1), nn.ReLU(), RepVGG(8, 8, 3, padding=1), nn.ReLU()
    return randomise(
        nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    )


def pictures(n: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(n)]


def test_ptq_adds_quantizers_and_keeps_every_key() -> None:
    fused = repfx.transform(model(), ["fuse"])
    quantized = repfx.transform(model(), ["ptq"])
    keys = set(quantized.state_dict())
    assert set(fused.state_dict()) <= keys
    extra = {k.rpartition(".")[0].rpartition(".")[2] for k in keys - set(fused.state_dict())}
    assert extra == {"input_quant", "weight_quant"}
    assert (
        len(keys - set(fused.state_dict())) == 7
    )  # an input and a weight for each layer, and the input of the pool
    assert not any(r.inserted for r in repfx.transform(quantized, ["ptq"]).meta["repfx"].results)


def test_uncalibrated_activations_pass_through() -> None:
    net = model()
    assert repfx.verify(net, repfx.transform(net, ["ptq(weight_bits=16)"]), pictures()[0]).sqnr > 80


@pytest.mark.parametrize("method", METHODS)
def test_eight_bits_are_close(method: str) -> None:
    net = model()
    quantized = repfx.calibrate(repfx.transform(net, ["ptq"]), pictures(), method=method)
    assert repfx.verify(net, quantized, pictures()[0]).sqnr > 28
    narrow = repfx.calibrate(repfx.transform(net, ["ptq(bits=4)"]), pictures(), method=method)
    assert (
        repfx.verify(net, narrow, pictures()[0]).sqnr
        < repfx.verify(net, quantized, pictures()[0]).sqnr
    )


def test_targets_choose_number_formats() -> None:
    signs = {}
    for target in ("tensorrt", "onnxruntime"):
        quantized = repfx.transform(model(), ["ptq"], target=target)
        signs[target] = [
            m.grid.signed
            for m in quantized.modules()
            if isinstance(m, FakeQuant) and not m.of_weight
        ]
    assert signs["tensorrt"] == [True, True, True, True]  # the average pool runs in integers, too
    assert signs["onnxruntime"] == [
        True,
        False,
        False,
        False,
    ]  # the input may be negative, what follows a ReLU may not


def test_layers_that_read_one_value_share_its_quantizer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x)) + torch.relu(self.b(x))

    quantized = repfx.transform(Two(), ["ptq"])
    assert sum(isinstance(m, FakeQuant) and not m.of_weight for m in quantized.modules()) == 1


def test_fake_quant_computes_what_it_says() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, padding_mode="reflect"), nn.ReLU())
    quantized = repfx.calibrate(repfx.transform(net, ["ptq"]), pictures(1))
    x = pictures(1)[0]
    inputs, weights = (
        quantized.get_submodule("0.input_quant"),
        quantized.get_submodule("0.weight_quant"),
    )
    assert torch.isclose(inputs.scale, x.abs().max() / 127)
    assert torch.allclose(weights.scale, net[0].weight.abs().amax((1, 2, 3)) / 127)
    by_hand = torch.nn.functional.pad(inputs.codes(x) * inputs.scale, (1, 1, 1, 1), "reflect")
    codes = weights.codes(net[0].weight) * weights.scale.reshape(-1, 1, 1, 1)
    want = torch.relu(torch.nn.functional.conv2d(by_hand, codes, net[0].bias, 2))
    assert torch.allclose(quantized.eval()(x), want, atol=1e-5)


@pytest.mark.parametrize("method", ["max", "mse"])
def test_ranges_see_both_signs_unless_structure_rules_one_out(method: str) -> None:
    """After a ReLU no value is looked at for its sign; before one, the largest are negative."""

    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).clamp(max=0)) + torch.relu(x))

    torch.manual_seed(0)
    net, x = Bent().eval().requires_grad_(False), torch.randn(64, 4, 20, 20)
    quantized = repfx.calibrate(repfx.transform(net, ["ptq"]), [x], method=method)
    scales = {
        n: float(m.scale)
        for n, m in quantized.named_modules()
        if isinstance(m, FakeQuant) and not m.of_weight
    }
    bent = net.a(x).clamp(max=0)
    tops = {"b.input_quant": -bent.amin(), "c.input_quant": (net.b(bent) + x.relu()).abs().amax()}
    assert scales.keys() >= tops.keys()
    for name, top in tops.items():
        assert (
            float(top) / 127 * (0.4 if method == "mse" else 0.9999)
            < scales[name]
            < float(top) / 127 * 1.0001
        ), name


def test_ranges_are_those_of_the_float_model() -> None:
    net = model()
    fused, seen = repfx.transform(net, ["fuse"]).eval(), []
    fused.get_submodule("2.main.conv").register_forward_pre_hook(
        lambda m, args: seen.append(float(args[0].abs().max()))
    )
    for batch in pictures():
        fused(batch)
    quantized = repfx.transform(net, ["ptq(bits=4)"])
    repfx.calibrate(quantized, pictures())
    repfx.calibrate(quantized, pictures())  # a second time: what is quantized by now must not show
    scale = float(quantized.get_submodule("2.main.conv.input_quant").scale)
    assert scale == pytest.approx(max(seen) / 7, rel=1e-5)


def alive() -> int:
    """Bytes of the tensors that are still referred to; fake ones have no memory."""
    gc.collect()
    found = [
        o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and o.device.type == "cpu"
    ]
    return sum({o.data_ptr(): o.untyped_storage().nbytes() for o in found}.values())


@pytest.mark.parametrize("method", ["max", "mse"])
def test_memory_is_flat_in_the_number_of_batches(method: str) -> None:
    quantized, sizes = repfx.transform(model(), ["ptq"]), []
    gc.collect()
    gc.freeze()  # so that only new objects are looked through

    def batches() -> Iterator[Tensor]:
        for _ in range(12):
            sizes.append(alive())
            yield torch.randn(4, 3, 12, 12)

    try:
        repfx.calibrate(quantized, batches(), method=method)
    finally:
        gc.unfreeze()
    assert sizes[1] > 0 and max(sizes[2:]) <= sizes[1]
    assert all(m.observer is None for m in quantized.modules() if isinstance(m, FakeQuant))


def test_calibration_refuses_what_it_cannot_use() -> None:
    quantized = repfx.transform(model(), ["ptq"])
    with pytest.raises(
        repfx.InputError, match=r"unknown method 'mad'; choose one of: entropy, mae"
    ):
        repfx.calibrate(quantized, pictures(), method="mad")
    with pytest.raises(repfx.InputError, match="no image in batches: give at least one batch"):
        repfx.calibrate(quantized, [])
    with pytest.raises(repfx.InputError, match="does not take a batch of shape"):
        repfx.calibrate(quantized, [torch.zeros(1, 4, 8, 8)])
    with pytest.raises(repfx.InputError, match="NaN"):
        repfx.calibrate(quantized, [torch.full((1, 3, 8, 8), float("nan"))])
    with pytest.raises(repfx.InputError, match="no quantizers"):
        repfx.calibrate(model(), pictures())
    assert not any(
        m.calibrated for m in quantized.modules() if isinstance(m, FakeQuant) and not m.of_weight
    )
    assert repfx.verify(quantized, repfx.transform(quantized, []), pictures()[0]).max_abs == 0


def test_scales_travel_by_state_dict() -> None:
    net = model()
    quantized = repfx.calibrate(repfx.transform(net, ["ptq"]), pictures())
    other = repfx.transform(net, ["ptq"])
    other.load_state_dict(quantized.state_dict())
    assert_same(quantized, other, pictures()[0], 0.0)


class Residual(nn.Module):
    """Two of them: the skip is the input, or a convolution of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, 2)
        self.a, self.b = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.c, self.d = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = torch.relu(self.d(torch.relu(self.c(x))) + self.down(x))
        return self.head(x.mean((2, 3)))


def test_biases_take_off_what_rounding_adds() -> None:
    net = randomise(
        nn.Sequential(
            RepVGG(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        )
    )
    net = net.eval()
    xs = [torch.randn(16, 3, 12, 12) for _ in range(3)]
    plain, fixed = (repfx.transform(net, ["ptq(bits=4)"], example=xs[0]) for _ in range(2))
    repfx.calibrate(plain, iter(xs), method="mse")
    repfx.calibrate(fixed, ((x, None) for x in xs), method="mse", bias=True)
    x = torch.cat(xs)
    with torch.no_grad():
        want, before, after = net(x), plain(x), fixed(x)
    bias = [(y - want).mean((0, 2, 3)).abs().max() for y in (before, after)]
    assert bias[1] < 1e-3 * bias[0] and bias[0] > 1e-3
    assert correct_biases(fixed, xs) == ("2",), "it has no bias to correct"
    held = {
        n: b for n, b in plain.state_dict().items() if not torch.equal(b, fixed.state_dict()[n])
    }
    assert set(held) == {"0.main.conv.bias", "4.bias"}
    with pytest.raises(repfx.InputError, match="at least one batch"):
        correct_biases(fixed, [])
    with pytest.raises(repfx.InputError, match="traced whole"):
        repfx.calibrate(nn.Sequential(fixed), xs, bias=True)


def test_biases_are_corrected_through_an_affine() -> None:
    """The affine of qprep stands between a layer and its bias, or is the only one it has."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)).eval()
    x = torch.randn(16, 3, 12, 12)
    plain, fixed = (repfx.transform(net, ["ptq(bits=3)", "qprep"], example=x) for _ in range(2))
    repfx.calibrate(plain, [x])
    repfx.calibrate(fixed, [x], bias=True)
    with torch.no_grad():
        want, before, after, folded = (
            net(x),
            plain(x),
            fixed(x),
            repfx.transform(fixed, ["fuse"])(x),
        )
    off = [float((y - want).mean((0, 2, 3)).abs().max()) for y in (before, after, folded)]
    assert off[1] < 1e-3 * off[0] and off[2] < 1e-3 * off[0] and off[0] > 1e-3
    assert correct_biases(fixed, [x]) == ()


def test_what_biases_cannot_be_corrected_with_is_told() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    x = torch.randn(8, 3, 12, 12)
    model = repfx.transform(Tied().eval(), ["ptq"], example=x)
    with pytest.raises(repfx.InputError, match="is not calibrated"):
        correct_biases(model, [x])
    repfx.calibrate(model, [x])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert correct_biases(model, [x]) == ("a", "b")  # one bias in two layers
    for bad, text in (
        ([x * float("nan")], "holds NaN"),
        ([x[:0]], "at least one batch"),
        ([x[:, :2]], r"does not take a batch of shape \(8, 2, 12, 12\)"),
    ):
        with pytest.raises(repfx.InputError, match=text):
            correct_biases(model, bad)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["max", "mse"])
def test_a_model_that_overwrites_its_input_leaves_the_pictures_alone(method: str) -> None:
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 3, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(torch.relu(self.conv(x.sub_(0.5)))))

    net, x = Shifts().eval(), torch.rand(8, 3, 12, 12)
    kept = x.clone()
    model = repfx.transform(net, ["ptq"], example=x.clone())
    repfx.calibrate(model, [x], method=method, bias=True)
    assert torch.equal(x, kept)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = repfx.sensitivity(model.train(), [x, {"x": x}])
    assert torch.equal(x, kept) and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(r.alone > 25 for r in found.rows)
    for bad, text in (
        ([x * float("nan")], "NaN or infinity"),
        ([x[:, :2]], "does not take"),
        ([()], "a tuple that begins with a tensor"),
        (None, "an iterable of batches"),
    ):
        with pytest.raises(repfx.InputError, match=text):
            repfx.sensitivity(model, bad)


class Pooled(nn.Module):
    """A max pool that two layers read, or `other` too."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.stem, self.pool, self.a, self.b = (
            nn.Conv2d(3, 8, 3),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(8, 4, 3),
        )
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.stem(x))
        found = self.a(y).mean((2, 3)) + self.b(y).mean((2, 3))
        return found + y.mean() if self.other else found


@pytest.mark.parametrize("name", ["ptq", "repq"])
@pytest.mark.parametrize("other", [False, True])
def test_quantizers_stand_before_a_max_pool_that_only_layers_read(name: str, other: bool) -> None:
    x = pictures()[0]
    net = Pooled(other).eval()
    quantized = repfx.transform(net, [name], example=x)
    if name == "ptq":
        repfx.calibrate(quantized, [x])
    else:
        quantized.train()(x)
        quantized.eval()
    nodes = {n.name: n for n in quantized.graph.nodes}
    names = {
        n for n, m in quantized.named_modules() if isinstance(m, FakeQuant) and not m.of_weight
    }
    assert names == {"stem.input_quant", "a.input_quant" if other else "pool.input_quant"}
    before = nodes["pool"].args[0]
    assert str(before.target).endswith("pool.input_quant") != other
    if not other:  # the same values as with the quantizer after the pool
        quant = quantized.get_submodule("pool.input_quant")
        seen = torch.nn.functional.max_pool2d(y := torch.randn(2, 8, 9, 9), 3, 2)
        assert torch.equal(torch.nn.functional.max_pool2d(quant(y), 3, 2), quant(seen))
    assert repfx.verify(net, quantized, x).sqnr > 25


def test_a_pool_called_by_keyword_and_one_that_a_block_reads() -> None:
    class Keyword(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            y = self.pool(input=self.stem(x))
            return self.a(y) + self.b(
                nn.functional.pad(y, (1, 1, 1, 1))
            )  # one convolution, a RepVGG block's

    net, x = Keyword(False).eval(), pictures()[0]
    for name in ("ptq", "repq"):
        quantized = repfx.transform(net, [name], example=x)
        names = {
            n for n, m in quantized.named_modules() if isinstance(m, FakeQuant) and not m.of_weight
        }
        assert names == {"stem.input_quant", "pool.input_quant"}, name


@pytest.mark.parametrize("method", sorted(METHODS))
def test_values_that_pile_up_at_the_end(method: str) -> None:
    observer, v = Observer(Grid(8)), (6 * torch.rand(4000)).minimum(torch.tensor(2.0))
    observer.see(v)
    scale = observer.scale(method)
    assert 2 / 127 * 0.97 < float(scale) < 2 / 127 * 1.03
    observer = Observer(Grid(8))
    for x in (torch.full((9,), 1e-38), torch.zeros(3), v):
        observer.see(x)
    assert float(observer.scale(method)) == pytest.approx(float(scale), rel=0.05)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
def test_training_quantizes_the_places_that_ptq_does(target: str, tmp_path: Path) -> None:
    net, x = Residual().eval(), pictures()[0]
    ready, trained = (
        repfx.transform(net, [name], target=target, example=x) for name in ("ptq", "repq")
    )
    places = [
        {n for n, m in g.named_modules() if isinstance(m, FakeQuant)} for g in (ready, trained)
    ]
    assert places[0] == places[1]
    y = trained.train()(x)
    y.square().mean().backward()
    fused = repfx.transform(trained.eval(), ["fuse"], target=target, example=x)
    assert repfx.lower(fused, tmp_path / "int8.onnx", example=x, target=target).parity.agrees
    if target == "tensorrt":
        assert not [f for f in repfx.lint(tmp_path / "int8.onnx") if f.severity in "EW"]


@pytest.mark.parametrize("to", [-500.0, -50.0, 50.0, 500.0])
def test_a_learned_step_is_positive_wherever_an_optimizer_takes_it(to: float) -> None:
    quant, x = FakeQuant(Grid(8), torch.tensor(0.1), learned=True), torch.randn(100)
    with torch.no_grad():
        quant.log_ratio.fill_(to)
    assert float(quant.step) > 0 and math.isfinite(float(quant.step))
    assert torch.equal(quant.eval()(x), quant.grid.quantize(x, quant.step))
    again = FakeQuant(Grid(8), learned=True)
    again.load_state_dict(quant.state_dict())
    assert again.calibrated and torch.equal(again.step, quant.step)
    with torch.no_grad():
        quant.log_ratio.fill_(math.copysign(2, to))
    (quant.train()(x) - x).square().sum().backward()
    grad = quant.log_ratio.grad
    assert grad is not None and float(grad) * to > 0, "it finds its way back"
    again.set_scale(torch.tensor(0.3))
    assert float(again.step.detach()) == pytest.approx(0.3)


def test_skips_and_averages_run_in_integers_where_the_target_wants_it() -> None:
    net = Residual().eval()
    for target, more in (
        ("tensorrt", {"add_1.input_quant", "mean.input_quant"}),
        ("openvino", {"add_1.input_quant", "mean.input_quant"}),
        (
            "onnxruntime",
            {"add.input_quant", "add_1.input_quant", "add_1.input_quant_1", "mean.input_quant"},
        ),
    ):
        quantized = repfx.transform(net, ["ptq"], target=target)
        names = {
            n for n, m in quantized.named_modules() if isinstance(m, FakeQuant) and not m.of_weight
        }
        layers = {f"{n}.input_quant" for n in ("stem", "a", "b", "c", "d", "head")}
        assert names == layers | more, names  # x is quantized for `a`, and for the sum by it
        nodes = {n.name: n for n in quantized.graph.nodes}
        if target == "tensorrt":
            read = [str(n.target) for n in nodes["add"].args]
            assert "a.input_quant" in read
            later = [n for n in nodes["add_1"].all_input_nodes if n.op == "call_module"]
            assert [str(n.target) for n in later] == ["add_1.input_quant"]
        repfx.calibrate(quantized, pictures(2))
        assert repfx.verify(net, quantized, pictures()[0]).sqnr > 25
        assert not any(
            r.inserted
            for r in repfx.transform(quantized, ["ptq"], target=target).meta["repfx"].results
        )


NEGATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "sub_": lambda y: (y.sub_(torch.sigmoid(y)), y)[1],
    "sub_ of a view": lambda y: (y.view(-1).sub_(2), y)[1],
    "setitem": lambda y: _with_first(y, -5.0),
    "cat with a constant": lambda y: torch.cat([y, torch.full((2, 2, 10, 10), -3.0)], 1)[:, 2:],
    "bicubic": lambda y: F.interpolate(y, scale_factor=2, mode="bicubic"),
}
POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "add_ of another": lambda y: y.add_(torch.sigmoid(y)),
    "cat of another": lambda y: torch.cat([y, torch.relu(y)], 1)[:, :4],
    "bilinear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
}


def _with_first(y: Tensor, value: float) -> Tensor:
    y[:, 0] = value
    return y


@pytest.mark.parametrize("name", [*NEGATIVE, *POSITIVE])
def test_signs_are_known_by_structure(name: str) -> None:
    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b((NEGATIVE | POSITIVE)[name](torch.relu(self.a(x))))
            return out

    torch.manual_seed(0)
    net, x = Bent().eval(), torch.randn(2, 3, 10, 10)
    for target in ("openvino", "tensorrt"):
        quantized = repfx.calibrate(repfx.transform(net, ["ptq"], example=x, target=target), [x])
        if target == "openvino":
            quants = {n: m for n, m in quantized.named_modules() if isinstance(m, FakeQuant)}
            assert quants["b.input_quant"].grid.signed == (name in NEGATIVE)
        with torch.no_grad():
            assert (quantized(x) - net(x)).norm() < 0.03 * net(x).norm()


def test_scales_depend_on_neither_order_nor_threads() -> None:
    """Large tensors of many sizes, some of them twice."""
    torch.manual_seed(0)
    sizes = [(4, 8, 48 + 5 * (i % 12), 48) for i in range(16)]
    seen = [torch.randn(s) * (1 + i % 5) for i, s in enumerate(sizes)]
    assert min(t.numel() for t in seen) >= LARGE
    threads, found = torch.get_num_threads(), []
    for count, order in ((1, 1), (2, 1), (2, -1)):
        torch.set_num_threads(count)
        observer = Observer(Grid(8))
        for t in seen[::order]:
            observer.see(t)
        found.append([float(observer.scale(m)) for m in ("percentile", "mse", "mae", "entropy")])
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    whole = Observer(Grid(8))
    for t in seen:
        for part in t.flatten().split(LARGE - 1):
            whole.see(part)
    exact = [float(whole.scale(m)) for m in ("percentile", "mse", "mae")]
    assert found[0][:3] == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "mae", "entropy"])
def test_the_scale_of_a_sign_is_the_mean(method: str) -> None:
    x = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    observer = Observer(Grid(1), histogram=method != "max")
    observer.see(x)
    assert float(observer.scale(method)) == pytest.approx(float(x.abs().mean()), rel=1e-3)


class Shared(nn.Module):
    """A pool, a layer, and two equal layers that read its value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool, self.stem = nn.AvgPool2d(2), nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(self.pool(x)))
        return self.a(x).mean((2, 3)), self.b(x).mean((2, 3))


def test_a_shared_quantizer_counts_for_each_of_its_readers() -> None:
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] *= 50  # so that the quantizer of the value costs more than the weights
    model = repfx.transform(Shared().eval(), [repfx.passes.Ptq(4, weight_bits=8)], example=x)
    found = repfx.sensitivity(repfx.calibrate(model, [x]), [x])
    rows = {r.layer: r for r in found.rows}
    assert set(rows) == {"stem", "a", "b"}, "what comes before the first layer goes with it"
    assert rows["a"].alone == pytest.approx(rows["b"].alone, rel=1e-6) and rows["a"].alone < 30
    assert set(found.worst(3)) == {"stem", "a", "b"}
