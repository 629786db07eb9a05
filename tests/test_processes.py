"""Several processes against one: calibrate, bias correction, sensitivity, statistics, reconstruct,
fit."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import repfx
from repfx.blocks import RepVGG
from repfx.calibration import calibrate, match_statistics, reconstruct, sensitivity
from repfx.quant import quantizers_of
from repfx.quant.histogram import LARGE

HERE = Path(__file__).parent


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        RepVGG(3, 8, 3, 1, 1),
        nn.ReLU(),
        RepVGG(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def images(count: int = 33) -> Tensor:
    random = torch.Generator().manual_seed(1)
    # Later images are larger, so that each process sees another range.
    return torch.randn(count, 3, 40, 40, generator=random) * torch.linspace(0.2, 3, count).view(
        -1, 1, 1, 1
    )


def batches() -> list[Tensor]:
    found = list(images().split(6))
    assert found[0].shape[0] * 8 * 40 * 40 >= LARGE  # so that values are sampled
    return found


def ready(bits: int = 8) -> nn.Module:
    model = repfx.transform(net(), [repfx.passes.Ptq(bits=bits)], example=images(2))
    return calibrate(model, [images(8)])


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {name: quant.step.detach() for name, quant in quantizers_of(model).items()}


def work(given: list[Any]) -> dict[str, Any]:
    """What each function finds on these batches."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for method in ("max", "percentile", "mse", "mae", "entropy"):
        found[method] = scales(calibrate(ready(), given, method=method))
    found["bias"] = calibrate(ready(), given, bias=True).state_dict()
    found["sensitivity"] = [
        (r.layer, r.alone, r.together) for r in sensitivity(ready(), given).rows
    ]
    found["statistics"] = match_statistics(net(), given).state_dict()
    # In float64, because a rounding that differs once in float32 sends learning another way.
    wide = [x.double() for x in given]
    for how in ({}, {"rounding": "adaround"}):
        model = reconstruct(ready(4).double(), wide, iterations=40, batch=16, **how)
        meta: Any = model.meta
        rows = [(b.name, b.before, b.after) for b in meta["reconstruct"]]
        found["reconstruct " + "".join(how.values())] = [rows, model.state_dict()]
    return found


def part(where: str, sampler: bool) -> None:
    """The work of one process; with `sampler` it is given its own images only."""
    given: list[Any] = batches()
    if sampler:
        data = TensorDataset(images(32))
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        own: Any = DistributedSampler(data, world, rank, shuffle=False)
        found: Any = scales(calibrate(ready(), DataLoader(data, 4, sampler=own)))
    else:
        found = work(given)
    torch.save(found, f"{where}/{os.environ['RANK']}")


def train(where: str) -> None:
    torch.set_num_threads(1)
    torch.save(trained(32 // int(os.environ["WORLD_SIZE"])), f"{where}/{os.environ['RANK']}")


def trained(batch: int) -> dict[str, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.manual_seed(0)
    for m in model:
        if isinstance(m, nn.Conv2d):
            m.reset_parameters()
    data = (images(91), torch.arange(91) % 4)
    os.environ.pop("ACCELERATE_USE_CPU", None)  # fit must find the other processes without it
    device = "cpu" if torch.accelerator.is_available() else None
    options: dict[str, Any] = {"epochs": 2, "lr": 0.05, "device": device, "progress": False}
    repfx.fit(model, "classification", data, batch=batch, **options)
    return model.state_dict()


def detect(where: str) -> None:
    torch.set_num_threads(1)
    torch.save(detected(), f"{where}/{os.environ['RANK']}")


def detected() -> list[float]:
    """The average precision of a net that finds some of the boxes, over nine images."""
    from repfx.data.packaged import digit_scenes

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 14, 1))
    data, test = digit_scenes(images=(8, 9))
    options: dict[str, Any] = {"epochs": 1, "lr": 0.0, "device": "cpu", "progress": False}
    history = repfx.fit(model, Found(), data, valid=test, batch=4, **options)
    return [*history[-1].metrics.values()]


class Found(repfx.training.Detection):
    """Detection of boxes that are nearly the true ones."""

    def metric(self) -> Any:
        inner = super().metric()

        class Near:
            def update(self, model: Any, batch: Any) -> None:
                inner.update(lambda _: near(batch[1]), batch)

            def compute(self) -> Any:
                return inner.compute()

        return Near()


def near(y: Tensor) -> Tensor:
    """A map of 16 x 16 cells of 4 pixels with each true box, a little too large."""
    made = torch.full((len(y), 14, 16, 16), -9.0)
    for i, rows in enumerate(y.tolist()):
        for label, left, top, right, bottom in rows:
            if label >= 0:
                a, b = int((left + right) / 8), int((top + bottom) / 8)
                px, py = 4 * a + 2, 4 * b + 2
                sides = (px - left, py - top, right - px + (left % 7) / 2, bottom - py)
                made[i, :4, b, a] = torch.tensor(sides) / 4
                made[i, 4 + int(label), b, a] = 2 * math.sin(left * 12.9898 + top * 78.233 + right)
    return made


def run(world: int, where: Path, call: str) -> list[Any]:
    """What the processes of one job find."""
    where.mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import conftest, test_processes as t; "
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code} t.{call}"],
            cwd=HERE.parent,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(world)
    ]
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * world, said
    return [torch.load(where / str(rank), weights_only=True) for rank in range(world)]


def leaves(found: Any) -> Iterator[Any]:
    for value in found.values() if isinstance(found, dict) else found:
        if isinstance(value, (dict, list, tuple)):
            yield from leaves(value)
        else:
            yield value


