"""Segments: together they are the model; a long skip, a U-Net and a detector fall into small
blocks.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.calibration.activations import Rows
from repfx.calibration.segments import LARGEST, Segment, segments
from repfx.errors import InputError
from repfx.quant import FakeQuant
from repfx.testing import random_block, randomise


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = conv(width, width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x))


class LongSkip(nn.Module):
    """The shape of EDSR: residual blocks between two ends of one skip."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 12, 3, 1, 1)
        self.body = nn.Sequential(*(Residual(6) for _ in range(4)), nn.Conv2d(6, 6, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        return F.pixel_shuffle(self.tail(y + self.body(y)), 2)


class UNet(nn.Module):
    """Four levels, a skip at each but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(conv(i, o), conv(o, o)) for i, o in ((3, 4), (4, 6), (6, 8), (8, 8))
        )
        self.up = nn.ModuleList(
            nn.Sequential(conv(i, o), conv(o, o)) for i, o in ((16, 8), (14, 6), (10, 4))
        )
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for skip, level in zip(skips[-2::-1], self.up, strict=True):
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return self.out(x)


class Detector(nn.Module):
    """A neck that joins two sizes and a head on each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = conv(3, 6, 2), nn.Sequential(conv(6, 8, 2), conv(8, 8))
        self.neck = nn.Sequential(conv(14, 6), conv(6, 6))
        self.heads = nn.ModuleList(nn.Sequential(conv(i, 4), conv(4, 4)) for i in (6, 8))
        self.ends = nn.ModuleList([nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)])

    def forward(self, x: Tensor) -> dict[str, Any]:
        small = self.stem(x)
        deep = self.deep(small)
        both = self.neck(torch.cat([small, F.interpolate(deep, scale_factor=2.0)], 1))
        fine, coarse = (
            end(head(v)) for end, head, v in zip(self.ends, self.heads, (both, deep), strict=True)
        )
        return {"boxes": [fine, coarse], "feature": deep}


class Two(nn.Module):
    """Two inputs, joined late."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = conv(3, 4), conv(2, 4), nn.Conv2d(4, 3, 3)

    def forward(self, image: Tensor, depth: Tensor, unused: Tensor | None = None) -> Tensor:
        return self.both(self.left(image) + self.right(depth))


MODELS = {"long skip": LongSkip, "unet": UNet, "detector": Detector}


def pictures(n: int = 24, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, 16, 16, generator=torch.Generator().manual_seed(channels))


def quantized(kind: type[nn.Module], *passes: str, bits: int = 4, **inputs: Tensor) -> Any:
    torch.manual_seed(0)
    return repfx.transform(
        kind().eval(),
        [f"ptq(bits={bits}, weights=mse)", *passes],
        example=tuple(inputs.values()) or pictures(2),
    )


def leaves(y: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(y) if isinstance(t, Tensor)]


@torch.no_grad()
def through(found: list[Segment], *values: Tensor) -> tuple[Tensor, ...]:
    """What the segments give, one after the other; copied, as a cache does, so that no alias goes
    from one to the next.
    """
    for s in found:
        values = tuple(v.clone() for v in s(*values))
    return values


@pytest.mark.parametrize("name", MODELS)
def test_the_segments_are_the_model_and_small(name: str) -> None:
    x = pictures()
    model = repfx.calibrate(quantized(MODELS[name]), [x])
    found = segments(model, (x,))
    for mine, whole in zip(through(found, x), leaves(model(x)), strict=True):
        assert torch.equal(mine, whole)
    weights = [[m for m in s.modules(FakeQuant).values() if m.of_weight] for s in found]
    assert sum(map(len, weights)) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert max(map(len, weights)) <= LARGEST and any(s.passed for s in found)
    # Every place a user may name, one at a time.
    with pytest.raises(InputError, match="unknown end of a block 'no such'"):
        segments(model, (x,), ["no such"])
    for end in [s.name for s in found[:-1]] + (["cat"] if name != "long skip" else []):
        parts = segments(model, (x,), [end])
        assert [s.name for s in parts] == [end, "output"]
        assert all(
            torch.equal(a, b) for a, b in zip(through(parts, x), leaves(model(x)), strict=True)
        )


def test_residual_blocks_beside_a_long_skip_stay_whole() -> None:
    x = pictures()
    found = segments(quantized(LongSkip), (x,))
    # The first block's skip is the long one too, so that a place inside it is as narrow as one
    # beside it.
    assert [len(s.passed) for s in found] == [0, 0, 1, 1, 1, 1, 0, 0]
    counts = [sum(m.of_weight for m in s.modules(FakeQuant).values()) for s in found]
    assert counts == [1, 1, 1, 2, 2, 2, 1, 1]


@torch.no_grad()
def test_random_graphs() -> None:
    cut = wide = 0
    for seed in range(45):
        block, x = random_block(seed)
        if not any(isinstance(m, nn.Conv2d) for m in block.modules()):
            continue
        model = repfx.transform(block, ["ptq"], example=x, target="onnxruntime")
        if not isinstance(model, torch.fx.GraphModule):
            continue
        repfx.calibrate(model, [x])
        try:
            parts = [segments(model, (x,))]
        except InputError as error:
            assert "3 at a time" in str(error)  # some hold a tensor for each row of their x
            continue
        parts.append(segments(model, (x,), _names(model, x)))
        for found in parts:
            for mine, whole in zip(through(found, x), leaves(model(x)), strict=True):
                # Slices, copied, sum in other orders.
                assert torch.allclose(mine, whole, rtol=0, atol=1e-12), f"seed {seed}"
        cut, wide = cut + (len(parts[1]) > 1), wide + any(s.passed for s in parts[1])
    assert cut >= 20 and wide >= 10, (cut, wide)


def _names(model: nn.Module, x: Tensor) -> list[str]:
    """Every place that a block can end at, from the error that lists them."""
    with pytest.raises(InputError, match="unknown end") as error:
        segments(model, (x,), ["no such"])
    return [name for name in str(error.value).partition("choose one of: ")[2].split(", ") if name]


@pytest.mark.parametrize("name", MODELS)
def test_learning_a_block_at_a_time(name: str, tmp_path: Any) -> None:
    x = pictures(48)
    ranges = repfx.calibrate(quantized(MODELS[name]), [x], method="mse")
    model, cached = quantized(MODELS[name], "qprep"), quantized(MODELS[name], "qprep")
    options: dict[str, Any] = {"iterations": 25, "batch": 16, "lr": 1e-3, "drop": 0.25}
    options |= {"loss": "mae", "stage": 1.0}
    repfx.reconstruct(model, [x], **options)
    repfx.reconstruct(cached, x.split(20), **options, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(v, cached.state_dict()[k]) for k, v in model.state_dict().items())
    done = model.meta["reconstruct"]
    assert sum(b.after for b in done) < 0.99 * sum(b.before for b in done)
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    wanted = leaves(net(x))
    off = [
        sum(float((a - b).abs().mean()) for a, b in zip(leaves(m(x)), wanted, strict=True))
        for m in (model, ranges)
    ]
    assert off[0] < off[1]


def test_a_named_block_of_nothing_to_learn() -> None:
    model = quantized(Detector)
    repfx.reconstruct(model, [pictures()], iterations=2, batch=8, blocks=["deep.1.1", "cat"])
    done = model.meta["reconstruct"]
    assert [b.name for b in done] == ["deep.1.1", "cat", "output"] and done[1].before == done[
        1
    ].after


def test_several_inputs_come_by_name() -> None:
    image, depth = pictures(), pictures(channels=2)
    model = quantized(Two, image=image[:2], depth=depth[:2])
    before = copy.deepcopy(model.state_dict())
    repfx.reconstruct(model, [{"image": image, "depth": depth}], iterations=5, batch=8)
    assert not torch.equal(before["both.weight"], model.state_dict()["both.weight"])
    with pytest.raises(InputError, match="several inputs: a batch is a dict of image, depth"):
        repfx.reconstruct(model, [image])
    with pytest.raises(InputError, match="a batch has image, but no tensor depth"):
        repfx.reconstruct(model, [{"image": image}])
    with pytest.raises(InputError, match="all must be of one size"):
        repfx.reconstruct(model, [{"image": image, "depth": depth[:3]}])


class Pixels(nn.Module):
    """Overwrites its input, which it reads again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(conv(3, 3) for _ in range(9)))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.div_(4)
        return self.head(torch.cat([x, self.body(x)], 1))


