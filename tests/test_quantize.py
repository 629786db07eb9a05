"""repfx.quantize: budgets of accuracy and of time, judges, what is held out, and what cannot be."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reconstruct import Residual
from torch import Tensor, nn

import repfx
from repfx.blocks import RepVGG
from repfx.ladder import climb
from repfx.ladder.images import Split
from repfx.ladder.judge import Judge
from repfx.quant import Affine, quantizers_of
from repfx.testing import randomise


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [RepVGG(3, 8, 3, 2, 1), nn.ReLU(), RepVGG(8, 8, 3, 2, 1), nn.ReLU(), Residual(8)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return randomise(nn.Sequential(*layers, *head).eval())


def images(n: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def batches(n: int = 64) -> list[Tensor]:
    return list(images(n).split(24))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning for a few steps, so that a test takes seconds."""
    monkeypatch.setattr("repfx.ladder.climb.STEPS", (2, 8))


def names(found: repfx.Quantized) -> list[str]:
    return [r.name for r in found.rungs]


def test_without_a_budget_it_climbs_and_keeps_the_best() -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = repfx.quantize(model, batches())
    assert names(found)[:5] == ["max", "percentile", "mse", "mae", "entropy"]
    assert names(found)[5].endswith("biases corrected")
    assert names(found)[6:] == ["learned, 2 steps", "learned, 8 steps"]
    scores = {r.name: r.score.sqnr for r in found.rungs if r.score is not None}
    assert len(scores) == 8 and found.chosen == max(scores, key=lambda name: scores[name])
    assert found.met is None and found.budget is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # What it says of the net holds for the net: on the same images, counted here.
    held = Split(batches()).held
    with torch.no_grad():
        y, q = (torch.cat([m(b.tensor) for b in held]).double() for m in (model, found.model))
    sqnr = 10 * torch.log10(y.square().sum() / (y - q).square().sum())
    assert scores[found.chosen] == pytest.approx(float(sqnr), abs=1e-3)
    same = 100 * float((y.argmax(1) == q.argmax(1)).double().mean())
    assert found.rung.score is not None and found.rung.score.agreement == pytest.approx(same)
    assert found.rung.score.lost == pytest.approx(100 - same)


def test_every_fourth_image_is_held_out_and_never_calibrates() -> None:
    every = images(50)
    split = Split(list(every.split(7)))
    held, rest = (torch.cat([b.tensor for b in part]) for part in (split.held, split))
    assert torch.equal(held, every[3::4]) and len(rest) == 38
    seen = {x.sum().item() for x in rest}
    assert not seen & {x.sum().item() for x in held}
    assert (split.images, split.out, len(split)) == (50, 12, 38)
    assert [len(b) for b in split.first(9)] == [6, 3]


