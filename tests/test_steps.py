"""Learned steps: they stay alive, have a rate of their own, and a grid gone bad is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.blocks import QARepVGG, RepVGG
from repfx.errors import CheckError
from repfx.passes import RepQ
from repfx.quant import FakeQuant, Grid, quantizers_of, search_scale
from repfx.training import fit
from repfx.training.history import Epoch
from repfx.training.watch import Seen, equal, fault_of, revive, risen, ruined, watching


def task(n: int = 128) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 4
    means = torch.randn(4, 3, 8, 8, generator=g)
    return torch.randn(n, 3, 8, 8, generator=g) + 0.5 * means[y], y


def net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [RepVGG(3, 8, 3, 2, 1), nn.ReLU(), RepVGG(8, 8, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def quantized(bits: int = 8) -> Any:
    model = net()
    fit(model, "classification", task(), epochs=3, lr=0.05, progress=False, device="cpu")
    return repfx.transform(model.eval(), [RepQ(bits=bits)], example=task()[0][:2])


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("lr", [1e-3, 1e-2, 0.05])
def test_steps_stay_alive_in_any_loop(kind: str, lr: float) -> None:
    """With every parameter at one rate, decayed, and 8 bits, where LSQ's own steps fall to 0."""
    model, (x, y) = quantized().train(), task()
    options = {"lr": lr, "weight_decay": 0.01, **({"momentum": 0.9} if kind == "SGD" else {})}
    used = getattr(torch.optim, kind)(model.parameters(), **options)
    losses = []
    for i in range(60):
        part = slice(32 * (i % 4), 32 * (i % 4) + 32)
        loss = nn.functional.cross_entropy(model(x[part]), y[part])
        used.zero_grad()
        loss.backward()
        used.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-8:]) < sum(losses[:8])
    for name, quant in quantizers_of(model).items():
        moved = (quant.step / quant.scale).detach()
        assert bool(((moved > 1 / 8) & (moved < 8)).all()), (name, moved)
    with watching(model) as seen, torch.no_grad():
        model.eval()(x)
    assert seen == Seen()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def zeros(kind: str) -> Any:
    """A net that starts with zeros: its last layer, a channel of it, or the norm before a sum."""
    model: Any = net()
    model.insert(2, Residual())
    with torch.no_grad():
        if kind == "layer":
            model[-1].weight.zero_()
        elif kind == "channel":
            model[-1].weight[1].zero_()
        else:
            model[2].norm.weight.zero_()
    return repfx.transform(model.eval(), ["repq"], example=task()[0][:2])


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", ["layer", "channel", "norm"])
def test_what_starts_with_zeros_is_trained(kind: str, saved: bool) -> None:
    """In any loop, calibrated before it: a step that is chosen for zeros is far too small."""
    model, (x, y) = zeros(kind), task()
    repfx.calibrate(model, [x])
    if saved:
        state, model = model.state_dict(), zeros(kind)
        model.load_state_dict(state)
    sgd = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    with watching(model) as seen, torch.no_grad():
        model.eval()(x)
    assert seen == Seen()
    assert all(bool((q.step > 1e-6).all()) for q in quantizers_of(model).values())


def test_an_activation_of_zeros_has_a_step_as_soon_as_it_is_not() -> None:
    x, zero = torch.linspace(-2, 2, 64), torch.zeros(64)
    first, second = (FakeQuant(Grid(8), learned=True).train() for _ in range(2))
    for _ in range(2):
        assert torch.equal(first(zero), zero) and first.empty
    second.load_state_dict(first.state_dict())
    assert second.empty and second.calibrated
    for quant in (first, second):
        quant.eval()(x)
        assert quant.empty  # only training sets a step
        out = quant.train()(x)
        assert not quant.empty and float((out - x).abs().max()) <= float(quant.step) / 2
        before = float(quant.step)
        quant(4 * x)
        assert float(quant.step) == before