class Three(nn.Module):
    """Values whose first dimension is 3 for any number of pictures, and in one place the rows of a
    map.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ways, self.end = nn.ModuleList(conv(3, 4) for _ in range(3)), nn.Conv2d(4, 5, 3)
        self.body = nn.Sequential(*(conv(5, 5) for _ in range(9)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.end(torch.stack([way(x) for way in self.ways]).mean(0)))
        grid = torch.arange(x.shape[2], dtype=x.dtype)
        return self.body(x) + grid[:, None]


class Outputs(nn.Module):
    """Outputs with and without a row for each picture, in floats and not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(3, 4), conv(4, 4))
        self.register_buffer(
            "anchors", torch.randn(16, 4)
        )  # as many as a batch of the test has pictures

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        one = self.anchors[:1]
        return {
            "y": y,
            "norm": y.abs().mean(),
            "anchors": self.anchors,
            "one": one,
            "best": y.argmax(1),
            "none": None,
            "size": 3,
        }


class Filters(nn.Module):
    """A convolution whose weight is a buffer, and one that gets its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3)
        self.register_buffer("blur", torch.full((4, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(torch.relu(self.first(x)), self.blur, padding=1, groups=4)
        return F.conv2d(input=torch.relu(x), weight=self.last.weight, bias=self.last.bias)


@pytest.mark.parametrize("kind", [Pixels, Three, Outputs, Filters])
def test_models_that_ask_for_care(kind: type[nn.Module]) -> None:
    x = pictures(49)  # the last batch has one
    torch.manual_seed(0)
    net = kind().eval()
    for m in (
        net.modules()
    ):  # else little of the picture is left after nine layers, and a rounding decides the rest
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
    kept, off = x.clone(), {}
    for name in ("ranges", "adaround", "straight"):
        model: Any = repfx.transform(
            net, ["ptq(bits=4, weights=mse)", "qprep"], example=pictures(2)
        )
        if name == "ranges":
            repfx.calibrate(model, [x], method="max")
        else:
            repfx.reconstruct(model, [x], iterations=40, batch=16, rounding=name)
            done = model.meta["reconstruct"]
            assert sum(b.after for b in done) < sum(b.before for b in done)
        assert torch.equal(x, kept)
        with torch.no_grad():
            wanted, given = (next(iter(leaves(m(x.clone())))) for m in (net, model))
        off[name] = float((given - wanted).abs().mean())
    assert max(off["straight"], off["adaround"]) < 0.8 * off["ranges"], off


@pytest.mark.parametrize("kind", [Pixels, UNet, Detector, LongSkip])
@torch.no_grad()
def test_the_cache_holds_what_the_model_computes(kind: type[nn.Module]) -> None:
    """Through `Rows`, which carries values on without asking the blocks."""
    x = pictures(7)
    model = repfx.calibrate(quantized(kind), [x])
    for ends in (None, _names(model, x)):
        rows = Rows(None, torch.device("cpu")).fill([(x,)])
        blocks = segments(model, (x,), ends)
        for block in blocks:
            rows = rows.after(block, 3)
        for mine, whole in zip(rows.data, leaves(model(x.clone())), strict=True):
            assert torch.allclose(mine, whole, atol=1e-6)
    assert kind is LongSkip or kind is Pixels or any(len(b.passed) > 1 for b in blocks)


def test_an_output_to_learn_from_is_asked_for() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).argmax(1)

    with pytest.raises(InputError, match="no output of the model is a float tensor"):
        repfx.reconstruct(quantized(Classes), [pictures()], iterations=1)


class Shared(nn.Module):
    """Layers that two blocks call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 4, 3, 1, 1),
            nn.Conv2d(4, 4, 3, 1, 1),
            nn.Conv2d(4, 4, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.c(torch.relu(self.b(x)))


def in_float(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, FakeQuant):
            m.calibrated = False
    return model


@pytest.mark.parametrize("rounding", ["straight", "adaround"])
def test_what_blocks_share_is_learned_once(
    rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, options = (
        pictures(),
        {"iterations": 15, "batch": 8, "lr": 1e-2, "rounding": rounding, "stage": 0.0},
    )
    whole = repfx.reconstruct(quantized(Shared, bits=3), [x], **options)
    found = segments(whole, (x,))
    assert len({s.name for s in found}) == len(found) == 5
    torch.manual_seed(0)
    plain = segments(
        in_float(repfx.transform(Shared().eval(), ["ptq(bits=3)"], example=pictures(2))), (x,)
    )
    ours: tuple[Tensor, ...] = (x,)
    theirs = ours
    for mine, block, said in zip(found, plain, whole.meta["reconstruct"], strict=True):
        with torch.no_grad():
            ours, theirs = mine(*ours), block(*theirs)
        off = float((ours[0] - theirs[0]).square().mean())
        assert off == pytest.approx(said.after, rel=1e-4)  # no later block has changed it
    run: Any = sys.modules["repfx.calibration.blockwise"].Run
    learn, calls = run._learn, []

    def stops(self: Any, lesson: Any, *args: Any) -> Any:
        calls.append(lesson.index)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return learn(self, lesson, *args)

    monkeypatch.setattr(run, "_learn", stops)
    with pytest.raises(KeyboardInterrupt):
        repfx.reconstruct(quantized(Shared, bits=3), [x], **options, checkpoint=tmp_path / "ck")
    again = repfx.reconstruct(quantized(Shared, bits=3), [x], **options, checkpoint=tmp_path / "ck")
    assert calls == [0, 1, 2, 3, 3, 4]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_tied_weights_round_as_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    model = quantized(Tied, bits=3)
    repfx.reconstruct(model, [pictures()], iterations=60, batch=16, rounding="adaround", blocks=[])
    assert model.meta["reconstruct"][0].after < 0.98 * model.meta["reconstruct"][0].before


def test_nothing_is_left_half_set(tmp_path: Path) -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.log(torch.relu(self.a(x))))

    model = quantized(Log)
    with pytest.raises(InputError, match="NaN or infinite"):
        repfx.reconstruct(model, [pictures()], iterations=1)
    found = [m for m in model.modules() if isinstance(m, FakeQuant)]
    assert all(m.observer is None for m in found) and all(
        m.calibrated for m in found if m.of_weight
    )


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_learning_turns_gradients_on(off: Any) -> None:
    model = quantized(Detector)
    with off():
        repfx.reconstruct(model, [pictures()], iterations=2, batch=8)
    assert model(pictures(2))["feature"].requires_grad


def test_bfloat16_goes_through_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 4), conv(4, 4)).to(torch.bfloat16).eval()
    x = pictures().to(torch.bfloat16).requires_grad_()
    states = []
    for cache in (None, tmp_path):
        model = repfx.transform(net, ["ptq(bits=4)"], example=x[:2])
        states.append(
            repfx.reconstruct(model, [x], iterations=2, batch=8, cache=cache).state_dict()
        )
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize(
    ("batches", "options", "text"),
    [
        ("x", {}, r"batches must be an iterable of batches: give \[x\]"),
        (None, {}, "batches must be an iterable of batches"),
        (["one"], {}, r"does not take images of \(16, 16\), 3 at a time"),
        (["x"], {"cache": "file"}, "cannot be a folder for the cache"),
        (["x"], {"checkpoint": "no/such/run.ck"}, "there is no folder .* for the checkpoint"),
        (["x"], {"seed": 1.5}, "seed is a whole number from 0, not 1.5"),
        (["x"], {"lr": "1"}, "lr is a number from 0, not '1'"),
    ],
    ids=str,
)
def test_mistakes(batches: Any, options: dict[str, Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = {"x": pictures(), "one": pictures()[0]}
    data = [given[b] for b in batches] if isinstance(batches, list) else given.get(batches)
    paths = {k: tmp_path / v if k in ("cache", "checkpoint") else v for k, v in options.items()}
    model = quantized(Detector)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=text):
        repfx.reconstruct(model, data, iterations=1, **paths)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_a_block_changes_in_place_stays_as_it_was_in_the_cache() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, 1, 1) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.convs[0](x)
            z = y
            for c in self.convs[1:-1]:
                z = c(z)
            y.relu_()
            return self.convs[-1](y + z)

    torch.manual_seed(0)
    model, x = (
        repfx.transform(randomise(InPlace().eval()), ["ptq(bits=4)"], example=pictures(2)),
        pictures(),
    )
    repfx.calibrate(model, [x])
    parts = segments(model, (x,))
    assert torch.equal(through(parts, x.clone())[0], model(x))
    one = parts[0](x)
    kept = [v.clone() for v in one]
    values = one
    for s in parts[1:]:
        values = tuple(v.clone() for v in s(*values))
    assert all(torch.equal(a, b) for a, b in zip(one, kept, strict=True))
