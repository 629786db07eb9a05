"""fit: learns, stops where it must, and goes on after a kill -9 as if nothing had been."""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import repfx
from repfx.blocks import RepVGG
from repfx.errors import CheckError, InputError
from repfx.quant import FakeQuant
from repfx.training import PRESETS, Classification, CustomL2, fit
from repfx.training.options import Options
from repfx.training.recipe import Recipe, optimizer_of, recipe
from repfx.training.shuffle import source_of

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def pictures(count: int = 96, classes: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    return torch.randn(count, 3, 8, 8, generator=g) + torch.randn(classes, 3, 8, 8, generator=g)[
        y
    ], y


def net(norm: bool = True, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    first = RepVGG(3, 8, 3, 2, 1) if norm else nn.Conv2d(3, 8, 3, 2, 1)
    return nn.Sequential(
        first,
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(128, 4),
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Noisy(Dataset):
    """Draws from the global generators of Python and numpy."""

    def __len__(self) -> int:
        return 46

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = pictures(46)
        return x[i] + random.random() + float(np.random.rand()), y[i]


class Killed(Classification):
    """Kills its process with -9 when the loss is asked for the n-th time."""

    left = -1

    def loss(self, model: Any, batch: Any) -> Tensor:
        Killed.left -= 1
        if Killed.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


def long_run(path: str | None, quantized: bool, at: int = -1) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    Killed.left = at
    model = repfx.transform(net(dropout=0.3), ["repq(bits=4)"]) if quantized else net(dropout=0.3)
    how: dict[str, Any] = {"optimizer": "sgd"} if quantized else {"optimizer": "adam", "lr": 1e-3}
    fit(
        model,
        Killed(),
        Noisy(),
        epochs=3,
        batch=6,
        accumulate=2,
        ema=0.9,
        checkpoint=path,
        checkpoint_every=2,
        **how,
    )
    return weights(model)


def elsewhere(code: str, **env: str) -> subprocess.Popen:
    start = f"import sys; sys.path.insert(0, {str(HERE)!r}); import conftest, test_fit; "
    return subprocess.Popen(
        [sys.executable, "-c", start + code], env={**os.environ, **env}, cwd=HERE.parent
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, quantized: bool) -> None:
    path = tmp_path / "run.ck"
    whole = long_run(None, quantized)
    steps = [
        random.SystemRandom().randint(5, 8),
        random.SystemRandom().randint(1, 12),
    ]  # of 24, 8 an epoch, saved every 4
    print("killed at", steps)
    for at in steps:
        assert (
            elsewhere(f"test_fit.long_run({str(path)!r}, {quantized}, {at})").wait()
            == -signal.SIGKILL
        )
    assert same(whole, long_run(str(path), quantized))
    assert same(whole, long_run(str(path), quantized)), (
        "a finished run is loaded, not trained again"
    )


@pytest.mark.parametrize("passes", [[], ["repq"], ["repq(bits=4, bn=estimate)"]])
def test_learns(passes: list[str], tmp_path: Path) -> None:
    model = repfx.transform(net(), passes) if passes else net()
    data = pictures()
    log = tmp_path / "log.jsonl"
    history = fit(
        model, "classification", data, valid=data, epochs=6, batch=16, lr=0.05, warmup=1, log=log
    )
    assert history[-1].loss < 0.5 * history[0].loss and history[-1].metrics["top1"] > 0.9
    assert history[-1].metrics["top5"] == 1
    assert history[-1].lr < history[0].lr == pytest.approx(0.05)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["loss"] == history[-1].loss
    assert "top1" in str(history) and "6 epochs" in str(history)
    assert all(m.calibrated for m in model.modules() if isinstance(m, FakeQuant))
    if passes:
        x = data[0]
        assert repfx.verify(model, repfx.transform(model, ["fuse"]), x).relative < 1e-4


def two(where: str) -> None:
    torch.set_num_threads(1)
    plain, quantized = net(norm=False), repfx.transform(net(), ["repq"])
    for name, model in (("plain", plain), ("quantized", quantized)):
        fit(
            model,
            "classification",
            pictures(91),
            epochs=2,
            batch=8,
            device="cpu",
            lr=0.05,
            accumulate=2,
            clip=1.0,
        )
        torch.save(weights(model), f"{where}/{name}{os.environ['RANK']}")
    torch.save(own_loop(int(os.environ["RANK"])), f"{where}/own{os.environ['RANK']}")


def own_loop(rank: int) -> dict[str, Tensor]:
    """The parameters and scales after one's own loop with DDP, on images of one's own."""
    model = repfx.transform(net(), ["repq(bits=4)"]).train()
    both = nn.parallel.DistributedDataParallel(model)
    x, y = pictures(80)
    optimizer = torch.optim.SGD(both.parameters(), 0.01, momentum=0.9)
    for i in range(5):
        part = slice(8 * (2 * i + rank), 8 * (2 * i + rank) + 8)
        optimizer.zero_grad()
        F.cross_entropy(both((1 + rank) * x[part]), y[part]).backward()
        optimizer.step()
    named = dict(model.named_parameters())
    scales = {k: v for k, v in model.named_buffers() if k.endswith("_quant.scale")}
    assert all(bool((v > 0).all()) for v in scales.values()) and len(scales) == 6
    return {k: v.detach().clone() for k, v in {**named, **scales}.items()}


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "LOCAL_WORLD_SIZE": "2",
    }
    runs = [
        elsewhere(f"test_fit.two({str(tmp_path)!r})", RANK=r, LOCAL_RANK=r, **shared) for r in "01"
    ]
    one = net(norm=False)
    fit(
        one,
        "classification",
        pictures(91),
        epochs=2,
        batch=16,
        device="cpu",
        lr=0.05,
        accumulate=2,
        clip=1.0,
    )
    assert [r.wait() for r in runs] == [0, 0]
    found = {p.name: torch.load(p, weights_only=True) for p in tmp_path.iterdir()}
    for name, value in one.state_dict().items():
        assert torch.allclose(value, found["plain0"][name], rtol=0, atol=1e-5), name
    assert same(found["plain0"], found["plain1"])
    assert same(found["quantized0"], found["quantized1"]), (
        "scales and running statistics are shared too"
    )
    assert same(found["own0"], found["own1"])


def half() -> None:
    model, before = net(), set(net().__dict__)
    fit(model, "classification", pictures(32), epochs=1, batch=16, precision="bf16", lr=0.05)
    assert set(model.__dict__) == before and all(
        p.dtype == torch.float32 for p in model.parameters()
    )
    assert model(pictures(8)[0]).dtype == torch.float32 and not same(weights(model), weights(net()))


def test_mixed_precision_leaves_the_model_as_it_was() -> None:
    assert elsewhere("test_fit.half()").wait() == 0  # accelerate has one precision a process


def test_accumulated_batches_are_one_batch() -> None:
    models = [net(norm=False) for _ in range(3)]
    for model, batch, accumulate in zip(models, (16, 8, 8), (1, 2, 1), strict=True):
        fit(model, "classification", pictures(45), epochs=2, batch=batch, accumulate=accumulate)
    a, b, c = (m.state_dict()["0.weight"] for m in models)
    assert torch.allclose(a, b, atol=1e-6) and not torch.allclose(a, c, atol=1e-4)


def test_the_average_is_what_stays() -> None:
    plain, averaged = net(), net()
    for model, ema in ((plain, None), (averaged, 0.5)):
        fit(
            model,
            "classification",
            pictures(32),
            epochs=1,
            batch=16,
            schedule="constant",
            ema=ema,
            weight_decay=0,
        )
    first, key = net(), "2.weight"
    fit(first, "classification", pictures(32), epochs=1, batch=32, schedule=lambda t: 0.0)
    assert same(
        {key: first.state_dict()[key]}, {key: net().state_dict()[key]}
    )  # a rate of 0 moves nothing
    first = net()
    order = source_of(pictures(32), 16).steps(0, 0, 1, 1, 0)[0][0][0]
    fit(
        first,
        "classification",
        [t[order] for t in pictures(32)],
        epochs=1,
        batch=16,
        schedule="constant",
        weight_decay=0,
    )
    middle = (first.state_dict()[key] + plain.state_dict()[key]) / 2
    assert torch.allclose(averaged.state_dict()[key], middle, atol=1e-6)


class Poisoned(Classification):
    def loss(self, model: Any, batch: Any) -> Tensor:
        return super().loss(model, batch) * (math.nan if (batch[1] == 3).any() else 1)


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    x, y = pictures(32)
    path, model = tmp_path / "run.ck", net()
    fit(model, Poisoned(), (x, y % 3), epochs=1, batch=8, checkpoint=path)
    good, kept = weights(model), path.read_bytes()
    with pytest.raises(
        CheckError, match=r"the loss is nan in epoch 2, step \d.*last checkpoint is .*run\.ck"
    ):
        fit(model, Poisoned(), (x, y), epochs=2, batch=8, checkpoint=path)
    assert path.read_bytes() == kept
    other = net()
    fit(other, Poisoned(), (x, y % 3), epochs=1, batch=8, checkpoint=path)
    assert same(good, weights(other))
    with pytest.raises(CheckError, match=r"parameter .* is no longer finite"):
        fit(net(), Classification(), (x, y), epochs=1, batch=32, schedule=lambda t: math.inf)


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "run.ck", pictures(16)
    fit(net(), "classification", data, epochs=1, checkpoint=path)
    with pytest.raises(
        InputError, match=r"another model: 0\.weight is not in the checkpoint; .* and \d+ more"
    ):
        fit(net(norm=False), "classification", data, epochs=1, checkpoint=path)
    with pytest.raises(InputError, match="written with batch=64, but this run has 8"):
        fit(net(), "classification", data, epochs=1, batch=8, checkpoint=path)
    fit(net(), "classification", data, epochs=1, batch=8, checkpoint=path, resume=False)
    for content in (b"", b"junk", path.read_bytes()[:900]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a checkpoint of repfx"):
            fit(net(), "classification", data, epochs=1, checkpoint=path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match="not a checkpoint of repfx"):
        fit(net(), "classification", data, epochs=1, checkpoint=path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"data": (pictures(8)[0], torch.full((8,), 10))},
            "label 10 is out of range: the model has 4 classes, 0 to 3",
        ),
        ({"data": (pictures(8)[0], torch.full((8,), -1))}, "label -1 is out of range"),
        ({"data": (pictures(8)[0], pictures(4)[1])}, "different lengths: 8, 4"),
        ({"data": TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0))}, "the data set is empty"),
        ({"data": 3}, "data is tensors"),
        (
            {"data": DataLoader(Noisy(), sampler=WeightedRandomSampler([1.0] * 46, 46))},
            "custom sampler",
        ),
        ({"data": "nowhere"}, "no such file or folder: nowhere"),
        (
            {"task": "segmentation"},
            "unknown task 'segmentation'; choose one of: classification, detection, super-",
        ),
        ({"task": 3}, "a task needs loss"),
        ({"epochs": 0}, "epochs is a whole number from 1"),
        ({"epochs": None}, "give the number of epochs"),
        ({"l2": "huge"}, "unknown l2 'huge'; choose one of: custom, eq6, plain"),
        ({"l2": "custom", "model": nn.Conv2d(3, 4, 3)}, "no sum of a kxk and a 1x1 branch"),
        ({"preset": "resnet"}, "unknown preset 'resnet'"),
        ({"preset": {"rate": 3}}, "unknown setting in preset 'rate'"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"schedule": "up"}, "unknown schedule 'up'"),
        ({"lr": -1}, "lr is a number from 0"),
        ({"ema": 1.5}, "ema is a decay between 0 and 1"),
        ({"batch": 0}, "batch is a whole number from 1"),
        ({"clip": 0}, "clip is a norm above 0"),
        ({"device": "tpu"}, "device is None or 'cpu'"),
        ({"model": nn.Flatten()}, "no parameter to train"),
        ({"log": "/nowhere/log"}, "cannot write /nowhere/log"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v[:24],
)
def test_bad_input_is_named(given: dict[str, Any], message: str) -> None:
    given = {"model": net(), "task": "classification", "data": pictures(8), "epochs": 1, **given}
    with pytest.raises(InputError, match=message):
        fit(given.pop("model"), given.pop("task"), given.pop("data"), **given)


