"""What is compared: outputs that a sort or a threshold makes out of rounding do not undo merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.rewrite.contract import Pass, Promise, Stage
from repfx.rewrite.results import Report, Result
from repfx.rewrite.work import Work
from repfx.testing import randomise


class Head(nn.Module):
    """A convolution, a batch norm and scores; `opaque`: with code that no tracer follows."""

    def __init__(self, opaque: bool = True) -> None:
        super().__init__()
        self.opaque = opaque
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Any:
        if self.opaque and x.sum() == 0:
            raise ValueError("empty")
        y = self.last(self.body(x)).flatten(2)
        return self.choose(y[:, 0].sigmoid(), y[:, 1:])

    def choose(self, scores: Tensor, boxes: Tensor) -> Any:
        raise NotImplementedError


class Sorted(Head):
    def choose(self, scores: Tensor, boxes: Tensor) -> Any:
        return scores, scores.argsort(dim=1)


class Ordered(Head):
    """Boxes in the order of their scores: floating point, and no value near the one before."""

    def choose(self, scores: Tensor, boxes: Tensor) -> Any:
        best = scores.topk(4096, dim=1).indices
        return {"boxes": boxes.gather(2, best[:, None].expand(-1, 4, -1))}


class Suppressed(Head):
    """Of neighbours that are much alike, one is kept: the number of boxes varies."""

    def choose(self, scores: Tensor, boxes: Tensor) -> Any:
        order = scores[0].argsort(descending=True)
        row = boxes[0, :, order]
        near = (row[:, 1:] - row[:, :-1]).abs().sum(0) < 0.2
        return [row[:, 1:][:, ~near], order]


class Rounded(Head):
    def choose(self, scores: Tensor, boxes: Tensor) -> Any:
        return (boxes * 1e6).long()


HEADS = [Sorted, Ordered, Suppressed, Rounded]


def head(kind: type[nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args).eval()


def picture() -> Tensor:
    return torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))


def fused(model: nn.Module, x: Any = None, passes: Any = ("fuse",)) -> Report:
    result = repfx.transform(model, list(passes), example=picture() if x is None else x)
    report: Report = result.meta["repfx"]
    return report


@pytest.mark.parametrize("kind", HEADS)
def test_a_discrete_output_does_not_undo_merges(kind: type[Head]) -> None:
    report = fused(head(kind))
    assert len(report.merged) == 1
    assert not any("undone" in d.reason for d in report.declined)
    assert any("in float64, as rounding changes it in float32" in c for c in report.compared)


@pytest.mark.parametrize("kind", HEADS)
def test_nor_does_it_break_the_promise_of_a_pass(kind: type[Head]) -> None:
    """bnfold reaches for the module, so the whole output is compared."""
    report = fused(head(kind, False), passes=["bnfold"])
    assert len(report.merged) == 1
    assert any("pass 'bnfold', in float64" in c for c in report.compared)


def test_a_smooth_output_is_compared_as_it_is() -> None:
    report = fused(head(Sorted), picture()[:, :, :4, :4])
    assert len(report.merged) == 1
    assert [c.split(":")[0] for c in report.compared] == [
        "each merge with its region, on random inputs in float64",
        "the output on the example before and after all passes, in float32",
    ]


class Narrow(Sorted):
    """It does not run in float64."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.float())