def test_a_step_moves_by_a_share_of_itself() -> None:
    """Adam moves a small step no further, for its size, than a large one."""
    for scale in (1e-5, 1.0):
        quant = FakeQuant(Grid(4), torch.tensor(scale), learned=True).train()
        adam = torch.optim.Adam(quant.parameters(), lr=0.01)
        x = torch.randn(100, generator=torch.Generator().manual_seed(0)) * scale
        (quant(x) * x).sum().backward()
        adam.step()
        assert float(quant.step.detach()) / scale == pytest.approx(1, abs=0.0101)
        assert float(quant.step.detach()) != scale


def test_tiny_steps_are_learned_too() -> None:
    quant, v = FakeQuant(Grid(8), torch.tensor(1e-8), learned=True).train(), torch.randn(100) * 1e-6
    adam = torch.optim.Adam(quant.parameters(), 0.05)
    for _ in range(60):
        loss = (quant(v) - v).square().sum() * 1e12
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert 1.5e-8 < float(quant.step.detach()) < 5e-8


def rates(model: nn.Module, **options: Any) -> list[list[float]]:
    """The learning rates of all groups, in each step of a run."""
    seen: list[list[float]] = []

    class Seen(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    made = options.pop("groups", lambda groups: groups)
    fit(
        model,
        "classification",
        task(64),
        epochs=1,
        batch=32,
        progress=False,
        device="cpu",
        optimizer=lambda groups: Seen(made(groups), lr=0.1),
        **options,
    )
    return seen


def test_steps_and_groups_have_their_own_rates() -> None:
    model = quantized()
    steps = {id(p) for q in quantizers_of(model).values() for p in q.parameters()}

    def halved(share: float) -> float:
        return 1 - share / 2

    seen = rates(model, lr=0.1, step_lr=1e-3, schedule=halved)
    assert [r[-1] for r in seen] == pytest.approx([1e-3, 0.75e-3])
    assert [r[0] for r in seen] == pytest.approx([0.1, 0.075])

    def split(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        mine = [p for g in groups for p in g["params"] if id(p) in steps]
        rest = [{**g, "params": [p for p in g["params"] if id(p) not in steps]} for g in groups]
        return [*rest, {"params": mine, "lr": 1e-5, "weight_decay": 0.0}]

    seen = rates(model, lr=0.1, schedule=halved, groups=split)
    assert [r[-1] for r in seen] == pytest.approx([1e-5, 0.75e-5])
    with pytest.raises(repfx.InputError, match="step_lr is a number from 0"):
        rates(model, step_lr=-1.0)
    assert len(rates(quantized(), lr=0.1, step_lr=0.0)[0]) == 3
    only = quantized()
    assert [r[-1] for r in rates(only, lr=0.0, step_lr=0.01, schedule="constant")] == [0.01] * 2
    assert any(float(q.log_ratio.abs().max()) > 0 for q in quantizers_of(only).values())
    still = quantized()
    rates(still, lr=0.05, step_lr=0.0)
    assert all(float(q.log_ratio.abs().max()) == 0 for q in quantizers_of(still).values())


FAULTS: list[tuple[Grid, Any, Any, str]] = [
    (Grid(8), 1.0, torch.randn(64) / 8, "rounds every value to 0"),
    (Grid(8), 0.01, torch.randn(64), ""),
    (Grid(8), 0.0, torch.zeros(64), ""),  # zeros round to 0 rightly
    (Grid(8), 0.002, torch.randn(64) + 1, "cuts off"),
    (Grid(8), 1 / 128, torch.full((64,), 1.0), ""),  # by less than a step
    (Grid(8), 1.0, torch.full((64,), 4.0), "uses 4 of 127 steps"),
    (Grid(4), 1.0, torch.full((64,), 1.0), ""),
    (Grid(8, signed=False), 0.01, torch.randn(64), ""),  # what is negative is cut off on purpose
    (Grid(2, axis=0), [1.0, 9.0, 1.0], torch.ones(3, 4), "rounds all of 1 of 3 channels to 0"),
    (Grid(2, axis=0), [1.0, 1.0, 9.0], torch.eye(3) * torch.tensor([1, 1, 0]), ""),
]


@pytest.mark.parametrize(("grid", "scale", "x", "fault"), FAULTS)
def test_what_is_wrong_with_a_grid(grid: Grid, scale: Any, x: Tensor, fault: str) -> None:
    said = fault_of(FakeQuant(grid, torch.tensor(scale), learned=True), x.clone())
    assert said.startswith(fault) if fault else not said


def test_the_history_and_the_log_name_useless_grids(tmp_path: Path) -> None:
    model, log = broken(1e4), tmp_path / "log"
    options: dict[str, Any] = {"progress": False, "device": "cpu", "batch": 64, "step_lr": 0.0}
    history = fit(model, "classification", task(64), epochs=1, lr=1e-4, log=log, **options)
    (fault,) = history[-1].faults
    assert fault.startswith("2.main.conv.weight_quant rounds all of 3 of 8 channels to 0: a lower")
    assert json.loads(log.read_text())["faults"] == [fault]
    assert fault in str(history).replace("\n", " ")
    plain = fit(net(), "classification", task(64), epochs=1, progress=False, device="cpu")
    assert plain[-1].faults == () and "faults" not in plain[-1].line()


def test_a_model_that_is_constant_stops_the_run(tmp_path: Path) -> None:
    """The epoch is in the log, and the checkpoint is that of the epoch before."""
    model, log, ck = net(), tmp_path / "log", tmp_path / "ck"
    options: dict[str, Any] = {"progress": False, "device": "cpu", "batch": 64}
    options |= {"log": log, "checkpoint": ck, "lr": 1e-4, "schedule": "constant"}
    fit(model, "classification", task(), epochs=1, **options)
    before = ck.read_bytes()
    head: Any = model[-1]
    head.weight.requires_grad_(False).zero_()
    with pytest.raises(CheckError, match="after epoch 2: the model gives every sample the same"):
        fit(model, "classification", task(), epochs=3, resume=False, **options)
    assert torch.load(ck)["at"][0] == 1 and ck.read_bytes() != before
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2]
    fit(model, "classification", task(), epochs=3, resume=False, guard=False, **options)
    same = (torch.ones(64, 3, 8, 8), torch.arange(64) % 4)  # equal images are no fault
    fit(model, "classification", same, epochs=1, resume=False, **options)


class Worse:
    """A task whose loss grows with each step."""

    def __init__(self) -> None:
        self.steps = 0

    def loss(self, model: Any, batch: Any) -> Tensor:
        self.steps += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) * self.steps**2

    def metric(self) -> None:
        return None