@pytest.mark.parametrize("room", [0, 2**30])
def test_images_that_do_not_fit_are_read_again(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repfx.ladder.images.ROOM", room)
    reads: list[int] = []

    class Source:
        def __iter__(self) -> Any:
            reads.append(1)
            return iter(batches())

    split = Split(Source())
    a, b = (torch.cat([x.tensor for x in split]) for _ in range(2))
    assert torch.equal(a, b) and len(reads) == (3 if room == 0 else 1)


def test_data_that_changes_is_an_error_where_it_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader: Any = torch.utils.data.DataLoader(list(images(40)), 8, shuffle=True)
    held = torch.cat([b.tensor for b in Split(loader).held])  # kept: what was read first counts
    assert len(held) == 10
    monkeypatch.setattr("repfx.ladder.images.ROOM", 0)
    with pytest.raises(repfx.InputError, match="shuffle=True"):
        repfx.quantize(net(), loader)


def test_an_iterator_is_read_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repfx.ladder.images.ROOM", 0)
    found = repfx.quantize(net(), iter(batches()))
    assert found.images == (48, 16)


@pytest.mark.parametrize(("count", "judges"), [(1024, 256), (1028, 129), (5000, 157)])
def test_no_more_than_256_images_judge_and_they_are_spread(count: int, judges: int) -> None:
    every = torch.arange(count, dtype=torch.float32).view(-1, 1)
    split = Split(list(every.split(100)))
    held, rest = (torch.cat([b.tensor for b in part]).flatten() for part in (split.held, split))
    assert len(held) == judges == split.out and len(rest) == len(split) == count - count // 4
    assert bool((held % 4 == 3).all()) and len(set((held[1:] - held[:-1]).tolist())) == 1
    assert held[-1] > 0.98 * count and not {*held.tolist()} & {*rest.tolist()}


def test_dicts_and_labels_are_split_alike() -> None:
    x, y = images(16), torch.arange(16)
    split = Split([({"x": x, "flag": True}, y)])
    assert torch.equal(split.held[0].inputs["x"], x[3::4])  # type: ignore[index]
    assert split.held[0].inputs["flag"] is True  # type: ignore[index]
    assert split.held[0].labels.tolist() == [3, 7, 11, 15]


def test_a_budget_that_is_met_stops_the_climb() -> None:
    found = repfx.quantize(net(), batches(), budget=100.0)
    assert names(found) == ["max", "percentile", "mse", "mae", "entropy"] and found.met
    assert "meets the budget of 100 points of agreement" in found.lines()[0]


def test_a_budget_that_nothing_meets_leaves_layers_wide_and_says_what_is_next() -> None:
    def metric(model: nn.Module) -> float:
        return 100.0 if not quantizers_of(model) else 50.0

    found = repfx.quantize(net(), batches(), budget=0.0, metric=metric, bits=4)
    wide = [r for r in found.rungs if r.name.endswith("wide")]
    assert [r.name.rpartition(", ")[2] for r in wide] == ["1 wide", "2 wide"]
    assert found.met is False and "does not meet" in found.lines()[0]
    assert any("repq" in note for note in found.notes)
    assert found.rung.score is not None and found.rung.score.lost == 50.0


def test_wide_layers_are_in_float_and_cost_time() -> None:
    class Metric:
        """Only a net with a layer in float is good enough."""

        def __call__(self, model: nn.Module) -> float:
            return float(len(quantizers_of(model, of_weight=True)) in (0, 4))

    found = repfx.quantize(net(), batches(), budget=0.0, metric=Metric())
    assert found.met and found.chosen.endswith("1 wide")
    assert len(found.placement.integer) == 4 and len(found.placement.floats) == 1
    ours, others = found.rung, found.rungs[0]
    assert ours.latency is not None and others.latency is not None
    assert others.latency == pytest.approx(0.25) and 0.25 < ours.latency < 1
    assert ours.size > others.size


def test_latency_and_size_are_those_counted_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2))
    found = repfx.quantize(model, [images(16)], target="tensorrt", budget=100.0)
    first, last = 8 * 8 * 4 * 3 * 9, 8 * 8 * 4 * 2 * 4
    assert found.rungs[0].latency == pytest.approx((first / 4 + last) / (first + last))
    assert found.sizes == (4 * (108 + 4 + 32 + 2), 108 + 4 * (4 + 32 + 2))
    assert found.placement.integer == ("0",) and found.placement.floats[0].where == "2"


def test_labels_judge_by_accuracy() -> None:
    model, x = net(), images(64)
    labels = model(x).argmax(1)
    labels[3::8] = (labels[3::8] + 1) % 5  # half of the images held out
    found = repfx.quantize(model, [(x, labels)], budget=100.0)
    assert found.right == 50.0 and found.unit == "points of accuracy"
    for rung in found.rungs:
        assert rung.score is not None and rung.score.measured is not None
        assert rung.score.lost == pytest.approx(50.0 - rung.score.measured)


def test_dense_outputs_are_judged_by_their_relative_error() -> None:
    model = randomise(nn.Sequential(RepVGG(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 3, 3, 1, 1)))
    found = repfx.quantize(model.eval(), batches(), budget=100.0)
    score = found.rungs[0].score
    assert score is not None and score.agreement is None and found.unit == "% relative error"
    assert score.lost == pytest.approx(100 * 10 ** (-score.sqnr / 20))


def test_the_metric_decides_even_against_sqnr() -> None:
    best = "percentile"
    calls: list[str] = []

    def metric(model: nn.Module) -> float:
        calls.append("")
        return 2.0 if len(calls) == 3 else 1.0  # float, max, then percentile

    found = repfx.quantize(net(), batches(), metric=metric)
    assert found.chosen == best


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda m: 1 / 0, "division by zero"),
        (lambda m: float("nan"), "it gave nan"),
        (lambda m: "good", "could not convert"),
        (lambda m: None, "NoneType"),
    ],
)
def test_a_metric_that_fails_on_the_float_model_is_the_callers_mistake(
    metric: Any, words: str
) -> None:
    with pytest.raises(repfx.InputError, match=words):
        repfx.quantize(net(), batches(), metric=metric)