def test_presets_and_decay() -> None:
    assert set(PRESETS) == {"repvgg", "qarepvgg", "qat", "ecbsr", "yolov6"}
    q = recipe("qat", {"lr": 0.02, "epochs": None})
    assert (q.epochs, q.warmup, q.lr, q.momentum, q.weight_decay) == (10, 3, 0.02, 0.9, 1e-4)
    assert [q.lr_at(s, 2) for s in (0, 5)] == pytest.approx([0.02 / 6, 0.02]) and q.lr_at(
        20, 2
    ) == pytest.approx(0)
    assert isinstance(optimizer_of(net(), recipe("ecbsr", {"epochs": 1})), torch.optim.Adam)
    model = repfx.transform(net(), ["repq"])
    names = {id(p): n for n, p in model.named_parameters()}
    for everything in (False, True):
        decayed, not_decayed = optimizer_of(model, Recipe(1, decay_norm=everything)).param_groups
        assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (1e-4, 0)
        assert all(
            ("weight" in names[id(p)] and p.dim() > 1) or everything for p in decayed["params"]
        )
        free = [names[id(p)] for p in not_decayed["params"]]
        assert (
            sum(n.endswith("_quant.log_ratio") for n in free) == 6
            and (len(free) == 6) is everything
        )


@pytest.mark.parametrize("l2", ["plain", "custom", "eq6"])
def test_the_decay_of_a_block_is_the_one_asked_for(l2: str) -> None:
    def blocks() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(
            RepVGG(3, 3, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, 4),
        )

    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    model, ours = blocks(), blocks().train()
    given = {"lr": 0.5, "momentum": 0, "weight_decay": 0.1, "schedule": "constant"}
    fit(model, "classification", (x, y), epochs=1, batch=16, l2=l2, preset=given)
    penalty = None if l2 == "plain" else CustomL2.of(ours, denominator=l2 == "custom")
    kernels = {id(k) for k in penalty.kernels} if penalty else set()
    loss = F.cross_entropy(ours(x), y)
    if penalty:
        loss = loss + 0.05 * penalty.penalty()
    loss = loss + 0.05 * sum(
        p.square().sum() for p in ours.parameters() if p.dim() > 1 and id(p) not in kernels
    )
    loss.backward()
    trained = dict(model.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(
            trained[name], p - 0.5 * p.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_every_parameter_of_fit_has_its_place() -> None:
    places = [f.name for kind in (Recipe, Options) for f in fields(kind)]
    own = ["model", "task", "data", "valid", "preset"]
    assert sorted([*own, *places]) == sorted(inspect.signature(fit).parameters)
