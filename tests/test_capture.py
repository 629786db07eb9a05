"""Capture: any model in, modes followed, what cannot be traced left whole and reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import repfx
from repfx.blocks import RepVGG
from repfx.capture.model import capture
from repfx.testing import assert_same, randomise


def image(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 10, 11, generator=torch.Generator().manual_seed(3))


def block(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(RepVGG(inputs, outputs, 3, stride, 1, groups=groups), nn.ReLU())


class Picky(nn.Module):
    """A head whose control flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.inner = block(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if y.mean() > 0:
            y = y + 1
        return self.inner(y)


def test_an_untraceable_head_does_not_cost_the_backbone() -> None:
    model = randomise(nn.Sequential(block(4, 4), block(4, 4), Picky()).eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert isinstance(result, fx.GraphModule)
    assert_same(model, result, image(), 1e-5)
    report = result.meta["repfx"]
    assert len(report.merged) == 3  # two in the backbone, one inside the head
    assert any(d.where == "2" and "cannot be traced" in d.reason for d in report.declined)
    assert {"2.conv.weight", "2.norm.running_mean"} <= set(result.state_dict())


def test_an_untraceable_root_keeps_its_class_and_names() -> None:
    model = randomise(Picky().eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert type(result) is Picky and isinstance(result.inner, fx.GraphModule)
    assert_same(model, result, image(), 1e-5)
    assert "conv.weight" in result.state_dict() and "inner.0.main.conv.bias" in result.state_dict()


def test_a_parent_that_reaches_into_a_child_is_left_alone() -> None:
    class Reaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            return (
                y + self.block[0].point.conv.weight.mean() if float(y.detach().sum()) > -1e9 else y
            )

    model = randomise(Reaching().eval())
    result = repfx.transform(model, ["fuse"], example=image())
    assert_same(model, result, image(), 1e-6)
    assert not result.meta["repfx"].merged and set(result.state_dict()) == set(model.state_dict())


def test_dropout_batch_norm_and_stochastic_depth_follow_the_mode() -> None:
    class DropPath(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            return x * torch.zeros(len(x), 1, 1, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.path, self.conv = nn.BatchNorm2d(4), DropPath(), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(F.relu(self.norm(x)), 0.5, self.training)
            return self.path(torch.sigmoid(y)) + F.relu(self.conv(y))

    model = randomise(Net())
    x = image()
    for mode in (True, False):
        result = repfx.transform(model.train(mode), ["fuse"], example=x)
        assert {m.training for m in result.modules()} == {mode}
        model.eval(), result.eval()
        assert torch.equal(model(x), result(x))
        model.train(), result.train()
        torch.manual_seed(5)
        want = model(x)
        torch.manual_seed(5)
        assert torch.equal(want, result(x))
        assert torch.equal(model.norm.running_mean, result.norm.running_mean)
        model.norm.load_state_dict(randomise(nn.BatchNorm2d(4)).state_dict())


def test_stochastic_depth_does_not_stop_a_merge() -> None:
    class DropPath(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0 if self.training else x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.path = nn.Conv2d(4, 4, 3, padding=1), DropPath()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.path(self.conv(x))

    result = repfx.transform(Block(), ["fuse"], example=image())
    assert len(result.meta["repfx"].merged) == 1 and len(list(result.graph.nodes)) == 3


def test_what_training_does_besides_is_a_part_of_its_own() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + 1 if self.training else self.block(x)

    model = randomise(nn.Sequential(block(4, 4), Auxiliary()))
    result = repfx.transform(model, ["fuse"], example=image())
    assert not result.meta["repfx"].untraced and len(result.meta["repfx"].merged) == 2
    assert torch.allclose(result.train()(image()), result.eval()(image()) + 1)


def test_a_norm_that_carries_its_activation() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.ndim == 4, "4d")
            training = self.training or self.running_mean is None
            y = F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training,
                0.1,
                self.eps,
            )
            return self.act(y)

    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), NormAct(4), nn.Sigmoid(), NormAct(4)))
    result = repfx.transform(model, ["fuse"], example=image())
    assert_same(model, result, image())
    assert not any("running" in k for k in result.state_dict() if k.startswith("1."))
    assert {k for k in model.state_dict() if k.startswith("3.")} <= set(result.state_dict())
    model.train(), result.train()
    assert torch.allclose(
        nn.Sequential(model[2], model[3])(image()), _tail(result, image()), atol=1e-6
    )


def _tail(result: fx.GraphModule, x: Tensor) -> Tensor:
    modules = dict(result.named_modules())
    return modules["3.act"](modules["3"](modules["2"](x)))


def test_a_trace_that_lies_is_found() -> None:
    class Counter(nn.Module):
        """Its forward uses a value that Python changes elsewhere: a trace bakes the first one
        in."""

        calls: ClassVar[list[int]] = []

        def __init__(self) -> None:
            super().__init__()
            self.block = block(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(1)
            return self.block(x) * len(self.calls)

    result = capture(Counter().eval(), (image(),))
    assert "does not compute" in result.declined[0].reason and result.model.block is not None


def test_optional_arguments_keep_their_defaults() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
            y = self.norm(self.conv(x))
            y = y if mask is None else y * mask
            return y * 2 if double else y

    model = randomise(Optional().eval())
    assert_same(model, repfx.transform(model, ["fuse"]), image())
    x = (image(), torch.ones(1, 1, 10, 11) * 3)
    assert_same(model, repfx.transform(model, ["fuse"], example=x), x)


def test_an_exported_program_goes_in() -> None:
    model = randomise(
        nn.Sequential(block(4, 4), nn.Dropout(), block(4, 8, stride=2), nn.AvgPool2d(2)).eval()
    )
    program = torch.export.export(model, (image(),))
    result = repfx.transform(program, ["fuse"])
    assert_same(model, result, image())
    assert len(result.meta["repfx"].merged) == 2
    assert result.train() is result  # as any module, where an exported one would raise


def test_parametrized_layers() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    model = randomise(nn.Sequential(conv, nn.BatchNorm2d(4)).eval())
    result = repfx.transform(model, ["fuse"])
    assert_same(model, result, image())
    assert set(result.state_dict()) == {"0.weight", "0.bias"}


def test_what_hooks_compute_is_part_of_the_graph() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval())
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    result = repfx.transform(model, ["fuse"])
    assert_same(model, result, image())
    assert set(result.state_dict()) == {"0.weight", "0.bias"}


def test_bad_models_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    with pytest.raises(repfx.InputError, match=r"0\.weight holds NaN"):
        repfx.transform(model, ["fuse"])
    with pytest.raises(repfx.InputError, match="no convolution and no linear"):
        repfx.transform(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), ["fuse"])
    with pytest.raises(repfx.InputError, match=r"does not accept the example \(1, 3, 8, 8\)"):
        repfx.transform(nn.Conv2d(4, 4, 1), ["fuse"], example=torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        repfx.InputError,
        match=r"unknown pass 'fusee'; choose one of: bnfold, expand, fuse, ptq, qarep, qprep, repq",
    ):
        repfx.transform(nn.Conv2d(4, 4, 1), ["fusee"])
    with pytest.raises(repfx.InputError, match=r"unknown option of ptq 'bit'; choose one of: bits"):
        repfx.transform(nn.Conv2d(4, 4, 1), ["ptq(bit=8)"])
    with pytest.raises(repfx.InputError, match="bits must be an integer from 1 to 16"):
        repfx.transform(nn.Conv2d(4, 4, 1), ["ptq(bits=0)"])
    with pytest.raises(repfx.InputError, match="unknown target 'tpu'"):
        repfx.transform(nn.Conv2d(4, 4, 1), ["fuse"], target="tpu")
    with pytest.raises(repfx.InputError, match=r"nn\.Module"):
        repfx.transform("model.pt", ["fuse"])