def test_a_metric_that_fails_on_some_nets_costs_only_these() -> None:
    def metric(model: nn.Module) -> float:
        steps = [float(q.scale.max()) for q in quantizers_of(model, of_weight=False).values()]
        seen.append(steps)
        if steps and len(seen) == 3:
            raise ValueError("no boxes")
        return float("inf") if len(seen) == 4 else 1.0

    seen: list[list[float]] = []
    found = repfx.quantize(net(), batches(), metric=metric)
    notes = {r.name: r.note for r in found.rungs if r.score is None}
    assert notes == {
        "percentile": "the metric failed: ValueError: no boxes",
        "mse": "the metric failed: it gave inf",
    }


def test_a_metric_that_fails_on_every_quantized_net_is_an_error() -> None:
    def metric(model: nn.Module) -> float:
        if quantizers_of(model):
            raise ValueError("no boxes")
        return 1.0

    with pytest.raises(repfx.CheckError, match="no boxes"):
        repfx.quantize(net(), batches(), metric=metric)


def test_a_constant_metric_leaves_it_to_sqnr_and_says_so() -> None:
    found = repfx.quantize(net(), batches(), metric=lambda m: 3.0)
    scores = {r.name: r.score.sqnr for r in found.rungs if r.score is not None}
    assert found.chosen == max(scores, key=lambda name: scores[name])
    assert any("same for every net" in note for note in found.notes)


class Slow(nn.Module):
    """A layer that takes a while, so that times mean something."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.conv, self.seconds = nn.Conv2d(3, 4, 3), seconds

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_too_little_time_for_ranges_is_an_error_before_the_work() -> None:
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3, 1, 1) for _ in range(8)])
    data = [torch.randn(8, 3, 160, 160) for _ in range(12)]
    begun = time.monotonic()
    with pytest.raises(repfx.InputError, match="too short"):
        repfx.quantize(model, data, time=0.3)
    assert time.monotonic() - begun < 5


def test_the_time_is_kept_and_what_did_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repfx.ladder.climb.STEPS", (2, 10**7))
    begun = time.monotonic()
    # An existing checkpoint makes it start learning that it cannot finish.
    monkeypatch.setattr(climb._Climb, "_fits", lambda self, recipe: True)
    found = repfx.quantize(net(), batches(), time=3.0)
    assert time.monotonic() - begun < 4.0
    assert found.rungs[-1].name == "learned, 10000000 steps"
    assert "stopped" in found.rungs[-1].note
    assert found.rung.score is not None


def test_learning_that_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repfx.ladder.climb.STEPS", (10**7, 10**8))
    found = repfx.quantize(net(), batches(), time=3.0)
    assert found.rungs[-1].score is None and "not tried" in found.rungs[-1].note


def test_a_slow_start_does_not_rule_out_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work on the machine ends after the first measurement."""
    image, calls = climb._image, list[float]()

    def slow(*args: Any) -> float:
        calls.append(image(*args) * (1e6 if not calls else 1))
        return calls[-1]

    monkeypatch.setattr(climb, "_image", slow)
    monkeypatch.setattr(climb._Climb, "planned", lambda *_: [])
    found = repfx.quantize(net(), batches(), time=120)
    assert len(calls) == 2 and calls[0] > 100 * calls[1]
    assert [r.score is not None for r in found.rungs if r.name.startswith("learned")] == [True] * 2


def test_an_interrupted_climb_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = repfx.quantize(net(), batches(), checkpoint=tmp_path / "a")
    blocks = 0
    learn = repfx.calibration.blockwise.Run._learn

    def counted(self: Any, *args: Any) -> Any:
        nonlocal blocks
        blocks += 1
        if blocks == 2:
            raise KeyboardInterrupt
        return learn(self, *args)

    monkeypatch.setattr("repfx.calibration.blockwise.Run._learn", counted)
    with pytest.raises(KeyboardInterrupt):
        repfx.quantize(net(), batches(), checkpoint=tmp_path / "b")
    done = blocks
    again = repfx.quantize(net(), batches(), checkpoint=tmp_path / "b")
    every = len(repfx.calibration.segments.segments(again.model, (images(1),), None))
    # The first block of the first learning was not learned again.
    assert done == 2 and blocks - done == (every - 1) + every
    for a, b in zip(whole.rungs, again.rungs, strict=True):
        assert a.score == b.score


