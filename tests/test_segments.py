"""Segments: together they are the model; a long skip, a U-Net and a detector fall into small blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.errors import InputError
from repfx.graph.segments import LARGEST, Segment, segments
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
        self.down = nn.ModuleList(nn.Sequential(conv(i, o), conv(o, o)) for i, o in ((3, 4), (4, 6), (6, 8), (8, 8)))
        self.up = nn.ModuleList(nn.Sequential(conv(i, o), conv(o, o)) for i, o in ((16, 8), (14, 6), (10, 4)))
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
        fine, coarse = (end(head(v)) for end, head, v in zip(self.ends, self.heads, (both, deep), strict=True))
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
        kind().eval(), [f"ptq(bits={bits}, weights=mse)", *passes], example=tuple(inputs.values()) or pictures(2)
    )


def leaves(y: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(y) if isinstance(t, Tensor)]


@torch.no_grad()
def through(found: list[Segment], *values: Tensor) -> tuple[Tensor, ...]:
    """What the segments give, one after the other; copied, as a cache does, so that no alias goes from one to the next."""
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
    weights = [[m for m in s.modules(FakeQuant).values() if m.of_weight] for s in found]  # type: ignore[attr-defined]
    assert sum(map(len, weights)) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert max(map(len, weights)) <= LARGEST and any(s.passed for s in found)
    # Every place a user may name, one at a time.
    with pytest.raises(InputError, match="unknown end of a block 'no such'"):
        segments(model, (x,), ["no such"])
    for end in [s.name for s in found[:-1]] + (["cat"] if name != "long skip" else []):
        parts = segments(model, (x,), [end])
        assert [s.name for s in parts] == [end, "output"]
        assert all(torch.equal(a, b) for a, b in zip(through(parts, x), leaves(model(x)), strict=True))


def test_residual_blocks_beside_a_long_skip_stay_whole() -> None:
    x = pictures()
    found = segments(quantized(LongSkip), (x,))
    # The first block's skip is the long one too, so that a place inside it is as narrow as one beside it.
    assert [len(s.passed) for s in found] == [0, 0, 1, 1, 1, 1, 0, 0]
    counts = [sum(m.of_weight for m in s.modules(FakeQuant).values()) for s in found]  # type: ignore[misc]
    assert counts == [1, 1, 1, 2, 2, 2, 1, 1]


@torch.no_grad()
def test_random_graphs() -> None:
    cut = wide = 0
    for seed in range(45):
        block, x = random_block(seed)
        if not any(isinstance(m, nn.Conv2d) for m in block.modules()):
            continue
        model = repfx.transform(block, ["ptq"], example=x)
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
    repfx.reconstruct(model, [x], **options)
    repfx.reconstruct(cached, x.split(20), **options, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(v, cached.state_dict()[k]) for k, v in model.state_dict().items())
    done = model.meta["reconstruct"]
    assert sum(b.after for b in done) < 0.99 * sum(b.before for b in done)
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    wanted = leaves(net(x))
    off = [sum(float((a - b).abs().mean()) for a, b in zip(leaves(m(x)), wanted, strict=True)) for m in (model, ranges)]
    assert off[0] < off[1]


def test_a_named_block_of_nothing_to_learn() -> None:
    model = quantized(Detector)
    repfx.reconstruct(model, [pictures()], iterations=2, batch=8, blocks=["deep.1.1", "cat"])
    done = model.meta["reconstruct"]
    assert [b.name for b in done] == ["deep.1.1", "cat", "output"] and done[1].before == done[1].after


def test_several_inputs_come_by_name() -> None:
    image, depth = pictures(), pictures(channels=2)
    model = quantized(Two, image=image[:2], depth=depth[:2])
    before = copy.deepcopy(model.state_dict())
    repfx.reconstruct(model, [{"image": image, "depth": depth}], iterations=5, batch=8)
    assert not torch.equal(before["both.weight"], model.state_dict()["both.weight"])
    with pytest.raises(InputError, match="several inputs: a batch is a dict of image, depth"):
        repfx.reconstruct(model, [image])
    with pytest.raises(InputError, match="a batch has image, but no depth"):
        repfx.reconstruct(model, [{"image": image}])
    with pytest.raises(InputError, match="all must have one size"):
        repfx.reconstruct(model, [{"image": image, "depth": depth[:3]}])


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
    model, x = repfx.transform(randomise(InPlace().eval()), ["ptq(bits=4)"], example=pictures(2)), pictures()
    repfx.calibrate(model, [x])
    parts = segments(model, (x,))
    assert torch.equal(through(parts, x.clone())[0], model(x))
    one = parts[0](x)
    kept = [v.clone() for v in one]
    values = one
    for s in parts[1:]:
        values = tuple(v.clone() for v in s(*values))
    assert all(torch.equal(a, b) for a, b in zip(one, kept, strict=True))