def equal(a: Any, b: Any) -> bool:
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        return work(batches())
    finally:
        torch.set_num_threads(threads)


def test_several_processes_find_what_one_finds(alone: dict[str, Any], tmp_path: Path) -> None:
    every = run(4, tmp_path / "work", f"part({str(tmp_path / 'work')!r}, False)")
    for found in every[1:]:
        assert equal(found, every[0]), "the processes differ"
    got = every[0]
    for name in ("max", "percentile", "mse", "mae", "entropy", "bias"):
        assert equal(got[name], alone[name]), name
    for (layer, *a), (other, *b) in zip(got["sensitivity"], alone["sensitivity"], strict=True):
        assert layer == other and a == pytest.approx(b, rel=1e-12)
    for name, value in alone["statistics"].items():
        torch.testing.assert_close(got["statistics"][name], value, rtol=1e-6, atol=1e-7)
    for name in (n for n in alone if n.startswith("reconstruct")):
        (rows, state), (want, wanted) = got[name], alone[name]
        for (block, *a), (other, *b) in zip(rows, want, strict=True):
            assert block == other and a == pytest.approx(b, rel=1e-9), name
        assert any(after < before for _, before, after in rows), "it has learned"
        for key, value in wanted.items():
            torch.testing.assert_close(state[key], value, rtol=1e-8, atol=1e-9)


def test_images_that_a_sampler_has_split_are_all_used(tmp_path: Path) -> None:
    every = run(2, tmp_path / "own", f"part({str(tmp_path / 'own')!r}, True)")
    assert equal(every[0], every[1])
    assert equal(every[0], scales(calibrate(ready(), [images(32)])))


def test_four_processes_train_as_one(tmp_path: Path) -> None:
    every = run(4, tmp_path / "fit", f"train({str(tmp_path / 'fit')!r})")
    want = trained(32)
    assert all(equal(found, every[0]) for found in every)
    for name, value in every[0].items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)


def broken(where: str) -> None:
    """One process has a batch that the model does not take."""
    rank = int(os.environ["RANK"])
    given = [torch.randn(4, 3 + rank, 40, 40)]
    try:
        calibrate(ready_alone(), given)
    except repfx.InputError as error:
        torch.save([str(error)], f"{where}/{rank}")


def ready_alone() -> nn.Module:
    return repfx.transform(net(), ["ptq"], example=images(2))


def test_an_error_in_one_process_is_an_error_in_all(tmp_path: Path) -> None:
    first, second = run(2, tmp_path / "bad", f"broken({str(tmp_path / 'bad')!r})")
    assert "process 1 has failed" in first[0] and "(4, 4, 40, 40)" in first[0]
    assert "(4, 4, 40, 40)" in second[0]


class Two(nn.Module):
    """Two inputs, of which one passes the first block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        u, v = torch.relu(self.a(p)), torch.relu(self.b(q))
        return self.d(torch.relu(self.c(u))) + v


def hard(where: str) -> None:
    """What goes wrong in one process, each followed by a collective that must not be disturbed."""
    torch.set_num_threads(1)
    rank, said = int(os.environ["RANK"]), []

    def refused(call: Any) -> None:
        try:
            call()
            said.append("done")
        except repfx.InputError as error:
            said.append(str(error))
        every: list[Any] = [None, None]
        torch.distributed.all_gather_object(every, rank)
        assert every == [0, 1], every

    bad = list(images(8).split(2))
    bad[1] = torch.full_like(bad[1], float("nan"))
    for method in ("max", "mse"):
        refused(partial(calibrate, ready_alone(), bad, method=method))
    refused(lambda: match_statistics(net(), bad))
    sizes = [images(2), images(2)[..., :32]]
    refused(lambda: reconstruct(ready(), sizes, iterations=2))
    alike = [images(2), (1 + rank) * images(2), images(2)]
    refused(lambda: calibrate(ready_alone(), alike))
    refused(lambda: calibrate(ready_alone().bfloat16(), [x.bfloat16() for x in images(4).split(2)]))
    x = images(4)
    two = repfx.transform(Two().eval(), ["ptq"], example={"p": x, "q": x})
    given = [{"p": x, "q": x.flip(0)}]
    refused(lambda: reconstruct(two, given, iterations=2, batch=2, blocks=["relu"]))
    own = Path(where) / f"disk{rank}"
    own.mkdir()
    for _ in range(2):  # the second run is loaded from the file of the first process
        model = ready()
        options: dict[str, Any] = {"iterations": 2, "batch": 2, "checkpoint": own / "run.ck"}
        refused(partial(reconstruct, model, list(images(4).split(2)), **options))
        said.append(str(sum(float(p.sum()) for p in model.parameters())))
    torch.save(said, f"{where}/{rank}")


def test_one_process_alone_disturbs_no_other(tmp_path: Path) -> None:
    first, second = run(2, tmp_path / "hard", f"hard({str(tmp_path / 'hard')!r})")
    for a, b, part in zip(
        first,
        second,
        ["NaN", "NaN", "NaN", "one size", "begin with the same", "done", "done", "done"],
        strict=False,
    ):
        assert part in a and part in b, (part, a, b)
    assert first[7:] == second[7:] and first[8] == first[10]


def test_precision_over_another_number_of_images_in_each_process(tmp_path: Path) -> None:
    alone = detected()
    assert 0.2 < alone[0] < 0.95
    for found in run(2, tmp_path / "2", f"detect({str(tmp_path / '2')!r})"):
        assert found == pytest.approx(alone, abs=1e-6)
