"""On a GPU the same results as on the CPU, but for rounding. Skipped where torch sees none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import repfx
from repfx.blocks import ACNet, QARepVGG, RepVGG
from repfx.calibration import activations as store
from repfx.calibration import match_statistics
from repfx.calibration.blockwise import Block, Run
from repfx.cli.options import app
from repfx.passes import Ptq
from repfx.quant import METHODS, FakeQuant, Grid, Observer
from repfx.quant.histogram import LARGE
from repfx.testing import randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.fixture(autouse=True)
def float32() -> Any:
    """No TF32, whose ten bits would hide what differs, and the same bits each time."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = False, True, False
    yield
    cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = before


def net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [
        RepVGG(3, 16, 3, 1, 1),
        QARepVGG(16, 16, 3, 2, 1),
        ACNet(16, 16, 3, 1, 1),
        RepVGG(16, 16, 3, 1, 1),
    ]
    layers = [layer for block in blocks for layer in (block, nn.ReLU())]
    return randomise(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    )


def pictures(n: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def labelled(n: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures of five colours."""
    y = torch.arange(n) % 5
    colours = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [-2, -2, 0], [2, 2, 2]])
    return pictures(n) + colours[y].reshape(n, 3, 1, 1), y


def off(a: nn.Module, b: nn.Module) -> float:
    """How far a model on the CPU and one on the GPU are apart."""
    with torch.no_grad():
        return repfx.verify(a, copy.deepcopy(b).cpu(), pictures(8, seed=5)).relative


def on_gpu(model: nn.Module) -> bool:
    return all(t.is_cuda for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    "passes", ["bnfold", "fuse", "qarep", "ptq", "repq", "repq(bn=batch)", "repq(bn=sampled)"]
)
def test_passes_keep_the_device(passes: str) -> None:
    model = repfx.transform(net().cuda(), [passes])
    assert on_gpu(model) and off(repfx.transform(net(), [passes]), model) < 1e-5


@pytest.mark.parametrize("method", sorted(METHODS))
def test_calibrate(method: str) -> None:
    scales = []
    for device in ("cpu", "cuda"):
        model = repfx.transform(net(), ["ptq"]).to(device)
        repfx.calibrate(model, [pictures(64, seed) for seed in range(3)], method=method)
        scales.append(
            torch.stack(
                [
                    m.scale.cpu()
                    for m in model.modules()
                    if isinstance(m, FakeQuant) and not m.of_weight
                ]
            )
        )
    assert pictures(64).numel() > LARGE
    # A value by the edge of a bin may fall on its other side.
    assert torch.allclose(*scales, rtol=0.02 if method == "entropy" else 0.005)


@pytest.mark.parametrize("size", [1000, 10 * LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_counted_alike(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = Observer(Grid(8)), Observer(Grid(8))
    for part in (x, x / 2, 4 * x):
        here.see(part)
        there.see(part.cuda())
    assert here.histogram is not None and there.histogram is not None
    assert torch.equal(here.histogram.counts(), there.histogram.counts())


def test_biases_and_sensitivity() -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = repfx.transform(net(), [Ptq(4)]).to(device)
        repfx.calibrate(model, [pictures()], bias=True)
        found.append((model, repfx.sensitivity(model, [pictures()])))
    assert off(found[0][0], found[1][0]) < 0.02  # a value by the edge of a step goes one whole step
    assert found[0][1].worst(2) == found[1][1].worst(2)


@pytest.mark.parametrize("how", [{}, {"rounding": "adaround", "drop": 0.5, "loss": "mse"}])
def test_an_interrupted_reconstruct_goes_on(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(checkpoint: Path | None) -> Any:
        model = repfx.transform(net(), [Ptq(4, weights="mse"), "qprep"]).cuda()
        kept = {"cache": tmp_path, "checkpoint": checkpoint}
        return repfx.reconstruct(model, [pictures()], iterations=100, batch=32, **kept, **how)

    def save_and_stop(self: Run, done: list[Block], save: Any = Run._save) -> None:
        save(self, done)
        raise KeyboardInterrupt

    with monkeypatch.context() as now, pytest.raises(KeyboardInterrupt):
        now.setattr(Run, "_save", save_and_stop)
        run(tmp_path / "run.ck")
    cut, whole = run(tmp_path / "run.ck"), run(None)
    assert any(b.after < b.before for b in whole.meta["reconstruct"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True)
    )
    folded = repfx.transform(whole, ["fuse"])
    assert on_gpu(folded) and repfx.verify(whole, folded, pictures().cuda()).relative < 1e-5


@pytest.mark.parametrize("room", [0, 10**5, 10**9])
def test_activations_stay_on_the_gpu_while_they_fit(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_room", lambda device: room)
    batches = pictures().cuda().split(8)
    rows = store.Rows(None, torch.device("cuda")).fill((x,) for x in batches)
    assert rows.data[0].is_cuda == (room == 10**9)
    assert all(torch.equal(a, b) for (a,), b in zip(rows.batches(8), batches, strict=True))
    assert torch.equal(rows[torch.tensor([3, 60])][0], pictures()[[3, 60]].cuda())


@pytest.fixture
def training_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")  # accelerate looks once a process
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("training_on_gpu")
@pytest.mark.parametrize("mode", ["running", "batch", "estimate", "sampled"])
def test_fit_trains_the_merged_weight(mode: str) -> None:
    model = repfx.transform(net(), [f"repq(bits=4, bn={mode})"])
    history = repfx.fit(
        model,
        "classification",
        labelled(),
        valid=labelled(),
        epochs=8,
        batch=16,
        lr=0.05,
        progress=False,
    )
    assert history[-1].loss < 0.7 * history[0].loss
    assert on_gpu(model)
    assert repfx.verify(model, repfx.transform(model, ["fuse"]), pictures(8).cuda()).relative < 1e-4


def test_lower_and_save(tmp_path: Path) -> None:
    model = repfx.calibrate(repfx.transform(net(), ["ptq"]).cuda(), [pictures()])
    repfx.save(model, tmp_path / "net.pt")
    loaded = repfx.load(tmp_path / "net.pt")
    assert off(loaded, model) < 1e-5
    found = []
    for name, one in (("gpu", model), ("cpu", loaded)):
        repfx.lower(
            one, tmp_path / f"{name}.onnx", example=pictures(2).to(next(one.parameters()).device)
        )
        found.append((tmp_path / f"{name}.onnx").read_bytes())
    assert found[0] == found[1]


def test_what_describes_a_model(tmp_path: Path) -> None:
    model = net().cuda()
    assert str(repfx.inspect(model)) == str(repfx.inspect(net()))
    repfx.report(model, tmp_path / "net.html", data=[pictures()])
    merged = repfx.transform(model, ["repq(bn=estimate)"])
    before = copy.deepcopy(merged)
    match_statistics(merged, [pictures()])
    assert repfx.verify(before, merged, pictures(8).cuda()).relative < 1e-4


def test_the_command_line(tmp_path: Path) -> None:
    repfx.save(repfx.transform(net(), ["fuse"]), tmp_path / "net.pt")
    np.save(tmp_path / "data.npy", pictures().numpy())
    for method in ("mse", "repapq"):
        given = [
            "quantize",
            f"{tmp_path}/net.pt",
            "--data",
            f"{tmp_path}/data.npy",
            "-o",
            f"{tmp_path}/{method}.pt",
        ]
        more = [
            "--method",
            method,
            "--iterations",
            "20",
            "--device",
            "cuda",
            "--keep",
            "1",
            "--bits",
            "4",
        ]
        done = CliRunner().invoke(app, [*given, *more])
        assert done.exit_code == 0, done.output
        assert not any(
            t.is_cuda for t in repfx.load(tmp_path / f"{method}.pt").state_dict().values()
        )
