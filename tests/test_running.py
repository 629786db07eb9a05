"""Capture by running: Python that looks at sizes, types and modes; results in the user's class."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import io
import math
import pickle
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import repfx
from repfx.capture.model import capture
from repfx.capture.structures import tensors_in
from repfx.graph.modes import TrainOnly
from repfx.testing import assert_same, randomise


def image(batch: int = 2, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


class Stem(nn.Module):
    def __init__(self, outputs: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Around(nn.Module):
    """A stem and then any code."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.run = Stem(), run
        self.head = nn.Conv2d(8, 4, 1)
        self.held: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def checked(m: Any, x: Tensor) -> Any:
    if x.shape[1] != 3 or x.ndim != 4 or len(x.shape) != 4:
        raise ValueError("an RGB image")
    return m.head(m.stem(x))


def typed(m: Any, x: Tensor) -> Any:
    assert isinstance(x, Tensor) and type(x) is Tensor and x.dtype == torch.get_default_dtype()
    return m.head(m.stem(x))


def padded(m: Any, x: Tensor) -> Any:
    h, w = x.shape[-2:]
    bottom, right = (4 - h % 4) % 4, (4 - w % 4) % 4
    return m.head(m.stem(F.pad(x, (0, right, 0, bottom))))


def same_padding(m: Any, x: Tensor) -> Any:
    sides = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
    return F.max_pool2d(F.pad(m.stem(x), (0, sides[1], 0, sides[0])), 3, 2)


def tokens(m: Any, x: Tensor) -> Any:
    y = m.stem(x)
    b, c, h, w = y.size()
    return y.view(b, c, h * w).transpose(1, 2).reshape(b, h, w, -1).permute(0, 3, 1, 2)


def resized(m: Any, x: Tensor) -> Any:
    y = m.stem(x)
    return F.interpolate(F.avg_pool2d(y, 2), size=y.shape[2:], mode="bilinear") + y


def grid(m: Any, x: Tensor) -> Any:
    y = m.head(m.stem(x))
    rows = torch.arange(y.shape[2], device=y.device, dtype=y.dtype)
    return y + rows[None, None, :, None]


def cached(m: Any, x: Tensor) -> Any:
    y = m.stem(x)
    if getattr(m, "shape", None) != y.shape:
        m.shape, m.grid = y.shape, torch.arange(y.shape[3]).to(y)
    return y + m.grid


def cached_in_a_list(m: Any, x: Tensor) -> Any:
    y = m.stem(x)
    if not m.held or m.held[0].shape[0] != y.shape[3]:
        m.held[:] = [torch.arange(y.shape[3]).to(y)]
    return y + m.held[0]


def listed(m: Any, x: Tensor) -> Any:
    levels = [m.stem(x), m.stem(x * 2)]
    for i, level in enumerate(levels):
        levels[i] = m.head(level)
    return torch.cat([v.flatten(2) for v in levels], 2)


def split_and_looped(m: Any, x: Tensor) -> Any:
    total = 0
    for part in m.stem(x).chunk(4, 1):
        total = total + part
    return total


def rebound(m: Any, x: Tensor) -> Any:
    m.mean = m.mean.type_as(x) if hasattr(m, "mean") else torch.full((1, 3, 1, 1), 0.5).to(x)
    return m.head(m.stem(x - m.mean))


FREE = {
    "checked": checked,
    "typed": typed,
    "padded": padded,
    "same padding": same_padding,
    "tokens": tokens,
    "resized": resized,
    "grid": grid,
    "cached": cached,
    "cached in a list": cached_in_a_list,
    "a list that is written to": listed,
    "a loop over pieces": split_and_looped,
    "an attribute that is bound again": rebound,
}