def broken(by: float = 1e-4) -> Any:
    """A net with three channels that are cut off, or dead."""
    model = quantized()
    scale = quantizers_of(model)["2.main.conv.weight_quant"]
    scale.set_scale(scale.scale * torch.tensor([by] * 3 + [1.0] * 5))
    return model


def test_a_dead_channel_comes_back(tmp_path: Path) -> None:
    """The epoch's row names it; the next epoch begins with a step that fits, as does a resumed run.

    Steps that are alive, and those of weights that are 0, are left alone."""
    name, log = "2.main.conv.weight_quant", tmp_path / "log"
    options: dict[str, Any] = {"progress": False, "device": "cpu", "step_lr": 0.0, "lr": 1e-6}
    options |= {"checkpoint": tmp_path / "ck", "schedule": "constant", "log": log}
    model = broken(1e4)
    before = quantizers_of(model)[name].step.clone()
    first = fit(model, "classification", task(), epochs=1, **options)
    assert first[0].faults[0].startswith(f"{name} rounds all of 3 of 8 channels to 0: ")
    after = quantizers_of(model)[name].step.detach()
    assert torch.equal(before[3:], after[3:])
    assert bool((after[:3] < before[:3] / 1e3).all() and (after[:3] > before[:3] / 1e5).all())
    again = fit(broken(1e4), "classification", task(), epochs=2, **options)
    assert again.resumed == 2 and not again[1].faults
    averaged = broken(1e4)
    fit(averaged, "classification", task(), epochs=2, ema=0.999, **options | {"resume": False})
    assert bool((quantizers_of(averaged)[name].step[:3] < before[:3] / 1e3).all())
    whole = fit(broken(1e4), "classification", task(), epochs=2, **options | {"resume": False})
    assert whole[0].faults and not whole[1].faults and again[1].loss == whole[1].loss


