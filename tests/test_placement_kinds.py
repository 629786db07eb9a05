"""Kinds of models whose files once broke our own lint, each in several spellings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import repfx
from repfx.graph.view import GraphView
from repfx.lowering.runtimes.layers import kernels
from repfx.lowering.runtimes.run import session


class Drawn(nn.Module):
    """Drops the path of whole images in training, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.9).div_(0.9)


class Pooled(nn.Module):
    """conv, relu, an average over space, linear."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(torch.relu(self.conv(x))))


class Skipped(nn.Module):
    """A convolution with something after it, added to its input."""

    def __init__(self, after: nn.Module, in_place: bool = False) -> None:
        super().__init__()
        self.stem, self.conv, self.last = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8))
        self.after, self.in_place = after, in_place

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if self.in_place:
            y = self.after(self.conv(torch.sigmoid(x)))
            y += x
        else:
            y = x + self.after(self.conv(x))
        return self.last(torch.relu(y))


class Resized(nn.Module):
    """conv, an activation, a resize by nearest neighbours, conv."""

    def __init__(self, act: nn.Module, resize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.act, self.resize = act, resize

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.resize(self.act(self.first(x))))


def mean(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


class Averaged(nn.Module):
    """conv, relu, an average of what `join` makes of that and another convolution of it, conv."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], pool: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.join, self.pool, self.last = join, pool, nn.LazyConv2d(8, 3)
        self(torch.zeros(1, 3, 15, 15))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(self.pool(self.join(x, torch.relu(self.second(x)))))


def both(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 1)


KINDS: dict[str, nn.Module] = {
    "view by size": Pooled(lambda x: mean(x).view(x.size(0), -1)),
    "view by the pool's own size": Pooled(lambda x: (y := mean(x)).view(y.size(0), -1)),
    "reshape by shape": Pooled(lambda x: mean(x).reshape(x.shape[0], 8)),
    "reshape by len": Pooled(lambda x: mean(x).reshape(x.size()[0], x.size()[1])),
    "squeezed": Pooled(lambda x: mean(x).squeeze(-1).squeeze(-1)),
    "window by size": Pooled(lambda x: F.avg_pool2d(x, kernel_size=x.size(3)).flatten(1)),
    "window by shape": Pooled(lambda x: F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)),
    "mean": Pooled(lambda x: x.mean((2, 3))),
    "skip": Skipped(nn.Identity()),
    "skip, dropout": Skipped(nn.Dropout(0.1)),
    "skip, dropout of channels": Skipped(nn.Dropout2d(0.1)),
    "skip, stochastic depth": Skipped(Drawn()),
    "skip in place": Skipped(nn.Identity(), in_place=True),
    "skip in place, stochastic depth": Skipped(Drawn(), in_place=True),
    "skip, two of them": Skipped(nn.Sequential(nn.Dropout(0.1), Drawn())),
    "resize": Resized(nn.Identity(), nn.Upsample(scale_factor=2)),
    "resize, leaky": Resized(nn.LeakyReLU(0.1), nn.UpsamplingNearest2d(scale_factor=2)),
    "resize, relu": Resized(nn.ReLU(), lambda x: F.interpolate(x, scale_factor=2)),
    "resize, swish": Resized(nn.SiLU(), lambda x: F.interpolate(x, scale_factor=2.0)),
    "resize to a size": Resized(nn.ReLU(), lambda x: F.interpolate(x, size=(20, 17))),
    "resize, exact": Resized(nn.ReLU(), nn.Upsample(scale_factor=2, mode="nearest-exact")),
    "resize by 3": Resized(nn.Identity(), lambda x: F.interpolate(x, scale_factor=3)),
    "average of a sum": Averaged(torch.add, nn.AvgPool2d(2)),
    "average of a concatenation": Averaged(both, nn.AvgPool2d(2)),
    "average, ceil": Averaged(torch.add, nn.AvgPool2d(2, ceil_mode=True)),
    "average, ceil, padded": Averaged(both, nn.AvgPool2d(4, 2, 1, ceil_mode=True)),
    "average, ceil, alone": Averaged(lambda x, _: x, nn.AvgPool2d(4, 2, ceil_mode=True)),
}
TARGETS = ("tensorrt", "onnxruntime", "openvino")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KINDS)
def test_the_file_keeps_the_rules(name: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # An odd size, so that with ceil_mode a window hangs over the end.
    model, x = KINDS[name].eval(), torch.randn(2, 3, 15, 15)
    int8 = repfx.calibrate(repfx.transform(model, ["ptq"], example=x, target=target), [x])
    artifact = repfx.lower(int8, tmp_path / "int8.onnx", example=x, target=target)
    assert not [str(f) for f in repfx.lint(artifact.onnx, target=target) if f.severity in "EW"]
    assert artifact.parity is not None and not artifact.parity.wrong
    if target == "openvino":
        assert not kernels(target, artifact.onnx).floats
    elif target == "onnxruntime":  # which runs a convolution in float whose output is the model's
        assert len(kernels(target, artifact.onnx).floats) <= 1
    assert repfx.verify(model, int8, x).sqnr > 25


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [n for n in KINDS if n.startswith("resize")])
def test_both_sides_of_a_resize_have_one_scale(name: str, target: str) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = KINDS[name].eval()
    int8 = repfx.calibrate(repfx.transform(model, ["ptq"], example=x, target=target), [x])
    view = GraphView(int8)  # type: ignore[arg-type]
    (resize,) = (n for n in view.nodes if view.kind(n).name == "resize")
    before, (after,) = view.quantizer(resize.args[0]), (view.quantizer(n) for n in resize.users)
    assert before is not None and before is after