class NarrowOrdered(Ordered):
    """Nor does this, and it gives nothing that rounding leaves alone."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.float())


def test_what_rounding_leaves_alone_is_compared_where_float64_does_not_run() -> None:
    report = fused(head(Narrow))
    assert len(report.merged) == 1
    assert any("1 of 2 tensors of the output, those that stay" in c for c in report.compared)


def test_merges_that_nothing_can_check_are_undone_and_the_report_says_so() -> None:
    report = fused(head(NarrowOrdered))
    assert not report.merged
    assert any("is undone: the output on the example changed" in d.reason for d in report.declined)


class PeeksShape(Suppressed):
    def choose(self, scores: Tensor, boxes: Tensor) -> Any:
        return super().choose(scores, boxes * (1 + self.body[0].bias[0]))


class PeeksConv(Ordered):
    def choose(self, scores: Tensor, boxes: Tensor) -> Any:
        wide = F.conv1d(boxes, self.body[0].weight[:4, :1, 0].expand(4, 4, 3), padding=1)
        return super().choose(scores, wide)


@pytest.mark.parametrize("kind", [PeeksShape, PeeksConv])
def test_code_that_reads_the_inside_of_a_layer_is_still_found(kind: type[Head]) -> None:
    model, x = head(kind), picture()
    with torch.no_grad():
        model.body[1].weight.uniform_(0.5, 2)
        model.body[1].bias.normal_()
    result = repfx.transform(model, ["fuse"], example=x)
    report = result.meta["repfx"]
    assert not report.merged
    want, got = (torch.utils._pytree.tree_leaves(m(x)) for m in (model, result))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@dataclass(frozen=True)
class Spoiler(Pass):
    """Promises to keep regions, and scales a layer by a little."""

    name: ClassVar[str] = "spoiler"
    stage: ClassVar[Stage] = Stage.MERGE
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.REGIONS})

    def run(self, work: Work) -> Result:
        done = work.merge(self.name)
        layer: Any = work.module.get_submodule(done.merged[0].into)
        layer.weight.data.mul_(1 + 1e-6)
        return done


@pytest.mark.parametrize("kind", HEADS)
def test_a_broken_promise_is_found_behind_a_sort(kind: type[Head]) -> None:
    with pytest.raises(repfx.CheckError, match="pass 'spoiler' promised"):
        fused(head(kind, False), passes=[Spoiler()])


class Steep(Ordered):
    """Values that enlarge rounding by a factor of ten million, as deep detectors do."""

    def choose(self, scores: Tensor, boxes: Tensor) -> Any:
        return super().choose(scores, boxes + (scores[:, None] * 5e7).sin())


def test_rounding_that_a_model_enlarges_does_not_undo_merges() -> None:
    model = head(Steep)
    report = fused(model)
    assert len(report.merged) == 1
    worst = next(c for c in report.compared if "all passes, in float64" in c)
    assert 1e-9 < float(worst.rpartition(" ")[2]) < 1e-7


RAN: list[type] = []  # A forward for each. What a model holds itself is put back after a trial.


class Detector(nn.Module):
    """A head with losses in training, behind code that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = head(Ordered)

    def forward(self, x: Tensor) -> Any:
        RAN.append(type(x))
        found = self.head(x)
        return {"loss": found["boxes"].sum()} if self.training else [found]


def test_the_forward_of_a_detector_runs_at_most_fourteen_times() -> None:
    RAN.clear()
    report = fused(head(Detector))
    assert len(report.merged) == 1 and any("in float64" in c for c in report.compared)
    assert 6 <= len(RAN) <= 14


class Boxed(nn.Module):
    """The boxes of each image by a part that has losses in training."""

    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head(Ordered, False)

        def forward(self, images: list[Tensor]) -> Any:
            found = [self.head(x)["boxes"] for x in images]
            return {"loss": sum(f.sum() for f in found)} if self.training else found

    def __init__(self) -> None:
        super().__init__()
        self.boxes = self.Boxes()

    def forward(self, x: Tensor) -> Any:
        if x.sum() == 0:
            raise ValueError("empty")
        return self.boxes(list(x.split(1)))


def test_what_was_left_in_python_is_so_in_float64_too() -> None:
    model, x = head(Boxed), picture()
    result = repfx.transform(model, ["fuse"], example=x)
    assert len(result.meta["repfx"].merged) == 1
    assert any("in float64" in c for c in result.meta["repfx"].compared)
    three = torch.cat([x, x[:1]])
    assert len(result(three)) == len(model(three)) == 3


class Drawing(nn.Module):
    """A layer with noise in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(self.conv(x)), 0.5, training=True)


class Around(nn.Module):
    """Code that no tracer follows, and layers inside; `how` their values are used."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.second = Drawing() if how == "noise" else nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == 0:
            raise ValueError("empty")
        if self.how == "noise":
            x = x + torch.rand(())
        y = self.first(x)
        if self.how == "in place":
            y += 1
            y.clamp_(-1, 1)
        return self.second(self.first(y) if self.how == "twice" else y)


@pytest.mark.parametrize("how", ["noise", "in place", "twice"])
def test_parts_are_compared_with_what_they_return(how: str) -> None:
    """What a part returned while the whole ran is right, whatever was done to it afterwards."""
    model, x = randomise(Around(how).eval()), torch.randn(2, 3, 6, 6)
    merged: Any = repfx.transform(model, ["fuse"], example=(x,))
    report = merged.meta["repfx"]
    assert [d.where for d in report.untraced] == ["the model"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    torch.manual_seed(1)
    before = model(x)
    torch.manual_seed(1)
    assert torch.allclose(merged(x), before, atol=1e-5)