def test_the_same_seed_gives_the_same_net() -> None:
    a, b = (repfx.quantize(net(), batches(), seed=3) for _ in range(2))
    assert a.chosen == b.chosen
    state = b.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in a.model.state_dict().items())


def test_several_inputs_are_quantized_and_what_is_not_possible_is_said() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.a(x)) + self.b(y)

    given = [{"x": images(8, 1), "y": images(8, 2)} for _ in range(3)]
    found = repfx.quantize(Two().eval(), given, target="onnxruntime")
    notes = [r.note for r in found.rungs if r.name.endswith("biases corrected")]
    assert len(notes) == 1 and "one input" in notes[0]
    assert found.rung.score is not None and found.rung.score.sqnr > 20
    assert _signed(found) == [True, True]
    given = [{"x": images(8, 1), "y": images(8, 2).abs()} for _ in range(3)]
    assert _signed(repfx.quantize(Two().eval(), given, target="onnxruntime")) == [True, False]


def _signed(found: repfx.Quantized) -> list[bool]:
    quants = quantizers_of(found.model)
    return [quants[f"{name}.input_quant"].grid.signed for name in "ab"]


def test_images_from_0_on_are_unsigned_where_the_target_has_such_codes() -> None:
    given, below = [x.abs() for x in batches()], batches()[0].abs()
    below[7, 2, 3, 3] = -1e-3  # in an image that is held out
    for target, data, signed in (
        ("openvino", given, False),
        ("openvino", [*given, below], True),
        ("tensorrt", given, True),
    ):
        found = repfx.quantize(net(), data, target=target, budget=100)
        first = next(n for n in found.model.graph.nodes if n.op == "call_module")  # type: ignore[union-attr]
        assert found.model.get_submodule(first.target).grid.signed == signed  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time": -1.0}, "time is a number"),
        ({"budget": float("nan")}, "budget is a number"),
        ({"bits": 0}, "bits"),
        ({"seed": -1}, "seed is a whole number"),
        ({"metric": "top5"}, "metric is a function"),
        ({"target": "coreml"}, "unknown target"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(repfx.InputError, match=words):
        repfx.quantize(net(), batches(), **options)


def test_too_few_images_and_images_with_nan_are_errors() -> None:
    with pytest.raises(repfx.InputError, match="at least 4 images"):
        repfx.quantize(net(), [images(3)])
    bad = images(8)
    bad[5, 0, 0, 0] = float("nan")
    with pytest.raises(repfx.InputError, match="NaN"):
        repfx.quantize(net(), [bad])


def test_integer_outputs_need_a_metric() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)).argmax(1)

    with pytest.raises(repfx.InputError, match="give a metric"):
        repfx.quantize(Classes().eval(), batches())


def test_the_judge_takes_the_worst_of_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self, off: float) -> None:
            super().__init__()
            self.off = nn.Parameter(torch.tensor(off))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.mean((2, 3)) + self.off

    held = Split([images(16)]).held
    score = Judge(Two(0.0), held, None)(Two(0.5))
    y = torch.cat([b.tensor for b in held]).mean((2, 3)).double()
    want = 10 * torch.log10(y.square().sum() / torch.full_like(y, 0.25).sum())
    assert score.sqnr == pytest.approx(float(want), abs=1e-4) and score.agreement is None