class Written(nn.Module):
    """Adds in place to a part of what others read, or of what only it reads."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.one, self.two, self.last = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8))
        self.depth, self.read = Drawn(), read

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        z = self.two(x)
        y = self.depth(z)
        y += x
        return self.last(torch.relu(y) + torch.tanh(z) if self.read else torch.relu(y))


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_memory_that_others_read_is_written_as_it_was(read: bool, target: str) -> None:
    torch.manual_seed(0)
    model, x = Written(read).eval(), torch.randn(2, 3, 9, 9)
    int8 = repfx.calibrate(repfx.transform(model, ["ptq"], example=x, target=target), [x])
    assert repfx.verify(model, int8, x).sqnr > 25


class Twice(nn.Module):
    """A concatenation, moved and copied, that is an output of the model and read on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = (nn.Conv2d(c, 8, 1) for c in (3, 3, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cat([self.one(x), torch.sigmoid(self.two(x))], 1)
        y = y.permute(0, 1, 3, 2).contiguous()
        return y.view(y.shape), self.last(y[:, :, 1:])


@pytest.mark.parametrize("target", TARGETS)
def test_a_value_that_is_an_output_is_rounded_once(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 3, 9, 9)
    int8 = repfx.calibrate(repfx.transform(model, ["ptq"], example=x, target=target), [x])
    artifact = repfx.lower(int8, tmp_path / "int8.onnx", example=x, target=target)
    assert "Q18" not in {f.rule for f in repfx.lint(artifact.onnx, target=target)}
    outputs = session("onnxruntime", artifact.onnx)((x,))
    for found, wanted in zip(outputs, int8(x), strict=True):
        assert float((torch.as_tensor(found) - wanted).abs().max()) < 0.1


def test_what_is_computed_from_sizes_is_no_value() -> None:
    def f(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return x.reshape(x.size(0), -1, height * width) + height

    view = GraphView(torch.fx.symbolic_trace(f))
    sizes = {n.name for n in view.nodes if view.is_size(n)}
    assert {"size", "getattr_1", "getitem", "mul"} <= sizes
    assert not {"x", "reshape", "add", "output"} & sizes


class Table(nn.Module):
    """Adds what layers make of a table of positions, as relative position biases are made."""

    places: Tensor

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.one, self.two, self.function = nn.Linear(2, 16), nn.Linear(16, 8), function
        self.register_buffer("places", torch.rand(12, 12, 2) * 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.function:
            y = F.linear(self.places, self.one.weight, self.one.bias)
        else:
            y = self.one(self.places)
        table = self.two(torch.relu(y)).permute(2, 0, 1)
        return self.last(torch.relu(self.stem(x) + table))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("function", [False, True])
def test_layers_that_read_a_table_stay_in_float(
    target: str, function: bool, tmp_path: Path
) -> None:
    """Runtimes compute them once, when they load the file."""
    torch.manual_seed(0)
    model, x = Table(function).eval(), torch.randn(2, 3, 12, 12)
    quantized = repfx.transform(model, ["ptq"], example=x, target=target)
    told = {d.where: d.reason for d in quantized.meta["repfx"].declined}
    assert [k for k, v in told.items() if "same for every input" in v] == (
        ["two"] if function else ["one", "two"]
    )
    repfx.calibrate(quantized, [x])
    artifact = repfx.lower(quantized, tmp_path / "int8.onnx", example=x, target=target)
    assert artifact.parity.agrees and artifact.parity.sqnr > 60


@pytest.mark.parametrize("pooled", [False, True])
def test_a_softmax_between_integers_is_no_error(pooled: bool, tmp_path: Path) -> None:
    """ONNX Runtime cuts 1 / scale to an integer there."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 17, 3, padding=1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            scores, y = self.stem(x).split([1, 16], 1)
            share = scores.flatten(2).softmax(-1).view(scores.shape)
            y = y * (F.max_pool2d(share, 3, 1, 1) if pooled else share)
            return self.last(y)

    torch.manual_seed(0)
    x = torch.randn(4, 3, 24, 24)
    model = repfx.transform(Attends().eval(), ["ptq"], example=x, target="onnxruntime")
    repfx.calibrate(model, [x])
    artifact = repfx.lower(model, tmp_path / "int8.onnx", example=x, target="onnxruntime")
    assert artifact.parity.agrees and artifact.there is not None and artifact.there.agrees


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_integers_and_empty_values_get_no_quantizer(target: str, tmp_path: Path) -> None:
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
            self.mid, self.pool = nn.Conv2d(8, 8, 1), nn.MaxPool2d(2, return_indices=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, indices = self.pool(torch.relu(self.stem(x)))
            y = F.max_unpool2d(self.mid(y), indices, 2)
            empty = x.new_zeros((x.shape[0], 0, *x.shape[2:]))
            large = (y > 0.5).long()
            y = torch.cat([torch.relu(self.mid(y)), empty], 1)
            return self.last(y), torch.cat([large, large + 1], 1)

    x = torch.randn(2, 3, 12, 12)
    model = repfx.transform(Joins().eval(), ["ptq"], example=x, target=target)
    repfx.calibrate(model, [x])
    assert repfx.lower(model, tmp_path / "int8.onnx", example=x, target=target).parity.agrees


@pytest.mark.parametrize("pool", [(3, 3, 1), (4, 2, 1), (2, 2, 0), (3, 2, 1)])
@pytest.mark.parametrize("size", [13, 14, 15, 16])
def test_ceil_mode_at_any_size(pool: tuple[int, int, int], size: int, tmp_path: Path) -> None:
    """PyTorch leaves out a window that begins in the padding; a file for other sizes must, too."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(*pool, ceil_mode=True)]
    model, x = nn.Sequential(*layers, nn.Conv2d(8, 4, 1)).eval(), torch.randn(2, 3, 15, 15)
    for dynamic in (True, False):
        here = x if dynamic else torch.randn(2, 3, size, size)
        file = repfx.lower(model, tmp_path / "net.onnx", example=here, dynamic=dynamic).onnx
        given = torch.randn(2, 3, size, size)
        (found,) = session("onnxruntime", file)([given])
        with torch.no_grad():
            torch.testing.assert_close(found, model(given), rtol=1e-4, atol=1e-5)