@pytest.mark.parametrize("name", FREE)
def test_python_that_looks_at_sizes_and_types(name: str) -> None:
    model = randomise(Around(FREE[name]).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    report = result.meta["repfx"]
    assert isinstance(result, fx.GraphModule) and not report.untraced
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    for batch, size in ((2, 16), (3, 16), (1, 20), (5, 32)):
        assert_same(model, result, image(batch, size), 1e-5)


def test_a_model_that_has_run_holds_what_it_made_for_that_size() -> None:
    model = randomise(Around(cached).eval())
    model(image())
    result = repfx.transform(model, ["fuse"], example=image())
    for batch, size in ((2, 16), (3, 16), (1, 20)):
        assert_same(model, result, image(batch, size), 1e-5)


@pytest.mark.parametrize("order", ["weight", "input"])
def test_the_number_of_images_is_that_of_a_weight(order: str) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.weight = Stem(3), nn.Parameter(torch.rand(2, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.weight * x if order == "weight" else x - self.weight
            y = self.stem(y) + x
            return y.reshape(y.shape[0], -1)

    model = randomise(Wide().eval())
    result = repfx.transform(model, ["fuse"], example=image(2))
    assert len(result.meta["repfx"].merged) == 1
    for batch in (1, 2):
        assert result(image(batch)).shape == (2, 3 * 16 * 16)
        assert_same(model, result, image(batch), 1e-5)


@functools.lru_cache
def ramp(size: int) -> Tensor:
    """A table that is made once for each size, as of positions in an image."""
    return torch.arange(size) / 8


def remembered(function: Any) -> Any:
    """A decorator with a cache inside."""
    cached = functools.lru_cache(maxsize=4)(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return cached(*args, **kwargs)

    return call


class Cached(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.how, self.scale = Stem(3), how, nn.Parameter(torch.tensor(2.0))
        self.attribute = functools.lru_cache(maxsize=4)(self.plain)

    def plain(self, size: int) -> Tensor:
        return torch.arange(size) / 8 * self.scale

    @functools.lru_cache  # noqa: B019  (people do)
    def method(self, size: int) -> Tensor:
        return self.plain(size)

    @staticmethod
    @remembered
    def decorated(size: int) -> Tensor:
        return torch.arange(size) / 4

    def forward(self, x: Tensor) -> Tensor:
        table = ramp if self.how == "function" else getattr(self, self.how)
        return self.stem(x) + table(x.shape[3])


@pytest.mark.parametrize("how", ["function", "attribute", "method", "decorated"])
@pytest.mark.parametrize("ran", [False, True])
def test_what_a_function_remembers_is_no_constant_of_the_graph(how: str, ran: bool) -> None:
    model = randomise(Cached(how).eval())
    if ran:
        model(image()), model(image(2, 24)), model(image(3, 48))
    before = [Cached.__dict__["method"], Cached.__dict__["decorated"], ramp, model.attribute]
    result = repfx.transform(model, ["fuse"], example=image())
    after = [Cached.__dict__["method"], Cached.__dict__["decorated"], ramp, model.attribute]
    assert all(a is b for a, b in zip(before, after, strict=True)), "the caches are back"
    assert not result.meta["repfx"].untraced and not result.meta["repfx"].facts
    for size in (16, 24, 9):
        assert_same(model, result, image(3, size), 1e-5)


def test_what_a_library_remembers_of_sizes_is_of_no_other_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As einops does: a cache whose keys and values are sizes."""
    library = types.ModuleType("a_library")

    @functools.lru_cache
    def halves(shape: tuple[int, ...]) -> tuple[int, ...]:
        return *shape[:2], shape[2] // 2, 2, shape[3]

    library.halves = halves  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_library", library)

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = Stem(8), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.stem(x))
            return y.reshape(library.halves(tuple(y.shape))).mean(3)

    for _ in range(2):
        model = randomise(Halved().eval())
        result = repfx.transform(model, ["fuse"], example=image())
        assert not result.meta["repfx"].untraced and not result.meta["repfx"].facts
        for batch, size in ((1, 16), (3, 24)):
            assert_same(model, result, image(batch, size), 1e-5)
    assert library.halves is halves


def test_a_cache_of_the_copy_is_not_that_of_the_model() -> None:
    model = Cached("attribute").eval()
    result = repfx.transform(model, ["fuse"], example=image())
    with torch.no_grad():
        result.get_parameter("scale").fill_(100.0)
        assert result(image()).abs().max() > 100 and model(image()).abs().max() < 50


def test_sizes_of_a_list_of_features_are_facts_and_do_not_stop_the_trace() -> None:
    """A pyramid takes images of some sizes only, so larger ones are tried on the whole list."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = Stem(8), nn.Conv2d(8, 8, 3, 2, 1)
            self.neck = Neck()

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.neck([y, self.down(y)])

    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

        def forward(self, features: list[Tensor]) -> Tensor:
            fine, coarse = features
            table = torch.arange(int(coarse.shape[2]))[:, None] / 8  # a plain number
            y = F.interpolate(coarse + table, size=fine.shape[2:]) + fine
            return self.norm(self.conv(y))

    model = randomise(Pyramid().eval())
    features = [torch.randn(2, 8, 16, 16), torch.randn(2, 8, 8, 8)]
    for m, x in ((model, image()), (model.neck, features)):
        result = repfx.transform(m, ["fuse"], example=(x,))
        assert not result.meta["repfx"].untraced and result.meta["repfx"].facts
        torch.testing.assert_close(result(x), m(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(repfx.InputError, match="traced with"):
        repfx.transform(model, ["fuse"], example=image())(image(2, 32))


def test_a_size_is_not_read_between_a_layer_and_its_norm() -> None:
    """They could not merge where no norm moves into a layer, as in training."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.norm = Stem(8), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.norm(self.conv(self.stem(x))))
            return F.interpolate(y * 2, size=[2 * s for s in y.shape[2:]])

    result = repfx.transform(randomise(Sized().eval()), ["repq"], example=image())
    calls = [str(n.target) for n in result.graph.nodes if n.op == "call_module"]
    assert "norm.input_quant" not in calls and "conv.moments" in calls


def test_a_size_that_is_special_to_the_model() -> None:
    """The graph is tried on that size too, and keeps the shapes of the example."""

    def special(m: Any, x: Tensor) -> Any:
        y = m.stem(x)
        return m.head(y) if x.shape[3] == 24 else m.head(y) + 0 * len("ab"[: x.shape[2]])

    model = randomise(Around(special).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert not [f for f in result.meta["repfx"].facts if "!=" in f]
    (x,) = [n for n in result.graph.nodes if n.op == "placeholder"]
    assert x.meta["shape"] == (2, 3, 16, 16)
    for batch, size in ((2, 16), (3, 16)):
        assert_same(model, result, image(batch, size), 1e-5)


def test_a_size_that_the_model_refuses_stays_refused() -> None:
    def refusing(m: Any, x: Tensor) -> Any:
        if x.shape[3] == 24:
            raise ValueError("not this size")
        return m.head(m.stem(x))

    model = randomise(Around(refusing).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert "x.size(3) != 24" in result.meta["repfx"].facts
    assert_same(model, result, image(3, 20), 1e-5)
    with pytest.raises(repfx.InputError, match="does not hold"):
        result(image(2, 24))


def test_a_batch_that_is_read_without_asking_is_checked() -> None:
    def looped(m: Any, x: Tensor, other: Tensor) -> Any:
        y = m.head(m.stem(x))
        return torch.stack([y[i] * 2 for i in range(x.shape[0])]) + other.mean()

    class Two(Around):
        def forward(self, x: Tensor, other: Tensor) -> Any:  # type: ignore[override]
            return self.run(self, x, other)  # type: ignore[call-arg]

    model = randomise(Two(looped).eval())  # type: ignore[arg-type]
    example = (image(), torch.randn(5, 3))  # of two lengths: there is no example of one more
    result: Any = repfx.transform(model, ["fuse"], example=example)
    assert_same(model, result, example, 1e-5)
    try:
        got = result(image(3), example[1])
    except repfx.InputError:
        return
    torch.testing.assert_close(got, model(image(3), example[1]), rtol=1e-4, atol=1e-5)


def test_a_size_in_a_list_is_not_fixed_in_silence() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 4, 1)

        def forward(self, maps: list[Tensor]) -> Tensor:
            return sum(self.conv(m)[:, :, i] for m in maps for i in range(m.shape[2]))  # type: ignore[return-value]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = Stem(), Head()

        def forward(self, x: Tensor) -> Tensor:
            y = self.head([self.stem(x)])
            return y if float(y.sum()) > -1e9 else x

    model = randomise(Net().eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    for x in (image(), image(2, 8), image(3, 24)):
        assert_same(model, result, x, 1e-5)


def a_size_as_a_number(m: Any, x: Tensor) -> Any:
    return m.head(m.stem(x)) * int(x.shape[2])


def a_size_that_decides(m: Any, x: Tensor) -> Any:
    y = m.stem(x)
    return m.head(y) if x.shape[2] > 12 else m.head(y * 2)


def a_size_in_a_loop(m: Any, x: Tensor) -> Any:
    y = m.stem(x)
    return sum(y[:, :, i] for i in range(y.shape[2]))


BOUND = {f.__name__: f for f in (a_size_as_a_number, a_size_that_decides, a_size_in_a_loop)}


@pytest.mark.parametrize("name", BOUND)
def test_what_the_graph_rests_on_is_told_and_checked(name: str) -> None:
    model = randomise(Around(BOUND[name]).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    report = result.meta["repfx"]
    assert not report.untraced and report.facts
    assert report.facts[0] in str(repfx.inspect(model, example=image()))
    for batch in (1, 2, 5):
        assert_same(model, result, image(batch), 1e-5)
    with pytest.raises(repfx.InputError, match=r"was traced with .*size"):
        result(image(2, 8))


def test_facts_survive_save_and_load(tmp_path: Path) -> None:
    model = randomise(Around(a_size_that_decides).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    repfx.save(result, tmp_path / "model.pt")
    again = repfx.load(tmp_path / "model.pt")
    assert_same(model, again, image(), 1e-5)
    with pytest.raises(repfx.InputError, match="was traced with"):
        again(image(2, 8))


def test_code_that_reads_the_data_stays_a_leaf() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Stem()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.sum()) > 0 else self.inner(-x)

    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Picky()).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert isinstance(result, fx.GraphModule)
    assert [d.where for d in result.meta["repfx"].untraced] == ["2"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    for x in (image(), -image(), image(3, 9)):
        assert_same(model, result, x, 1e-5)


@dataclasses.dataclass
class Found:
    boxes: Tensor
    scores: Tensor | None = None


class Detector(nn.Module):
    """A model with attributes, methods, an optional argument and structures of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Stem(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.names, self.stride = ["cat", "dog"], 4

    def forward(self, image: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Found:
        y = self.layers(image)
        y = y if mask is None else y * mask
        return Found(y * scale)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self(batch["image"]).boxes.square().mean()


def test_the_result_is_still_the_users_model() -> None:
    model = randomise(Detector().eval())
    result: Any = repfx.transform(model, ["fuse"], example=image())
    assert isinstance(result, Detector) and isinstance(result, fx.GraphModule)
    assert result.names == ["cat", "dog"] and result.stride == 4
    assert isinstance(result.layers, nn.Sequential) and isinstance(result.layers[0], Stem)
    assert list(inspect.signature(result.forward).parameters) == ["image", "mask", "scale"]
    found = result(image=image())
    assert type(found) is Found and found.scores is None
    torch.testing.assert_close(found.boxes, model(image()).boxes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        result.loss({"image": image()}), model.loss({"image": image()}), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(repfx.InputError, match=r"traced with the arguments \(image\)"):
        result(image(), torch.ones(1))
    with pytest.raises(repfx.InputError, match="does not run by itself"):
        result.layers[0](image())


def test_dicts_keep_their_class(tmp_path: Path) -> None:
    def named(m: Any, x: Tensor) -> Any:
        y = m.stem(x)
        return OrderedDict(out=m.head(y), features=y)

    model = randomise(Around(named).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    repfx.save(result, tmp_path / "model.pt")
    want = model(image(3))
    for again in (result, repfx.load(tmp_path / "model.pt")):
        found = again(image(3))
        assert type(found) is OrderedDict and list(found) == ["out", "features"]
        assert all(torch.allclose(found[k], want[k], atol=1e-5) for k in want)


def test_switches_that_are_off_are_not_arguments() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Stem()

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = self.stem(x)
            return y.flip(3) if kwargs.get("augment") else y

    model = randomise(Net().eval())
    result: Any = repfx.transform(model, ["fuse"], example=image())
    assert torch.allclose(result(image(), augment=False), model(image()), atol=1e-5)
    with pytest.raises(repfx.InputError, match="traced with the arguments"):
        result(image(), augment=True)


def test_an_argument_that_the_example_has_is_an_input() -> None:
    model = randomise(Detector().eval())
    mask = torch.rand(1, 1, 16, 16)
    for example in ((image(), mask), {"image": image(), "mask": mask}):
        result: Any = repfx.transform(model, ["fuse"], example=example)
        for given in (mask, mask * 2):
            want = model(image(), given).boxes
            torch.testing.assert_close(result(image(), given).boxes, want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                result(image(), mask=given).boxes, want, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("passes", [[], ["fuse"], ["repq"]])
def test_it_is_copied_and_pickled(passes: list[str]) -> None:
    model = randomise(Detector().eval())
    result: Any = repfx.transform(model, passes, example=image())
    want = result(image()).boxes
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for again in (
        copy.deepcopy(result),
        pickle.loads(pickle.dumps(result)),
        torch.load(file, weights_only=False),
    ):
        assert isinstance(again, Detector) and again.names == ["cat", "dog"]
        assert again.state_dict().keys() == result.state_dict().keys()
        assert torch.equal(again(image()).boxes, want)
        next(iter(again.parameters())).data.add_(1)
    assert torch.equal(result(image()).boxes, want)


def drop_connect(x: Tensor, training: bool) -> Tensor:
    if not training:
        return x
    return x / 0.8 * torch.floor(0.8 + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype))


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.how == "drop":
            return drop_connect(y, self.training) + x
        if self.how == "noise" and self.training:
            y = y + 0.1 * torch.randn_like(y)
        if self.how == "scale":
            y = y * (1.5 if self.training else 1.0)
        if self.how == "twice" and self.training:
            y, x = y * torch.rand(()), x * torch.rand(())
        return torch.relu(y + x)


def test_containers_that_are_made_on_the_way_are_entered() -> None:
    def stages(m: Any, x: Tensor) -> Any:
        return nn.Sequential(m.stem, nn.Sequential(nn.ReLU(), m.head))(x)

    model = randomise(Around(stages).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert not result.meta["repfx"].untraced and len(result.meta["repfx"].merged) == 1
    assert_same(model, result, image(3, 9), 1e-5)


def test_what_an_object_of_ones_own_holds_is_not_fixed() -> None:
    class Images:
        def __init__(self, pixels: Tensor) -> None:
            self.pixels, self.sizes = pixels, [tuple(p.shape) for p in pixels]

    class Anchors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(2, 2)

        def forward(self, images: Images) -> Tensor:
            return self.scale(torch.tensor([s[1:] for s in images.sizes]).float())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.anchors = Stem(), Anchors()

        def forward(self, x: Tensor) -> Any:
            return self.stem(x), self.anchors(Images(x)) if float(x.sum()) > -1e9 else x

    model = randomise(Net().eval())
    result: Any = repfx.transform(model, ["fuse"], example=image())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    for x in (image(), image(5), image(3, 9)):
        for a, b in zip(result(x), model(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_module_may_be_an_argument() -> None:
    class Decoder(nn.Module):
        def forward(self, x: Tensor, heads: nn.ModuleList) -> Tensor:
            return heads[0](x) if float(x.sum()) > -1e9 else x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.decoder = Stem(), Decoder()
            self.heads = nn.ModuleList([nn.Conv2d(8, 4, 1)])

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.stem(x), self.heads)

    model = randomise(Net().eval())
    for passes in (["fuse"], ["ptq"]):
        result = repfx.transform(model, passes, example=image())
        assert [d.where for d in result.meta["repfx"].untraced] == ["decoder"]
    assert_same(model, repfx.transform(model, ["fuse"], example=image()), image(3, 9), 1e-5)


def assert_same_in_both_modes(model: nn.Module, result: nn.Module) -> None:
    """With the same random numbers, so that what is drawn in training is the same too."""
    for mode in (False, True):
        outputs = []
        for m in (model, result):
            torch.manual_seed(3)
            outputs.append(copy.deepcopy(m.train(mode))(image()))
        torch.testing.assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("how", ["drop", "noise", "twice"])
@pytest.mark.parametrize("root", [False, True])
def test_what_training_does_besides_is_cut_out(how: str, root: bool) -> None:
    block = randomise(Block(how))
    model = block if root else nn.Sequential(block, nn.ReLU())
    for training in (False, True):
        result = repfx.transform(model.train(training), [], example=image())
        assert not result.meta["repfx"].untraced
        assert any(isinstance(m, TrainOnly) for m in result.modules())
        assert_same_in_both_modes(model, result)
    fused = repfx.transform(model.eval(), ["fuse"], example=image())
    assert len(fused.meta["repfx"].merged) == 1
    assert_same(model, fused, image(), 1e-5)


def test_a_dropout_that_is_off_is_not_its_input() -> None:
    """In eval mode both are one tensor."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.drop = Stem(3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return y + self.drop(y) * 2 + F.dropout(y, 0.5, self.training) * 3 + y

    model = randomise(Skip().eval())
    result = repfx.transform(model, [], example=image())
    assert_same_in_both_modes(model, result)


def test_a_write_that_only_training_makes_is_not_lost() -> None:
    class Erases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Stem(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            if self.training:
                y[:, :1] = 0
            return y

    model = randomise(nn.Sequential(Erases(), nn.ReLU()).eval())
    result = repfx.transform(model, [], example=image())
    model.train(), result.train()
    torch.testing.assert_close(copy.deepcopy(result)(image()), copy.deepcopy(model)(image()))


def test_python_that_reads_what_is_drawn_at_random_is_not_traced() -> None:
    class Sometimes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(torch.rand(())) > 0.5 else x

    model = randomise(nn.Sequential(Stem(), Sometimes()).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    (left,) = result.meta["repfx"].untraced
    assert left.where == "1" and "entries of a tensor" in left.reason


def masked(y: Tensor) -> Tensor:
    return y * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.99)


def skipped(number: float) -> Callable[[Tensor], Tensor]:
    return lambda y: y * 0 if number < 0.01 else y


RARE: dict[str, Callable[[Tensor], Tensor]] = {
    "a mask": masked,
    "noise": lambda y: torch.where(torch.rand_like(y) < 1e-4, y * 0, y),
    "Python's random": lambda y: skipped(random.random())(y),
    "numpy's": lambda y: skipped(np.random.rand())(y),
}


class Rarely(nn.Module):
    """Does something else in training, but seldom: one draw does not show it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.how = Stem(3), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return RARE[self.how](y) + x if self.training else y + x


@pytest.mark.parametrize("how", RARE)
@pytest.mark.parametrize("root", [False, True])
def test_a_training_branch_that_draws_is_never_taken_for_the_eval_branch(
    how: str, root: bool
) -> None:
    model = randomise(Rarely(how)) if root else nn.Sequential(randomise(Rarely(how)), nn.ReLU())
    many = torch.randn(3000, 3, 2, 2)
    fused = repfx.transform(model.eval(), ["fuse"], example=image())
    assert fused.meta["repfx"].merged
    assert_same(model, fused, many, 1e-5)
    trained = repfx.transform(model, [], example=image()).train()
    with torch.no_grad():
        outputs = [copy.deepcopy(trained)(image(4)) for _ in range(1500)]
    assert any(not torch.equal(y, outputs[0]) for y in outputs), "nothing is drawn any more"


def test_python_that_draws_a_number_is_not_traced_and_draws_the_same_as_before() -> None:
    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * random.random()

    model = randomise(nn.Sequential(Stem(), Draws()).eval())
    random.seed(5)
    result = repfx.transform(model, ["fuse"], example=image())
    assert random.random() == random.Random(5).random()
    assert any("draws a random number" in d.reason for d in result.meta["repfx"].untraced)
    assert len(result.meta["repfx"].merged) == 1
    random.seed(6)
    want = model(image())
    random.seed(6)
    torch.testing.assert_close(result(image()), want, rtol=1e-5, atol=1e-5)


def test_a_head_with_two_outputs_has_a_graph_for_eval_mode() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(Stem() for _ in range(2))

        def forward(self, x: Tensor) -> Any:
            maps = [branch(x) for branch in self.branches]
            if self.training:
                return maps
            b, c, h, w = maps[0].shape
            return torch.cat([m.view(b, c, h * w) for m in maps], 2), {"maps": maps}

    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), Head()).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert isinstance(result, fx.GraphModule)
    assert [d.where for d in result.meta["repfx"].untraced] == ["1"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    for batch, size in ((2, 16), (3, 8)):
        want, got = (tensors_in(m(image(batch, size))) for m in (model, result))
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    assert len(copy.deepcopy(result).train()(image())) == 2


class Prompted(nn.Module):
    """A head that runs some layers for another kind of input only, or by hand.

    `other` shares its activation with the rest, takes two maps and has a list of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), self.act)
        self.other = Fusing(self.act)
        self.sized = Sized()
        self.shared = nn.Sequential(self.first[0], nn.BatchNorm2d(4))

    def forward(self, x: Tensor, mode: str = "image") -> Any:
        y = self.first(x)
        if mode == "two":
            return self.other(x, y)
        if mode == "sized":
            return self.sized(x)
        if mode == "shared":
            return self.shared(x)
        return (y, y.mean()) if self.training else y


class Fusing(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, 4, 3, padding=1), nn.BatchNorm2d(4), act) for n in (3, 4)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.parts[0](x)[:, :, 1:-1, 1:-1] + self.parts[1](y)


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y * 2 if x.shape[-1] > 20 else y


def test_parts_that_never_run_are_merged_where_any_input_will_do(tmp_path: Path) -> None:
    head = randomise(Prompted().eval())
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), head)
    fused: Any = repfx.transform(model, ["fuse"], example=image())
    norms = {n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)}
    # `shared` has a convolution that runs, and `sized` is right for one side of 20 only.
    assert norms == {"2.shared.1", "2.sized.norm"}
    for size in (16, 24):
        x = image(2, size)
        assert_same(model, fused, x, 1e-5)
        for mode in ("two", "sized", "shared"):
            want, got = head(x, mode), fused.get_submodule("2")(x, mode)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    quantized = repfx.calibrate(repfx.transform(model, ["ptq"], example=image()), [image()])
    assert sum(n.endswith("weight_quant") for n, _ in quantized.named_modules()) == 2
    left = {d.where for d in quantized.meta["repfx"].declined if "does not run" in d.reason}
    assert left == {"2.other.parts.0", "2.other.parts.1"}
    file = repfx.lower(quantized, tmp_path / "int8.onnx", example=image()).onnx
    assert [n.op_type for n in onnx.load(file).graph.node].count("Conv") == 2


class TwoHeads(nn.Module):
    """A root with layers of its own that answers differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head, self.extra = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.norm(self.conv(x)))
        return (self.head(y), self.extra(y)) if self.training else self.head(y)


@pytest.mark.parametrize("inside", [False, True])
def test_a_deployed_model_keeps_its_forward_in_eval_mode(inside: bool) -> None:
    own = randomise(TwoHeads().eval())
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), own) if inside else own
    fused = repfx.transform(model, ["fuse"], example=image())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert_same(model, fused, image(3, 9), 1e-5)
    with pytest.raises(repfx.InputError, match=r"does something else in training"):
        fused.train()(image())
    quantized = repfx.transform(model, ["ptq"], example=image())
    found = [n for n, _ in quantized.named_modules() if n.endswith("weight_quant")]
    assert len(found) == 2 + inside
    repfx.calibrate(quantized, [image()])
    trained = repfx.transform(model, ["repq"], example=image()).train()
    assert len(trained(image())) == 2
    assert "branches on self.training" in str(trained.meta["repfx"].untraced)


@dataclasses.dataclass
class Encoded:
    last: Tensor
    hidden: tuple[Tensor, ...] | None = None


class Careful(nn.Module):
    """In training, its Python looks at the values, as layers of transformers do."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = torch.relu(self.norm(self.conv(x)))
        if self.training and not (y.abs() < 1e4).all():
            y = y.clamp(-1e4, 1e4)
        return (F.dropout(y, 0.1, self.training),)


class Encoder(nn.Module):
    """Its branch for training does nothing, since no layer is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.dropped = nn.ModuleList([Careful(3), Careful(8)]), 0.0

    def forward(self, x: Tensor, mask: Tensor) -> Encoded:
        if not mask.all():
            x = x * mask
        for layer in self.layers:
            if self.training and self.dropped > 0 and float(torch.rand([])) < self.dropped:
                continue
            x = layer(x)[0]
        return Encoded(x)


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x, torch.ones(x.shape[2:], dtype=torch.bool)).last)
        return y


def test_layers_that_look_at_values_in_training_only() -> None:
    model = randomise(Encoding().eval())
    fused = repfx.transform(model, ["fuse"], example=image())
    assert not fused.meta["repfx"].untraced and not fused.meta["repfx"].declined
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert_same(model, fused, image(3, 9), 1e-5)
    found = capture(model, (image(),))
    found.separate()
    trained: Any = found.model
    layers = {"encoder.layers.0", "encoder.layers.1"}
    assert {d.where for d in found.declined} == layers, "each layer, nothing around it"
    assert_same(model, trained, image(3, 9), 1e-5)
    for layer in trained.encoder.layers:
        assert isinstance(layer, fx.GraphModule), "in eval mode a graph, which has no flag"
        assert not any("training" in str(n.args) for n in layer.graph.nodes)
    layer, huge = trained.encoder.layers[0], image() * 1e6
    assert layer.eval()(huge)[0].max() > 1e4
    layer.train().norm.eval()
    assert layer(huge)[0].max() == 1e4 / 0.9, "its own forward runs in training"


HOOKED: dict[str, Callable[[nn.Conv2d], Any]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "weight_norm, the old one": nn.utils.weight_norm,
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "prune, structured": lambda conv: prune.ln_structured(conv, "weight", 0.5, 2, 0),
    "a forward hook": lambda conv: conv.register_forward_hook(lambda m, args, out: out * 2),
    "a forward pre-hook": lambda conv: conv.register_forward_pre_hook(
        lambda m, args: (args[0] - 0.5,)
    ),
}


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_and_computed_weights(name: str, tmp_path: Path) -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()
    )
    for conv in (model[0], model[3]):
        HOOKED[name](conv)
    model = randomise(model.eval())
    model(image())  # the old hooks compute the weight at each call
    fused = repfx.transform(model, ["fuse"], example=image())
    assert_same(model, fused, image(), 1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    repfx.save(fused, tmp_path / "model.pt")
    assert_same(model, repfx.load(tmp_path / "model.pt"), image(), 1e-5)
    for passes in (["ptq"], ["repq"]):
        quantized = repfx.transform(model, passes, example=image())
        found = [n for n, _ in quantized.named_modules() if n.endswith("weight_quant")]
        assert len(found) == 2, (passes, found)


SPECTRAL = (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm)


@pytest.mark.parametrize("norm", SPECTRAL)
def test_spectral_norm(norm: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """In training it changes its own state, so only a deployed model has it in the graph."""
    model = randomise(nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()).eval())
    fused = repfx.transform(model, ["fuse"], example=image())
    assert set(fused.state_dict()) == {"0.weight", "0.bias"}
    repfx.save(fused, tmp_path / "fused.pt")
    assert_same(model, repfx.load(tmp_path / "fused.pt"), image(), 1e-5)
    trained = repfx.transform(model, ["repq"], example=image())
    assert trained.meta["repfx"].untraced[0].where.startswith("0")
    assert_same(model, trained, image(), 1e-5)


def test_hooks_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()).eval()
    result = repfx.transform(model, ["repq"], example=image())
    with pytest.raises(repfx.InputError, match="remove_spectral_norm"):
        repfx.save(result, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_wrapped_models_are_unwrapped() -> None:
    model = randomise(Around(checked).eval())
    part = nn.Sequential(torch.compile(Stem(3)), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    for given in (torch.compile(model), nn.DataParallel(model), part):
        result = repfx.transform(given, ["fuse"], example=image())
        assert not result.meta["repfx"].untraced
        assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    scripted = nn.Sequential(torch.jit.script(Stem(3)), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    result = repfx.transform(scripted.eval(), ["fuse"], example=image())
    assert len(result.meta["repfx"].merged) == 1
    with pytest.raises(repfx.InputError, match="lazy layers"):
        repfx.transform(nn.Sequential(nn.LazyConv2d(4, 3)), ["fuse"], example=image())


def test_inference_mode() -> None:
    with torch.inference_mode():
        model = randomise(Around(checked).eval())
        for passes in (["fuse"], ["ptq"], ["repq"]):
            result = repfx.transform(model, passes, example=image())
            assert not any(p.is_inference() for p in result.parameters())
    assert_same(model, repfx.transform(model, ["fuse"], example=image()), image(), 1e-5)


def test_the_users_lists_and_attributes_stay() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Stem()
            self.seen: list[Any] = []

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            given["y"] = self.stem(given["x"])
            self.seen.append(given["y"].shape)
            return given["y"]

    model, given = randomise(Writes().eval()), {"x": image()}
    result: Any = repfx.transform(model, ["ptq"], example=(given,))
    assert list(given) == ["x"] and model.seen == [] and result.seen == []
    repfx.calibrate(result, [given])
    assert list(given) == ["x"]


class Pools(nn.Module):
    """What a detector does for the boxes of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, boxes: list[Tensor]) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        rows = [y[i, :, :2, :2].mean() * b for i, b in enumerate(boxes)]
        return torch.cat(rows)


class Heads(nn.Module):
    """One convolution for each level of a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [torch.relu(self.convs[i](features[i])) for i in range(2)]


def test_a_list_that_may_have_any_length_is_not_fixed_in_silence() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pools = Stem(8), Pools()

        def forward(self, x: Tensor) -> Tensor:
            boxes = [torch.ones(3, 4) * (1 + i) for i in range(x.shape[0])]
            return self.pools(self.stem(x), boxes)

    model = randomise(Whole().eval())
    pools = repfx.transform(
        model.pools, ["fuse"], example=(torch.randn(2, 8, 9, 9), [torch.ones(3, 4)] * 2)
    )
    assert "another length" in pools.meta["repfx"].untraced[0].reason
    x, boxes = torch.randn(3, 8, 9, 9), [torch.ones(3, 4) * i for i in range(3)]
    torch.testing.assert_close(pools(x, boxes), model.pools(x, boxes), rtol=1e-4, atol=1e-4)
    result = repfx.transform(model, ["fuse"], example=image())
    assert_same(model, result, image(2), 1e-5)
    try:
        got = result(image(3))
    except repfx.InputError as error:
        assert "traced with" in str(error)
    else:
        torch.testing.assert_close(got, model(image(3)), rtol=1e-4, atol=1e-4)


def test_nor_is_one_that_a_head_for_training_gets() -> None:
    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Stem(8)

        def forward(self, x: Tensor, boxes: list[Tensor]) -> Any:
            y = self.stem(x)
            rows = torch.cat([y[i].mean() * box for i, box in enumerate(boxes)])
            return {"loss": rows.sum() * len(boxes)} if self.training else rows

    model = randomise(Losses().eval())
    result = repfx.transform(
        model, ["fuse"], example=(torch.randn(2, 3, 9, 9), [torch.ones(3, 4)] * 2)
    )
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    for n in (1, 2, 3):
        given = torch.randn(n, 3, 9, 9), [torch.ones(3, 4) * i for i in range(n)]
        torch.testing.assert_close(result(*given), model(*given), rtol=1e-4, atol=1e-4)


def test_lists_of_features_have_one_length() -> None:
    heads, features = Heads().eval(), [torch.randn(2, 8, n, n) for n in (8, 4)]
    result = repfx.transform(heads, ["fuse"], example=(features,))
    assert not result.meta["repfx"].untraced
    assert result.meta["repfx"].facts == ["len(features) == 2"]
    three = [*features, torch.randn(2, 8, 2, 2)]
    with pytest.raises(repfx.InputError, match=r"len\(features\) == 2, but here 3"):
        result(three)


def test_what_an_index_picks_may_be_written_into() -> None:
    def picked(m: Any, x: Tensor) -> Any:
        y = m.stem(x)[:, m.order]
        z = m.head(y)
        y[:, :1] *= 0.5
        return z, y + 1

    model: Any = Around(picked)
    model.register_buffer("order", torch.tensor([2, 0, 1, 3, 4, 5, 7, 6]))
    model = randomise(model.eval())
    result: Any = repfx.transform(model, ["fuse"], example=image())
    assert not result.meta["repfx"].untraced
    for a, b in zip(result(image(3)), model(image(3)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_function_of_ones_own_is_not_looked_into() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Straight.apply(x)

    model = randomise(nn.Sequential(Stem(), Rounds()).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert isinstance(result, fx.GraphModule)
    (left,) = result.meta["repfx"].untraced
    assert left.where == "1" and "Straight" in left.reason
    x = image().requires_grad_()
    result(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.add(a, b)


class Gate(nn.Module):
    """A leaf with a tensor of its own and a choice that the data makes, which must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if x.sum() > 1e9 else x


class Branches(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 8, 1)
        self.sum, self.norm, self.last = Sum(), nn.BatchNorm2d(8), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.sum(self.one(x), self.two(x))))


class Tracer(fx.Tracer):
    """Leaves the modules of unknown classes whole, as converters from other formats do."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return not isinstance(m, Branches)


@pytest.mark.parametrize("last", [nn.ReLU(), Gate()], ids=["known", "by data"])
def test_leaves_of_a_given_graph_are_entered(last: nn.Module, tmp_path: Path) -> None:
    net = randomise(Branches(last).eval())
    graph = fx.GraphModule(net, Tracer().trace(net))
    merged = repfx.transform(graph, ["fuse"])
    assert len(merged.meta["repfx"].merged) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    x = torch.randn(2, 3, 9, 11)
    assert repfx.verify(graph, merged, x).relative < 1e-6
    if isinstance(last, Gate):
        return  # stays as code of its own, which cannot be saved
    repfx.save(merged, tmp_path / "net.pt")
    assert repfx.verify(merged, repfx.load(tmp_path / "net.pt"), x).relative == 0


class Level(enum.IntEnum):
    TWO = 2


class Way(enum.StrEnum):
    NEAREST = "nearest"


class Numbers(nn.Module):
    """Its Python has numbers and strings of classes of their own."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.number, self.stem = number, Stem(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if isinstance(self.number, str):
            return F.interpolate(y, scale_factor=2.0, mode=self.number)
        return y * self.number + self.number


@pytest.mark.parametrize(
    "number",
    [np.float64(0.3), np.float32(0.5), np.int64(2), Level.TWO, Way.NEAREST, np.str_("bilinear")],
    ids=lambda n: type(n).__name__,
)
def test_numbers_of_other_classes_are_numbers(number: Any, tmp_path: Path) -> None:
    model = randomise(Numbers(number).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    assert_same(model, result, image(), 1e-5)
    repfx.save(result, tmp_path / "net.pt")
    assert_same(result, repfx.load(tmp_path / "net.pt"), image(), 0.0)