def test_json_and_page_have_every_rung(tmp_path: Path) -> None:
    found = repfx.quantize(net(), batches(), budget=0.0, metric=lambda m: 1.0)
    read = json.loads(found.json())
    assert [r["name"] for r in read["rungs"]] == names(found) and read["chosen"] == found.chosen
    assert read["images"] == [48, 16] and len(read["placement"]["integer"]) == 5
    found.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    for name in names(found):
        assert name in text
    assert "Content-Security-Policy" in text and 'src="http' not in text
    with pytest.raises(repfx.InputError):
        found.write(tmp_path / "none" / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_the_net_that_meets_the_budget_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where another one has the better SQNR."""
    monkeypatch.setattr("repfx.ladder.climb.STEPS", (1, 2))
    lost = {"max": 3.0, "percentile": 2.0, "mse": 1.0, "mae": 9.0, "entropy": 4.0}
    judge = Judge.__call__

    def scored(self: Judge, net: nn.Module) -> Any:
        calls.append("")
        found = judge(self, net)
        name = list(lost)[len(calls) - 1] if len(calls) <= 5 else ""
        return replace(found, lost=lost.get(name, 8.0), sqnr=50.0 if name == "mae" else 10.0)

    calls: list[str] = []
    monkeypatch.setattr(Judge, "__call__", scored)
    found = repfx.quantize(net(), batches(), budget=1.5)
    assert found.chosen == "mse" and found.met and len(found.rungs) == 5
    calls.clear()
    found = repfx.quantize(net(), batches(), budget=0.5)  # none meets it: the least lost
    assert found.chosen == "mse" and found.met is False


def test_a_quantized_model_is_refused() -> None:
    made = repfx.calibrate(repfx.transform(net(), ["ptq"]), batches())
    with pytest.raises(repfx.InputError, match="quantized already"):
        repfx.quantize(made, batches())


class Above(nn.Module):
    """Gives as many values as pass a threshold, as a detector with suppression inside does."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.conv, self.at = nn.Conv2d(3, 4, 3), at

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten()
        return y[y > self.at]


def test_outputs_of_other_shapes_need_a_metric() -> None:
    torch.manual_seed(0)
    model = Above(0.5).eval()
    with pytest.raises(repfx.InputError, match="give a metric"):
        repfx.quantize(model, batches())
    found = repfx.quantize(model, batches(), metric=lambda m: 1.0)
    assert found.rung.score is not None and found.rung.score.sqnr == -float("inf")
    held = Split(batches()).held
    with pytest.raises(repfx.InputError, match="other shapes"):
        Judge(model, held, None)(Above(0.6).eval())


def test_integer_outputs_are_fine_with_a_metric() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)).argmax(1)

    found = repfx.quantize(Classes().eval(), batches(), metric=lambda m: 2.0)
    assert found.rung.score is not None and found.rung.score.measured == 2.0


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_layers_that_are_no_graph_nodes_count_as_float(kind: str) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, 2, 1)
            self.rest: nn.Module = (
                nn.LSTM(8, 16, batch_first=True)
                if kind == "lstm"
                else nn.MultiheadAttention(8, 2, batch_first=True)
            )
            self.last = nn.Linear(16 if kind == "lstm" else 8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten(2).transpose(1, 2)
            y = self.rest(y)[0] if kind == "lstm" else self.rest(y, y, y)[0]
            return self.last(y.mean(1))

    found = repfx.quantize(Sequence().eval(), batches(), budget=100.0)
    assert found.rungs[0].latency is None
    floats = {d.where.split(".")[0] for d in found.placement.floats}
    assert "rest" in floats and {"conv", "last"} <= set(found.placement.integer)


def test_wide_layers_say_why() -> None:
    def metric(model: nn.Module) -> float:
        return float(len(quantizers_of(model, of_weight=True)) in (0, 4))

    found = repfx.quantize(net(), batches(), budget=0.0, metric=metric)
    assert [d.reason for d in found.placement.floats] == ["it is one of those that lose most"]
    four = repfx.quantize(net(), batches(), budget=0.0, bits=4, metric=lambda m: wide_or_float(m))
    assert len(four.placement.wide) == 1 and not four.placement.floats
    assert f"left at 8 bits: {four.placement.wide[0]}" in four.lines()


def wide_or_float(model: nn.Module) -> float:
    bits = [q.grid.bits for q in quantizers_of(model, of_weight=True).values()]
    return float(not bits or 8 in bits)


@pytest.mark.parametrize("form", ["int", "list", "numpy", "column", "int32"])
def test_labels_of_every_form_of_whole_numbers_count(form: str) -> None:
    model, x = net(), images(64)
    y = model(x).argmax(1)
    given: Any = {
        "int": y,
        "list": y.tolist(),
        "numpy": y.numpy(),
        "column": y.view(-1, 1),
        "int32": y.int(),
    }[form]
    found = repfx.quantize(model, [(x, given)], budget=100.0)
    assert found.unit == "points of accuracy" and found.right == 100.0


@pytest.mark.parametrize("form", ["float", "one-hot", "boxes", "some"])
def test_labels_that_are_no_classes_are_told(form: str) -> None:
    x, y = images(64), torch.arange(64) % 5
    given: Any = {
        "float": y.float(),
        "one-hot": torch.eye(5)[y],
        "boxes": torch.zeros(64, 3, 5),
        "some": y,
    }[form]
    data = [(x[:32], given[:32]), x[32:] if form == "some" else (x[32:], given[32:])]
    found = repfx.quantize(net(), data, budget=100.0)
    assert found.unit == "points of agreement" and "no label" in found.notes[0]
    with pytest.raises(repfx.InputError, match="accuracy needs a label"):
        repfx.quantize(net(), data, metric="accuracy")


@pytest.mark.parametrize("off", [1, -1])
def test_labels_outside_of_the_classes_are_errors(off: int) -> None:
    with pytest.raises(repfx.InputError, match="labels are from 0 to 4"):
        repfx.quantize(net(), [(images(64), torch.arange(64) % 5 + off)])


def test_accuracy_of_a_dense_output_is_an_error() -> None:
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(repfx.InputError, match="accuracy needs"):
        repfx.quantize(model, [(images(16), torch.zeros(16, dtype=torch.long))], metric="accuracy")


def test_a_dict_of_tensors_of_different_lengths_is_an_error() -> None:
    with pytest.raises(repfx.InputError, match="one row for each image"):
        Split([{"anchors": torch.zeros(9, 2), "x": images(16)}])


def test_reading_stops_in_time() -> None:
    def endless() -> Any:
        while True:
            time.sleep(0.01)
            yield images(4)

    begun = time.monotonic()
    with pytest.raises(repfx.InputError, match="too short to read"):
        repfx.quantize(net(), endless(), time=0.3)
    assert time.monotonic() - begun < 2


def test_a_metric_gets_a_net_of_its_own_each_time() -> None:
    seen: list[nn.Module] = []

    def metric(model: nn.Module) -> float:
        assert all(model is not other for other in seen)
        seen.append(model)
        return 1.0

    repfx.quantize(net(), batches(), metric=metric)
    assert len(seen) == 9


def test_other_images_do_not_meet_the_checkpoint_of_these(tmp_path: Path) -> None:
    x = images()
    repfx.quantize(net(), [x], checkpoint=tmp_path)
    other = x.clone()
    other[0] *= 0.5  # an image that calibrates, and that sets no range
    before = {p.name.partition("-")[0] for p in tmp_path.iterdir()}
    found = repfx.quantize(net(), [other], checkpoint=tmp_path)
    assert all(r.score is not None for r in found.rungs)
    assert len({p.name.partition("-")[0] for p in tmp_path.iterdir()} - before) == 1
    for file in tmp_path.iterdir():
        file.write_bytes(b"cut")
    with pytest.raises(repfx.InputError, match="damaged"):
        repfx.quantize(net(), [other], checkpoint=tmp_path)


def test_it_works_inside_inference_mode() -> None:
    with torch.inference_mode():
        found = repfx.quantize(net(), batches(), budget=100.0)
    assert found.met


def test_outputs_that_do_not_fit_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = repfx.quantize(net(), batches(), budget=100.0)
    monkeypatch.setattr("repfx.ladder.judge.ROOM", 0)
    again = repfx.quantize(net(), batches(), budget=100.0)
    assert [r.score for r in kept.rungs] == [r.score for r in again.rungs]


@pytest.mark.parametrize(
    ("bits", "weight_bits", "lr", "affine"),
    [(8, None, 1e-4, False), (4, None, 1e-3, True), (8, 4, 1e-3, True)],
)
def test_few_bits_are_learned_by_larger_steps_and_with_affines(
    bits: int, weight_bits: int | None, lr: float, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, bool]] = []

    def reconstruct(model: nn.Module, data: Any, **options: Any) -> nn.Module:
        asked.append((options["lr"], any(isinstance(m, Affine) for m in model.modules())))
        return repfx.reconstruct(model, data, **options)

    monkeypatch.setattr("repfx.ladder.rungs.reconstruct", reconstruct)
    found = repfx.quantize(net(), batches(), bits=bits, weight_bits=weight_bits)
    assert asked == [(lr, affine)] * 2
    assert not any(isinstance(m, Affine) for m in found.model.modules())


def test_the_latency_of_a_net_that_takes_no_single_image_is_unknown() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.reshape(-1, 2, *x.shape[1:]).mean(1))

    found = repfx.quantize(Pairs().eval(), [images(64)], budget=100.0)
    assert found.rungs[0].latency is None and found.placement.integer == ("conv",)