def test_a_channel_that_is_dead_in_eval_mode_only_comes_back() -> None:
    """Its norm's running variance is far from that of the batches, which `batch` takes."""
    model: Any = repfx.transform(net(), [RepQ(bn="batch")], example=task()[0][:2])
    norms = [m for m in model.modules() if hasattr(m, "running_var")]
    name = "2.main.conv.weight_quant"
    options: dict[str, Any] = {"progress": False, "device": "cpu", "lr": 1e-6, "epochs": 2}
    fit(model, "classification", task(), **options)  # sets the steps
    before = quantizers_of(model)[name].step.clone()
    for norm in norms:
        norm.momentum = 0.0
        norm.running_var[:2] = 1e9
    for ema in (0.9, None):
        rows = fit(model, "classification", task(), valid=task(), ema=ema, **options)
        said = [any(line.startswith(name) for line in row.faults) for row in rows]
        after = quantizers_of(model)[name].step.detach()
        assert bool((after[:2] < before[:2] / 100).all()) == (ema is None)
        assert said == [False, ema is None]  # in the last epoch
    with watching(model) as seen, torch.no_grad():
        model.eval()(task()[0])
    assert not seen.of_dead()


def test_what_brings_a_channel_back() -> None:
    """Only a step with which something is not 0, and the mean of those the processes have seen."""
    quant = FakeQuant(Grid(8, axis=0), torch.tensor([1.0, 1.0, 1.0]), True, learned=True)
    nn.init.constant_(quant.log_ratio, 0.5)
    x = torch.tensor([[0.1, -0.2], [0.0, 0.0], [3.0, 4.0]])
    with watching(nn.Sequential(quant)) as seen:
        quant(x)
    assert list(seen.anew) == ["0"] and seen.anew["0"][1:].tolist() == [0.0, 0.0]
    other = Seen(anew={"0": torch.tensor([0.01, 0.02, 0.0])})
    mean, kept = (float(seen.anew["0"][0]) + 0.01) / 2, math.exp(0.5)
    average = {"0.log_ratio": torch.tensor([7.0, 8.0, 9.0])}
    revive(nn.Sequential(quant), [seen, Seen(), other], average)
    assert quant.step.tolist() == pytest.approx([mean, 0.02, kept])
    assert average["0.log_ratio"].exp().tolist() == pytest.approx([mean, 0.02, math.exp(9)])


@pytest.mark.parametrize(("of_weight", "learned"), [(False, True), (True, False)])
def test_what_is_dead_and_stays(of_weight: bool, learned: bool) -> None:
    """An activation may be faint in one batch only, and a step may be the user's."""
    quant = FakeQuant(Grid(8), torch.tensor(1.0), of_weight, learned)
    with watching(nn.Sequential(quant)) as seen:
        quant(torch.rand(4) / 10)
    assert seen.faults and not seen.anew


@pytest.mark.parametrize("faint", [0, 1, 2])
def test_a_shared_quantizer_is_dead_if_it_is_in_each_call(faint: int) -> None:
    quant = FakeQuant(Grid(8, axis=0), torch.ones(2), True, learned=True)
    calls = [torch.tensor([[50.0], [0.1]]), torch.tensor([[60.0], [0.2]])]
    for i, x in enumerate(calls):
        x[1] *= 1 if faint in (i, 2) else 1000
    with watching(nn.Sequential(quant)) as seen:
        for x in calls:
            quant(x)
    assert bool(seen.anew) == (faint == 2)
    if seen.anew:
        assert seen.anew["0"].tolist() == pytest.approx([0.0, 0.2 / 127], rel=0.02)


