"""One meaning of "batches", in every function that takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import repfx
from repfx.blocks import RepVGG
from repfx.calibration import correct_biases, match_statistics
from repfx.data import Batch, Batches
from repfx.reporting import measure

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda x, y: x,
    "tuple of one": lambda x, y: (x,),
    "list of one": lambda x, y: [x],
    "labels": lambda x, y: (x, y),
    "labels of any kind": lambda x, y: [x, None, "more"],
    "dict": lambda x, y: {"x": x},
    "dict with labels": lambda x, y: ({"x": x}, y),
}
WRAPS: dict[str, Callable[[list[Any]], Iterable[Any]]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda found: (b for b in found),
}
EMPTY: dict[str, Callable[[], Any]] = {
    "no batch": list,
    "an empty generator": lambda: iter(()),
    "a batch without images": lambda: [X[:0]],
    "several": lambda: [(X[:0], LABELS[:0]), X[:0]],
}
NO_BATCH: dict[str, Any] = {
    "an empty tuple": (),
    "a text": "cat",
    "a dict without tensors": {"x": 1},
    "a scalar": torch.tensor(1.0),
    "a tuple of tuples": ((X, X), LABELS),
    "None": None,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = RepVGG(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


RAW = repfx.transform(net(), ["ptq"], example=X)
KNOWN = repfx.calibrate(copy.deepcopy(RAW), [X])
TRAINED = repfx.transform(net(), ["repq(bn=estimate)"], example=X)


def state(model: nn.Module) -> list[Any]:
    return [v.tolist() for v in model.state_dict().values()]


def corrected(data: Any) -> list[Any]:
    model = copy.deepcopy(KNOWN)
    correct_biases(model, data)
    return state(model)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "calibrate": lambda data: state(repfx.calibrate(copy.deepcopy(RAW), data)),
    "calibrate, bias": lambda data: state(repfx.calibrate(copy.deepcopy(RAW), data, bias=True)),
    "correct_biases": corrected,
    "match_statistics": lambda data: state(match_statistics(copy.deepcopy(TRAINED), data)),
    "sensitivity": lambda data: repfx.sensitivity(copy.deepcopy(KNOWN), data).rows,
    "reconstruct": lambda data: state(
        repfx.reconstruct(copy.deepcopy(RAW), data, iterations=2, batch=4)
    ),
    "report": lambda data: [(n.alone, n.together) for n in measure(net(), data, example=X).layers],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_form_means_the_same(name: str) -> None:
    f = FUNCTIONS[name]
    want = f([X[:4], X[4:]])
    for form, of in FORMS.items():
        found = [of(X[:4], LABELS[:4]), of(X[4:], LABELS[4:])]
        for wrap in WRAPS.values():
            if name == "report" and "dict" in form:
                with pytest.raises(repfx.InputError, match="begins with one, not a dict"):
                    f(wrap(found))
            else:
                assert f(wrap(found)) == want, form
    loader = DataLoader(TensorDataset(X, LABELS), 4)
    assert f(loader) == want
    assert f([X[:0], X[:4], X[:0], (X[4:], LABELS[4:])]) == want  # nothing is there to be left out
    assert f([X[:4]]) != want


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_answer_to_what_is_empty_and_to_what_is_no_batches(name: str) -> None:
    f = FUNCTIONS[name]
    called = "data" if name == "report" else "batches"
    for make in EMPTY.values():
        with pytest.raises(
            repfx.InputError, match=f"there is no image in {called}: give at least one batch"
        ):
            f(make())
    for given, kind in ((X, "Tensor"), ({"x": X}, "dict"), ("x", "str"), (5, "int")):
        with pytest.raises(
            repfx.InputError,
            match=rf"^{called} must be an iterable of batches: give \[x\] .*; this is a {kind}$",
        ):
            f(given)
    for what, given in NO_BATCH.items():
        with pytest.raises(repfx.InputError, match=r"^a batch is a tensor \(N, \.\.\.\), a tuple"):
            f([X, given])
            pytest.fail(what)


def test_the_public_report_reads_no_more_than_it_shows(tmp_path: Path) -> None:
    read: list[int] = []

    def images() -> Iterator[Tensor]:
        for i in range(40):
            read.append(i)
            yield X

    repfx.report(net(), tmp_path / "a.html", data=images(), example=X)
    assert len(read) == 11  # 66 images; it looks at 64
    with pytest.raises(repfx.InputError, match=r"^data must be an iterable of batches"):
        repfx.report(net(), tmp_path / "a.html", data=X)  # type: ignore[arg-type]


def test_a_failed_walk_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(RAW).train()
    before = state(model)
    for data in ([X, X[:, :2]], [X, ()], [X * float("nan")]):
        for bias in (False, True):
            with pytest.raises(repfx.InputError):
                repfx.calibrate(model, data, bias=bias)
    assert state(model) == before and all(m.training for m in model.modules())


def test_batches_can_be_walked_again_and_know_their_names() -> None:
    batches = Batches([(X, LABELS), {"x": X, "y": 2 * X, "flag": True}])
    for _ in range(2):
        first, second = batches
        assert len(first) == len(second) == 6 and torch.equal(first.labels, LABELS)
    assert torch.equal(second.of_inputs(["y", "x"])[0], 2 * X)
    assert len(second.tensors) == 2
    with pytest.raises(repfx.InputError, match="has x, y, flag, but no tensor z"):
        second.of_inputs(["x", "z"])
    with pytest.raises(repfx.InputError, match="several inputs: a batch is a dict of x, y"):
        first.of_inputs(["x", "y"])
    copied = second.to(torch.device("cpu"), copy=True)
    copied.tensors[0].zero_()
    assert X.abs().sum() > 0 and copied.inputs["flag"] is True  # type: ignore[index]
    bad = X.clone()
    bad[2, 0, 0, 0] = float("inf")
    with pytest.raises(repfx.InputError, match="image 8 of pictures holds NaN or infinity"):
        list(Batches([X, Batch(bad)], "pictures", finite=True))
