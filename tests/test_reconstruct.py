"""qprep folds into integers; reconstruct learns blocks in order, resumes, and says what it cannot
take.
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
from repfx.blocks import RepVGG
from repfx.calibration.learned import AdaRound
from repfx.calibration.segments import Segment, segments
from repfx.errors import InputError
from repfx.passes import Ptq
from repfx.quant import Affine, FakeQuant, Grid, Observer
from repfx.testing import randomise

pytestmark = pytest.mark.slow


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.Conv2d(width, width, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.two(torch.relu(self.one(x))))


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [RepVGG(3, 8, 3, 1, 1), nn.ReLU(), RepVGG(8, 8, 3, 2, 1), nn.ReLU(), Residual(8)]
    return randomise(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        .to(dtype)
        .eval()
    )


def pictures(n: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def quantized(bits: int = 4, affine: bool = True, model: nn.Module | None = None) -> Any:
    passes = [Ptq(bits, weights="mse"), *(["qprep"] if affine else [])]
    return repfx.transform(model or net(), passes, example=pictures(2))


def layers(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, kind)}


@pytest.mark.parametrize("bits", [4, 8])
def test_the_affine_is_nothing_at_first_and_folds_into_the_codes(bits: int, tmp_path: Path) -> None:
    plain, model = quantized(bits, affine=False), quantized(bits)
    for m in (plain, model):
        repfx.calibrate(m, [pictures()])
    x = pictures(seed=2)
    assert repfx.verify(plain, model, x).relative == 0
    assert set(plain.state_dict()) < set(model.state_dict())
    affines = layers(model, Affine)
    assert len(affines) == 5
    random = torch.Generator().manual_seed(3)
    for affine in affines.values():
        sign = torch.where(torch.arange(len(affine.eta)) % 3 == 0, -1.0, 1.0)
        affine.eta.data = sign * (torch.rand(len(affine.eta), generator=random) + 0.5)
        affine.eps.data = torch.randn(len(affine.eps), generator=random)
    before = copy.deepcopy(dict(model.state_dict()))
    wanted = {}
    for path, affine in affines.items():
        layer, quant = (
            path.rpartition(".")[0],
            model.get_submodule(f"{path.rpartition('.')[0]}.weight_quant"),
        )
        codes = quant.codes(model.get_parameter(f"{layer}.weight"))
        wanted[layer] = codes * affine.eta.sign().reshape(-1, *(1,) * (codes.dim() - 1))
    folded = repfx.transform(model, ["fuse"])
    assert not layers(folded, Affine)
    for layer, codes in wanted.items():
        quant = folded.get_submodule(f"{layer}.weight_quant")
        assert torch.equal(quant.codes(folded.get_parameter(f"{layer}.weight")), codes), layer
        assert torch.equal(
            quant.scale, before[f"{layer}.weight_quant.scale"] * before[f"{layer}.affine.eta"].abs()
        )
    assert repfx.verify(model, folded, x).relative < 2e-6
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    repfx.save(model, tmp_path / "m.pt")
    assert repfx.verify(model, repfx.load(tmp_path / "m.pt"), x).relative == 0
    if bits == 8:
        assert repfx.lower(folded, tmp_path / "m.onnx", example=x).parity.agrees


def test_the_affine_refuses_what_cannot_fold() -> None:
    with pytest.raises(InputError, match="per_channel=True"):
        repfx.transform(net(), [Ptq(per_channel=False), "qprep"], example=pictures(2))
    model = quantized()
    next(iter(layers(model, Affine).values())).eta.data[1] = 0
    with pytest.raises(
        InputError, match=r"0\.main\.conv\.affine\.eta is 0 or not finite in a channel"
    ):
        repfx.transform(model, ["fuse"])

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.conv(x)))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(
                torch.relu(F.conv2d(x, self.one.weight, self.one.bias)),
                self.two.weight,
                self.one.bias,
            )

    tied = repfx.transform(Tied().eval(), ["ptq", "qprep"], example=pictures(2))
    assert len(layers(tied, Affine)) == 0 and any(
        "read elsewhere" in str(d) for d in tied.meta["repfx"].declined
    )
    shared = repfx.transform(Twice().eval(), ["ptq", "qprep"], example=pictures(2))
    assert not layers(shared, Affine)
    assert any("read more than once" in str(d) for d in shared.meta["repfx"].declined)


def test_segments_make_up_the_model() -> None:
    model, x = quantized(), pictures(4)
    repfx.calibrate(model, [x])
    found = segments(model, (x,))
    assert [s.name for s in found] == ["1", "3", "relu_1", "6", "output"]
    assert torch.equal(through(found, x)[0], model(x))
    assert [s.name for s in segments(model, (x,), ["3"])] == ["3", "output"]
    with pytest.raises(InputError, match="unknown end of a block '0'"):
        segments(model, (x,), ["0"])
    with pytest.raises(InputError, match="a model that was traced whole"):
        segments(net(), (x,))


def through(found: list[Segment], *values: Tensor) -> tuple[Tensor, ...]:
    """What the segments give, one after the other."""
    for s in found:
        values = s(*values)
    return values


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + self.conv(y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "mse", "stage": 0.0},
        {"reading": "all", "drop": 0.3},
        {"rounding": "adaround"},
        {"affine": False, "rounding": "adaround", "drop": 0.5, "loss": "mse"},
    ],
    ids=str,
)
def test_learning_beats_ranges_on_other_pictures(options: dict[str, Any]) -> None:
    options = dict(options)
    affine, x, other = options.pop("affine", True), pictures(), pictures(64, seed=7)
    base = repfx.calibrate(quantized(affine=False), [x], method="mse")
    model = quantized(affine=affine)
    state = {
        n: (p.requires_grad, type(p))
        for n, p in (*model.named_parameters(), *model.named_buffers())
    }
    assert (
        repfx.reconstruct(model, [x[:20], (x[20:], None)], iterations=60, batch=24, **options)
        is model
    )
    assert {
        n: (p.requires_grad, type(p))
        for n, p in (*model.named_parameters(), *model.named_buffers())
    } == state
    done = model.meta["reconstruct"]
    assert [b.stage for b in done] == [0, 1, 1, 2, 2] and all(b.after <= b.before for b in done)
    assert sum(b.after for b in done[:3]) < 0.95 * sum(b.before for b in done[:3])
    deployed = repfx.transform(model, ["fuse"])
    assert repfx.verify(net(), deployed, other).sqnr > repfx.verify(net(), base, other).sqnr + 1
    assert all(
        bool((q.scale > 0).all()) and q.calibrated for q in layers(deployed, FakeQuant).values()
    )


def test_the_stage_term_is_of_frozen_blocks_and_lambda_0_is_without() -> None:
    x, paper = pictures(), {"loss": "mae", "stage": 1.0}

    def learned(**options: Any) -> dict[str, Tensor]:
        model = quantized()
        repfx.reconstruct(model, [x], iterations=40, batch=16, **{**paper, **options})
        return dict(model.state_dict())

    without, alone = (
        learned(stage=0.0),
        learned(stages=["1", "3", "relu_1", "6"]),
    )  # a stage for each block: i = n
    assert all(torch.equal(without[k], alone[k]) for k in without)
    joined = learned(stages=[])
    assert not torch.equal(joined["0.main.conv.affine.eta"], without["0.main.conv.affine.eta"])
    assert torch.equal(
        learned(stages=["3"], reading="all")["0.main.conv.weight"],
        learned(stages=["3"])["0.main.conv.weight"],
    )
    assert not torch.equal(
        learned(stages=[], reading="all")["0.main.conv.weight"], joined["0.main.conv.weight"]
    )


def test_the_stage_term_grows_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    code: Any = sys.modules["repfx.calibration.blockwise"]
    learn = code.Run._learn

    def noted(self: Any, lesson: Any, *args: Any) -> Any:
        seen.append((len(lesson.rest), round(lesson.share, 9)))
        return learn(self, lesson, *args)

    monkeypatch.setattr(code.Run, "_learn", noted)
    repfx.reconstruct(quantized(), [pictures(4)], iterations=1, stage=2.0, stages=["1"])
    assert seen == [
        (0, 0.0),
        (3, 0.5),
        (2, 1.0),
        (1, 1.5),
        (0, 0.0),
    ]  # lambda i / n, without rest nothing


@pytest.mark.parametrize("rounding", ["straight", "adaround"])
def test_adaround_keeps_steps_and_settles_weights_on_codes(rounding: str) -> None:
    model = quantized(affine=False)
    before = {n: m.scale.clone() for n, m in layers(model, FakeQuant).items() if m.of_weight}
    repfx.reconstruct(model, [pictures()], iterations=30, loss="mae", rounding=rounding)
    for name, scale in before.items():
        weight, quant = model.get_parameter(name.replace("_quant", "")), model.get_submodule(name)
        settled = torch.allclose(weight, quant(weight), rtol=0, atol=1e-6)
        assert (settled, torch.equal(quant.scale, scale)) == (
            (True, True) if rounding == "adaround" else (False, False)
        )


class Stop(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, same = pictures(), {"iterations": 12, "batch": 16, "drop": 0.5, "rounding": "adaround"}
    whole = repfx.reconstruct(quantized(), [x], **same)
    on_disk = repfx.reconstruct(quantized(), x.split(10), **same, cache=tmp_path / "cache")
    assert all(torch.equal(v, on_disk.state_dict()[k]) for k, v in whole.state_dict().items())
    assert not list((tmp_path / "cache").iterdir())
    code: Any = sys.modules["repfx.calibration.blockwise"]
    learn, calls = code.Run._learn, []

    def stops(self: Any, lesson: Any, *args: Any) -> Any:
        calls.append(lesson.index)
        if len(calls) == 3:
            raise Stop
        return learn(self, lesson, *args)

    monkeypatch.setattr(code.Run, "_learn", stops)
    path = tmp_path / "run.ck"
    cut = quantized()
    with pytest.raises(Stop):
        repfx.reconstruct(cut, [x], **same, checkpoint=path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(InputError, match="NaN"):
        repfx.reconstruct(quantized(), [x, x * float("nan")], cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert all(p.requires_grad for p in cut.parameters()) and path.exists()
    again = repfx.reconstruct(quantized(), [x], **same, checkpoint=path)
    assert calls == [0, 1, 2, 2, 3, 4]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert again.meta["reconstruct"] == whole.meta["reconstruct"]
    other = quantized()
    other.get_parameter("7.weight").data += 1e-3
    for model, data, options in (
        (quantized(), x, {"batch": 8}),
        (quantized(), x, {"stages": ["3"]}),
        (quantized(), 2 * x, {}),
        (quantized(6), x, {}),
        (other, x, {}),
        (again, x, {}),  # learned already
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(InputError, match="a checkpoint of another run"):
            repfx.reconstruct(model, [data], **{**same, **options}, checkpoint=path)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    path.write_bytes(b"broken")
    with pytest.raises(InputError, match="damaged"):
        repfx.reconstruct(quantized(), [x], **same, checkpoint=path)


def test_bad_pictures_and_options_are_named() -> None:
    x = pictures(6)
    broken = x.clone()
    broken[4, 0, 0, 0] = float("nan")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([x, broken], {}, "image 10 of batches holds NaN"),
        ([], {}, "at least one batch"),
        ([x[:, :2]], {}, r"does not take images of \(2, 12, 12\)"),
        ([x, x[:, :, :8]], {}, "all must be of one size"),
        (["cat"], {}, "a batch is a tensor"),
        ([x], {"loss": "l1"}, "unknown loss 'l1'; choose one of: mae, mse"),
        ([x], {"rounding": "up"}, "choose one of: adaround, straight"),
        ([x], {"reading": "some"}, "choose one of: all, last"),
        ([x], {"drop": 1.0}, "drop is a share"),
        ([x], {"iterations": 0}, "iterations is a whole number"),
        ([x], {"lr": float("nan")}, "lr is a number"),
        ([x], {"stages": ["2"]}, "unknown end of a stage '2'"),
    ]
    for batches, options, message in cases:
        with pytest.raises(InputError, match=message):
            repfx.reconstruct(quantized(), batches, **options)
    with pytest.raises(InputError, match="no quantizers"):
        repfx.reconstruct(repfx.transform(net(), ["fuse"]), [x])
    repfx.reconstruct(quantized(), [x[:1]], iterations=2)  # one picture is a calibration set


def test_absolute_error_clips_outliers_and_squared_error_keeps_them() -> None:
    v = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).relu()
    v[::1000] = v[::1000] * 50 + 50
    observer = Observer(Grid(6, full=True))
    observer.see(v)
    mae, mse = (float(observer.scale(m)) * 31 / float(v.max()) for m in ("mae", "mse"))
    assert mae < 0.1 and mse > 0.5


def test_adaround_settles_on_the_codes_it_learned() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, axis=0)
    quant = FakeQuant(grid, grid.amax(weight) / grid.high, of_weight=True)
    soft = AdaRound(quant, weight)
    torch.testing.assert_close(
        soft(weight),
        weight.clamp(-grid.amax(weight).max(), grid.amax(weight).max()),
        atol=1e-3,
        rtol=0,
    )
    flip = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    soft.v.data = soft.v.data.sign() * torch.where(flip, -40.0, 40.0)
    assert bool(((soft.share() == 0) | (soft.share() == 1)).all()) and float(soft.penalty(2.0)) == 0
    settled = soft.settled(weight)
    torch.testing.assert_close(quant(settled), soft(weight))
    assert not torch.equal(quant.codes(settled), quant.codes(weight))


def test_sensitivity_ranks_layers_and_the_worst_stay_wide() -> None:
    torch.manual_seed(0)
    blocks = [
        RepVGG(3, 8, 3, 1, 1),
        nn.ReLU(),
        RepVGG(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
    ]
    model = randomise(
        nn.Sequential(*blocks, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5)).eval()
    )
    x = pictures()
    q = repfx.calibrate(repfx.transform(model, [Ptq(3)], example=x[:2]), [x])
    found = repfx.sensitivity(q, [x[:16], (x[16:], None)])
    names = ["0.main.conv", "2.main.conv", "4", "6", "8"]
    assert [r.layer for r in found.rows] == names
    whole = repfx.verify(repfx.transform(model, ["fuse"], example=x[:2]), q, x).sqnr
    assert found.rows[-1].together == pytest.approx(whole, abs=0.1)
    assert (
        found.rows[0].alone == pytest.approx(found.rows[0].together)
        and sum(r.alone > whole for r in found.rows) >= 4
    )
    only = repfx.calibrate(
        repfx.transform(model, [Ptq(3, wide=tuple(n for n in names if n != "6"), wide_bits=32)]),
        [x],
    )
    assert len(layers(only, FakeQuant)) == 2
    assert repfx.verify(model, only, x).sqnr == pytest.approx(found.rows[3].alone, abs=0.1)
    gains = {}
    for chosen in (found.worst(2), tuple(n for n in names if n not in found.worst(3))):
        mixed = repfx.calibrate(repfx.transform(model, [Ptq(3, wide=chosen)], example=x[:2]), [x])
        bits = {
            n.rpartition(".")[0]: m.grid.bits
            for n, m in layers(mixed, FakeQuant).items()
            if m.of_weight
        }
        assert {n for n, b in bits.items() if b == 8} == set(chosen)
        gains[chosen] = repfx.verify(model, mixed, x).sqnr
    assert gains[found.worst(2)] == max(gains.values()) > whole
    with pytest.raises(InputError, match=r"unknown layer in wide 'head\.\*'"):
        repfx.transform(model, [Ptq(wide="head.*")])
    with pytest.raises(InputError, match="count is between 0 and 5"):
        found.worst(6)
    with pytest.raises(InputError, match="is not calibrated"):
        repfx.sensitivity(repfx.transform(model, ["ptq"]), [x])
    with pytest.raises(InputError, match="at least one batch"):
        repfx.sensitivity(q, [])


def test_what_reconstruct_cannot_learn_is_refused() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    trained = repfx.transform(model.eval(), ["repq"], example=x)
    with pytest.raises(repfx.InputError, match="run the pass fuse first"):
        repfx.reconstruct(trained, [x], iterations=1)
    spec = repfx.passes.RepQ(weight_bits=1, ends=None)
    ones = repfx.transform(repfx.transform(model, ["fuse"]), [spec, "fuse"], example=x)
    with pytest.raises(repfx.InputError, match="1 bit, which adaround cannot learn"):
        repfx.reconstruct(ones, [x], iterations=1, rounding="adaround")