def test_a_run_that_only_got_worse_with_bad_grids_is_stopped(tmp_path: Path) -> None:
    """After the second such epoch. A run that is resumed knows the loss of its first step."""
    ck = tmp_path / "ck"
    options: dict[str, Any] = {"progress": False, "device": "cpu", "step_lr": 0.0, "lr": 1e-4}
    options |= {"checkpoint": ck, "schedule": "constant"}
    goal = Worse()
    with pytest.raises(CheckError) as found:
        fit(broken(), goal, task(), epochs=9, **options)
    said = str(found.value)
    assert said.startswith("stopped after epoch 2: the loss was ")
    assert "in the last two epochs; 2.main.conv.weight_quant cuts off 38% of the values" in said
    assert said.endswith(f"the last checkpoint is {ck}") and goal.steps == 4
    first = float(said.split("was ")[1].split(" ")[0])
    with pytest.raises(CheckError, match=f"stopped after epoch 2: the loss was {first:.3g} in"):
        fit(broken(), goal, task(), epochs=9, **options)
    assert goal.steps == 6  # the second epoch once more
    sound = Worse()  # a loss that grows does not stop a run whose grids are sound
    rows = fit(quantized(), sound, task(), epochs=3, **options | {"checkpoint": None})
    assert not rows[0].faults and not rows[1].faults  # it may fall below its start later
    (line,) = rows[2].faults
    assert line.startswith("the loss was ") and f" and is {rows[2].loss:.3g} in the last" in line
    with pytest.raises(CheckError, match=r"stopped after epoch 4: .* goes on rising: "):
        fit(quantized(), Worse(), task(), epochs=9, **options | {"checkpoint": None})


def test_a_run_that_goes_on_forgets_that_its_loss_had_risen(tmp_path: Path) -> None:
    """What was said at the end of a run is no useless grid of the run that goes on from there."""
    options: dict[str, Any] = {"progress": False, "device": "cpu", "step_lr": 0.0, "lr": 1e-4}
    options |= {"checkpoint": tmp_path / "ck", "schedule": "constant"}
    goal = Worse()
    (line,) = fit(quantized(), goal, task(), epochs=1, **options)[-1].faults
    assert line.startswith("the loss was ")
    content = torch.load(tmp_path / "ck")
    content["model"]["2.main.conv.weight_quant.scale"][:3] *= 1e-4
    torch.save(content, tmp_path / "ck")
    rows = fit(quantized(), goal, task(), epochs=2, **options)
    assert rows.resumed == 2 and rows[1].loss > rows[0].loss
    assert "2.main.conv.weight_quant cuts off" in rows[1].faults[0]


@pytest.mark.parametrize(
    ("now", "before", "losses", "stops"),
    [
        (("a",), ("a",), [1.0, 1.3, 1.3], True),
        (("a",), (), [1.0, 1.3, 1.3], False),  # one epoch may be chance
        ((), ("a",), [1.0, 1.3, 1.3], False),
        (("a",), ("a",), [1.0, 1.2, 1.3], False),
        (("a",), ("a",), [1.0, 1.3, 1.2], False),
        (("a",), ("a",), [-1.6, -1.61, -1.62], False),  # a loss below 0 that falls
        (("a",), ("a",), [-1.6, -1.1, -1.1], True),
        (("a",), ("a",), [math.nan, 1.3, 1.3], False),  # a checkpoint without a first loss
        (("a",), ("a",), [1.0, 1.3], False),
        (("a", "b"), ("a", "b"), [1.0, 1.01, 1.01], True),  # two of three grids
        (("a", "b"), ("a",), [1.0, 1.01, 1.01], False),
        (("a", "b"), ("a", "b"), [1.0, 1.01, 0.99], False),
    ],
)
def test_when_a_run_is_ruined(
    now: tuple[str, ...], before: tuple[str, ...], losses: list[float], stops: bool
) -> None:
    first, *means = losses
    rows = epochs(means)
    assert bool(ruined(Seen(now), Seen(before), first, rows, 3)) == stops
    same = Seen((), constant=True)
    assert ruined(same, same, first, rows, 3) and not ruined(same, Seen(), first, rows, 3)
    assert ruined(Seen(("a",), constant=True), Seen(), first, rows, 3)


def epochs(losses: list[float], rates: list[float] | None = None) -> list[Epoch]:
    pairs = zip(losses, rates or [0.1] * len(losses), strict=True)
    return [Epoch(i, loss, rate, 0.0) for i, (loss, rate) in enumerate(pairs, start=1)]