class Pieces(nn.Module):
    """Iterates over what chunk and split give, as YOLO's blocks do."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.conv, self.norm, self.chunks = (
            nn.Conv2d(3, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            chunks,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        parts = list(y.chunk(self.chunks, 1))
        parts.extend(2 * v for v in torch.split(y, [1, 3], dim=1))
        first, *rest = y.split((2, 2), 1)
        low, high = y.split(2, 1)  # of no known number: the names say it
        return torch.cat([*parts, *rest, first, high, low], 1)


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_pieces_are_iterated_over(chunks: int) -> None:
    """Of 4 channels, chunk(3) gives 2 pieces."""
    model, x = Pieces(chunks).eval(), torch.randn(2, 3, 5, 5)
    merged = repfx.transform(model, ["fuse"], example=x)
    assert isinstance(merged, fx.GraphModule)
    assert repfx.verify(model, merged, x).relative < 1e-6
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())


class Measures(nn.Module):
    """Its Python reads numbers out of tensors that are computed from sizes alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body, self.head = how, block(4, 4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        n, _, height, width = x.shape
        if self.how == "a mask":
            mask = torch.ones(n, height, width, dtype=torch.bool)
            return self.head(x if mask.all() else x * mask[:, None])
        shapes = torch.empty(1, 2, dtype=torch.long)
        shapes[0, 0], shapes[0, 1] = height, width
        if self.how == "a check":
            if (shapes[:, 0] * shapes[:, 1]).sum() != x.flatten(2).shape[2]:
                raise ValueError("the sizes are wrong")
            return self.head(x)
        if self.how == "a number":
            return self.head(x) * int(shapes.sum())
        if self.how == "data in new memory":
            held = torch.empty_like(x).copy_(x)
            return self.head(x) if held.mean() > 0 else x
        return self.head(x) * float(torch.tensor([n, height])[0])  # "the batch"


FREE = {"a mask": (True, True), "a check": (True, True), "a number": (True, False)}
FREE |= {"the batch": (False, True), "data in new memory": (True, True)}


@pytest.mark.parametrize("how", FREE)
def test_what_is_read_of_tensors_of_sizes_is_checked(how: str) -> None:
    """Not the sizes themselves: `mask.all()` is true whatever they are."""
    model, x = randomise(Measures(how).eval()), image()
    result = repfx.transform(model, ["fuse"], example=x)
    assert bool(result.meta["repfx"].untraced) == (how == "data in new memory")
    for other, same in zip((image()[:1], image()[:, :, :7]), FREE[how], strict=True):
        if same:
            assert_same(model, result, other, 1e-5)
        else:
            with pytest.raises(repfx.InputError, match="transform the model again"):
                result(other)


class Vector(nn.Module):
    """F.linear with a vector, as detectors have that read distances from a distribution."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.steps, self.up = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(1))
        self.register_buffer("fixed", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3)).softmax(1)
        if self.how == "computed":
            return F.linear(x, torch.cat([-self.up.abs(), self.steps[1:7] * 2, self.up]))
        return F.linear(x, self.steps if self.how == "learned" else self.fixed)


@pytest.mark.parametrize("how", ["learned", "fixed", "computed"])
@pytest.mark.parametrize("passes", [["fuse"], ["ptq"], ["repq"]])
def test_a_vector_is_no_linear_layer(how: str, passes: list[str]) -> None:
    model, x = randomise(Vector(how).eval()), image()
    result = repfx.transform(model, passes, example=x)
    if passes == ["repq"]:
        result.train()(x).sum().backward()
        result.eval()
        assert_same(result, repfx.transform(result, ["fuse"], example=x), x, 1e-5)
        return
    if passes == ["ptq"]:
        repfx.calibrate(result, [x])
    assert_same(model, result, x, 1e-5 if passes == ["fuse"] else 0.05)


def _choose(y: Tensor, number: Tensor) -> Tensor:
    return y * 2 if number > 0 else y * 3


def _by_view(y: Tensor) -> Tensor:
    held = torch.empty(4)
    held.view(2, 2).copy_(y[0, 0, :2, :2])
    return _choose(y, held[0])


def _by_a_view_before(y: Tensor) -> Tensor:
    held = torch.zeros(4)
    seen = held.view(2, 2)
    held.copy_(y[0, 0, 0, :4])
    return _choose(y, seen[0, 0])


def _by_out(y: Tensor) -> Tensor:
    held = torch.empty(2, 2)
    torch.mul(y[0, 0, 0, :2], 2, out=held[0])
    return _choose(y, held[0, 0])


def _by_a_piece(y: Tensor) -> Tensor:
    held = torch.empty(4)
    held.chunk(2)[0].copy_(y[0, 0, 0, :2])
    return _choose(y, held[0])


def _by_detach(y: Tensor) -> Tensor:
    held = torch.empty(2)
    held.detach().copy_(y[0, 0, 0, :2])
    return _choose(y, held[0])


class Kept(nn.Module):
    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.then = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), then

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.then(self.norm(self.conv(x)))
        return y


@torch.no_grad()
@pytest.mark.parametrize("then", [_by_view, _by_a_view_before, _by_out, _by_a_piece, _by_detach])
def test_data_that_is_written_through_another_view(then: Callable[[Tensor], Tensor]) -> None:
    """Whoever shares the memory then holds data."""
    model, x = randomise(Kept(then).eval()), image()
    result = repfx.transform(model, ["fuse"], example=x)
    for factor in (1, -1, 3, -3):
        assert_same(model, result, factor * x, 1e-5)


COUNTS: dict[str, Callable[[Tensor], Any]] = {
    "images in a range": lambda y: torch.cat(
        [y[i : i + 1].mean((2, 3)) for i in range(y.shape[0])], 0
    ),
    "images of a tensor": lambda y: torch.stack([part.relu() for part in y]),
    "rows": lambda y: sum(y.unbind(2)) / len(y.unbind(2)),
    "parts": lambda y: sum(p.mean((2, 3)) for p in y.split(5, 2)),
    "parts by name": lambda y: sum(
        p.mean((2, 3)) for p in torch.split(tensor=y, split_size_or_sections=5, dim=-1)
    ),
    "copies of a list": lambda y: y * sum([1.0] * y.shape[2]),
    "steps": lambda y: sum(y[:, :, i] for i in range(0, y.shape[2], 2)),
    "channels": lambda y: y.split(2, 1)[0] + y.split(2, 1)[1],
}


@pytest.mark.parametrize("how", COUNTS)
def test_how_often_a_loop_runs_is_a_fact(how: str) -> None:
    """At each size the graph gives what the model gives, or refuses it."""
    model, x = randomise(Kept(COUNTS[how]).eval()), image()
    result = repfx.transform(model, ["fuse"], example=x)
    assert_same(model, result, x, 1e-5)
    refused = 0
    for images, height, width in ((1, 10, 11), (5, 10, 11), (2, 20, 22), (2, 5, 6)):
        other = torch.randn(images, 4, height, width)
        try:
            result(other)
        except repfx.InputError:
            refused += 1
        else:
            assert_same(model, result, other, 1e-5)
    assert (refused > 0) == (how != "channels")
    assert isinstance(range(3), range) and type(range(3)) is type(range(4))