@pytest.mark.parametrize(
    ("losses", "rates", "stops", "said"),
    [
        ([1.0, 0.8, 0.9, 1.0, 1.1], None, True, "0.8 in epoch 1 and is 1.1"),
        ([1.0, 0.8, 0.9, 1.0, 1.1], [0.4, 0.3, 0.2, 0.1], True, "0.8 in epoch 1"),
        ([1.0, 0.8, 0.9, 1.0, 1.1], [0.1, 0.2, 0.3, 0.4], False, "0.8 in epoch 1"),  # warmup
        ([1.0, 0.5, 0.6, 0.7, 0.8], None, False, "0.5 in epoch 1 and is 0.8"),  # below its start
        ([1.0, 1.1, 1.2, 1.3, 1.34], None, False, "1 in the first step and is 1.34"),
        # Not in each epoch.
        ([1.0, 1.0, 1.3, 1.25, 1.4], None, False, "1 in the first step and is 1.4"),
        ([1.0, 1.5, 1.6, 1.7], None, False, "1 in the first step"),  # for two epochs
        ([1.0, 1.7, 1.5, 1.3, 1.2], None, False, ""),
        ([1e-3, 1e-6, 1e-4, 2e-4], None, False, ""),  # little of what it was, though 200 times more
        ([math.nan, 0.8, 0.9, 1.0, 1.1], None, False, ""),
        ([0.0, 1e-9, 2e-9, 3e-9, 4e-9], None, False, ""),
    ],
)
def test_a_loss_that_rises(
    losses: list[float], rates: list[float] | None, stops: bool, said: str
) -> None:
    first, *means = losses
    rows = epochs(means, rates)
    why = ruined(Seen(), Seen(), first, rows, 3)
    assert bool(why) == stops and (not why or why.endswith("goes on rising: 0.8, 0.9, 1, 1.1"))
    line = "".join(risen(first, rows))
    assert bool(line) == bool(said) and said in line


def test_what_is_constant() -> None:
    x, same = torch.randn(4, 3), torch.ones(4, 2)
    assert equal(x, same) == equal({"a": (x, 3)}, [same, same * 2]) == 4
    for given, output in (
        (x, x),
        (x, [same, x]),
        (torch.ones(4, 3), same),  # equal samples
        (x, same.sum()),
        (x[:1], same[:1]),
        (x, same * math.nan),
    ):
        assert equal(given, output) == 0


def test_a_few_equal_outputs_are_no_fault() -> None:
    """Regression with a ReLU at the end: the last batch has two samples, and 0 may be right."""
    model = nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten(), nn.ReLU())
    nn.init.constant_(model[0].bias, -9.0)  # type: ignore[arg-type]

    class Same:
        def loss(self, model: Any, batch: Any) -> Tensor:
            return model(batch[0]).square().mean()

        def metric(self) -> None:
            return None

    options: dict[str, Any] = {"progress": False, "device": "cpu", "epochs": 3}
    fit(model, Same(), task(66), batch=64, **options)
    with pytest.raises(CheckError, match="after epoch 2"):
        fit(model, Same(), task(128), batch=64, **options)


def grids(model: Any, of_weight: bool) -> dict[str, tuple[int, int]]:
    return {n: (q.grid.low, q.grid.high) for n, q in quantizers_of(model, of_weight).items()}


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("bits", "inputs", "weights"),
    [(1, (0, 1), (-1, 1)), (2, (0, 3), (-2, 1)), (4, (0, 15), (-8, 7))],
)
def test_below_8_bits_every_code_is_used(
    target: str, bits: int, inputs: tuple[int, int], weights: tuple[int, int]
) -> None:
    """Whatever the target wants at 8 bits; the first and last layer have 8."""
    x = task()[0][:2]
    model = repfx.transform(net().eval(), [RepQ(bits=bits)], example=x, target=target)
    assert grids(model, False)["2.main.conv.input_quant"] == inputs
    assert grids(model, True)["2.main.conv.weight_quant"] == weights
    assert grids(model, True)["6.weight_quant"][1] in (127, 64)
    paper = RepQ(bits=bits, codes="symmetric")
    model = repfx.transform(net().eval(), [paper], example=x, target=target)
    assert grids(model, True)["2.main.conv.weight_quant"] == (-weights[1], weights[1])
    signed = grids(model, False)["2.main.conv.input_quant"][0] < 0
    assert signed == (target == "tensorrt")
    with pytest.raises(repfx.InputError, match="unknown codes 'most'"):
        RepQ(codes="most")


def test_weights_before_a_live_norm_are_symmetric() -> None:
    """Its gamma may become negative, and the lowest code has no opposite."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
        *(nn.ReLU(), nn.Conv2d(8, 4, 1)),
    )
    live = repfx.transform(model.eval(), [RepQ(bits=2, bn="live", ends=None)], example=task()[0])
    assert grids(live, True) == {
        "0.weight_quant": (-2, 1),
        "2.weight_quant": (-1, 1),
        "5.weight_quant": (-2, 1),
    }


@pytest.mark.parametrize(("target", "opset"), [("tensorrt", 20), ("onnxruntime", 21)])
def test_every_code_of_a_weight_is_deployed(target: str, opset: int, tmp_path: Path) -> None:
    x, y = task()
    spec, plain = RepQ(bits=8, weight_bits=4, ends=None), net().eval()
    with torch.no_grad():  # so that the lowest code is worth having
        plain.get_parameter("6.weight").abs_().neg_()
    model: Any = repfx.transform(plain, [spec], example=x[:2], target=target)
    fit(model, "classification", (x, y), epochs=1, lr=0.01, progress=False, device="cpu")
    fused: Any = repfx.transform(model.eval(), ["fuse"], example=x[:2], target=target)
    last = fused.get_submodule("6")
    assert float(last.weight_quant.codes(last.weight).min()) == -8
    assert repfx.lower(
        fused, tmp_path / "int4.onnx", example=x[:2], target=target, opset=opset
    ).parity.agrees  # type: ignore[union-attr]


def test_one_bit_is_the_sign_and_the_mean() -> None:
    grid, v = Grid(1, axis=0), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    v[0, 0, 0, 0] = 0.0
    scale = search_scale(v, grid, 2.0)
    torch.testing.assert_close(scale, v.abs().mean((1, 2, 3)))
    codes = grid.codes(v, scale)
    assert set(codes.flatten().tolist()) == {-1.0, 1.0} and float(codes[0, 0, 0, 0]) == 1
    assert torch.equal(codes[v != 0], v.sign()[v != 0])
    error = (grid.quantize(v, scale) - v).square().sum((1, 2, 3))
    for other in (0.9, 1.1):
        assert bool(((grid.quantize(v, scale * other) - v).square().sum((1, 2, 3)) > error).all())
    u = v.clone().requires_grad_()
    grid.quantize(u, scale).sum().backward()
    inside = (v.abs() < grid.along(scale, v)).double()
    torch.testing.assert_close(u.grad, inside)  # straight through, as for other grids
    assert Grid(1, signed=False).codes(
        torch.tensor([-1.0, 0.4, 0.6, 3.0]), torch.tensor(1.0)
    ).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("bn", ["running", "live"])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_weights_of_one_bit_are_trained_and_deployed(target: str, bn: str, tmp_path: Path) -> None:
    x, y = task()
    blocks = [QARepVGG(3, 8, 3, 1, 1), nn.ReLU(), QARepVGG(8, 8, 3, 1, 1), nn.ReLU()]
    torch.manual_seed(0)
    plain = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    spec = RepQ(weight_bits=1, bn=bn)
    model: Any = repfx.transform(plain, [spec], example=x[:2], target=target)
    rows = fit(model, "classification", (x, y), epochs=3, lr=0.05, progress=False, device="cpu")
    assert rows[-1].loss < rows[0].loss
    fused: Any = repfx.transform(model.eval(), ["fuse"], example=x[:2], target=target)
    ones = [q for q in quantizers_of(fused, True).values() if q.grid.bits == 1]
    assert len(ones) == 1
    file = repfx.lower(fused, tmp_path / "one.onnx", example=x[:2], target=target)
    assert file.parity is not None and file.parity.agrees
    assert repfx.verify(model, fused, x).relative < 1e-5
    with pytest.raises(repfx.InputError, match="1 bit needs training"):
        repfx.passes.Ptq(bits=8, weight_bits=1)
