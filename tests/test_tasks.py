"""Tasks and pictures: PSNR, distillation, class folders, zips of them, and the command that trains
on them.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import repfx
from repfx.cli.main import app
from repfx.data import Pairs, Pictures
from repfx.errors import InputError
from repfx.training import SuperResolution, fit
from repfx.training.tasks import psnr

pytestmark = pytest.mark.slow


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def test_super_resolution_and_distillation() -> None:
    high = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 255
    low = nn.functional.avg_pool2d(high, 2)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.PixelShuffle(2))
    history = fit(
        model,
        SuperResolution(scale=2),
        (low, high),
        valid=(low, high),
        preset="ecbsr",
        epochs=8,
        batch=4,
        lr=0.02,
    )
    assert history[-1].metrics["psnr"] > history[0].metrics["psnr"] + 1
    a, b = high[:2], high[:2].clone()
    b[:, :, 4:12, 4:12] += 1
    b[:, :, 0] = 0  # in the crop
    inside = ((b.clamp(0, 255) - a)[..., 2:-2, 2:-2] / 255).square().mean((1, 2, 3))
    assert torch.allclose(psnr(a, b, 2).float(), -10 * inside.log10(), atol=1e-3)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 4
    x = torch.randn(64, 3, 8, 8, generator=g) + torch.randn(4, 3, 8, 8, generator=g)[y]
    teacher, pupil = net(), net()
    teacher(x), pupil(x)
    fit(teacher, "classification", (x, y), epochs=5, batch=16, lr=0.05)
    fit(
        pupil,
        "classification",
        (x, y * 0),
        epochs=5,
        batch=16,
        lr=0.05,
        teacher=teacher,
        distill=1.0,
    )
    assert float((pupil(x).argmax(1) == y).float().mean()) > 0.8, (
        "the labels were all 0: it learned from the teacher"
    )


def class_folders(root: Path) -> Path:
    for part, count in (("train", 12), ("test", 4)):
        for value, name in ((40, "dark"), (200, "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (value + i,) * 3).save(
                    root / part / name / f"{i:02}.png"
                )
    return root


def test_class_folders_and_zips_of_them(tmp_path: Path) -> None:
    root, archive = class_folders(tmp_path / "data"), tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for p in sorted(root.rglob("*.png")):
            file.write(p, p.relative_to(root))
    there, zipped = Pictures(root, "train", augment=True), Pictures(archive, "train", augment=True)
    assert there.classes == ("dark", "light") and len(there) == 24
    for index in (0, 23):
        assert (
            torch.equal(there[index][0], zipped[index][0])
            and there[index][1] == zipped[index][1] == index // 12
        )
    cached = Pictures(root, "train", augment=True, cache=True)
    assert torch.equal(cached[3][0], there[3][0]) and torch.equal(cached[3][0], there[3][0])
    first = there[0][0]
    there.set_epoch(0, 1)
    moved = there[0][0]
    there.set_epoch(0, 0)
    assert not torch.equal(first, moved) and torch.equal(first, there[0][0])
    runner, out = CliRunner(), tmp_path / "out.pt"
    (tmp_path / "m.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), "
        "nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))\n"
    )
    sys.path.insert(0, str(tmp_path))
    args = [
        "train",
        "m:make",
        "--data",
        str(archive),
        "--epochs",
        "4",
        "--lr",
        "0.1",
        "--batch",
        "8",
        "--passes",
        "repq",
    ]
    result = runner.invoke(app, [*args, "-o", str(out), "--checkpoint", str(tmp_path / "ck")])
    sys.path.remove(str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "top1" in result.output and (tmp_path / "ck").exists()
    assert isinstance(repfx.load(out), nn.Module)
    (root / "train" / "dark" / "03.png").write_bytes(b"no picture")
    with pytest.raises(
        InputError, match=r"train/dark/03\.png is not a readable image; skip_broken=True"
    ):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), "classification", root, epochs=1)
    skipped = Pictures(root, "train", skip_broken=True)
    assert len(skipped) == 23 and skipped.broken == ("train/dark/03.png",)
    (tmp_path / "bad.zip").write_bytes(archive.read_bytes()[:500])
    with pytest.raises(InputError, match="neither a folder nor a readable zip"):
        Pictures(tmp_path / "bad.zip")
    with pytest.raises(InputError, match="no image in a class folder"):
        Pictures(root / "train" / "dark")


def high_pictures(root: Path, count: int = 3) -> Path:
    random = np.random.default_rng(0)
    for part, names in (("train/set", count), ("test/hr", 2)):
        (root / part).mkdir(parents=True)
        for i in range(names):
            coarse = random.integers(0, 256, (5, 6 + i, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((41 + 4 * i, 37), Image.Resampling.BICUBIC).save(
                root / part / f"{i}.png"
            )
    (root / "test/lr_x2").mkdir()
    for i in range(2):
        Image.new("RGB", (20 + 2 * i, 18), (255, 0, 0)).save(root / "test/lr_x2" / f"{i}.png")
    return root


def test_pairs_are_read_or_made(tmp_path: Path) -> None:
    root = high_pictures(tmp_path / "sr")
    low, high = Pairs(root, "test")[1]
    assert low.shape == (1, 18, 22) and high.shape == (1, 36, 44)
    assert torch.allclose(low, torch.tensor(65.481 + 16), atol=1e-3)  # Y of pure red
    low, high = Pairs(root, "train", channels=3)[0]
    assert low.shape == (3, 18, 20) and high.shape == (3, 36, 40)
    averaged = F.avg_pool2d(high[None], 2)[0]
    assert (averaged - low).abs().mean() < 5 and high.max() > 100
    cut = Pairs(root, "train", patch=16, repeat=4, cache=True)
    assert len(cut) == 12 and cut[5][0].shape == (1, 8, 8) and cut[5][1].shape == (1, 16, 16)
    assert torch.equal(cut[5][1], cut[5][1]) and not torch.equal(cut[5][1], cut[8][1])
    for index in range(12):  # low and high are turned and flipped together
        low, high = cut[index]
        assert (F.avg_pool2d(high[None], 2)[0] - low)[
            ..., 1:-1, 1:-1
        ].abs().mean() < 0.1 * high.std()
    cut.set_epoch(0, 1)
    moved = cut[5][1]
    cut.set_epoch(0, 0)
    assert not torch.equal(moved, cut[5][1])
    with pytest.raises(InputError, match="not a multiple of the scale"):
        Pairs(root, patch=15)
    with pytest.raises(InputError, match="smaller than a patch of 64"):
        Pairs(root, "train", patch=64)[0]
    (root / "test/lr_x2/1.png").unlink()
    with pytest.raises(InputError, match=r"hr/1\.png but no test/lr_x2/1\.png"):
        Pairs(root, "test")
    (root / "train/set/1.png").write_bytes(b"no picture")
    assert Pairs(root, "train", skip_broken=True).broken == ("train/set/1.png",)


def test_the_command_trains_super_resolution_and_packaged_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = high_pictures(tmp_path / "sr")
    (tmp_path / "made.py").write_text(
        "from torch import nn\n"
        "def sr():\n    return nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 4, 3, "
        "1, 1), nn.PixelShuffle(2))\n"
        "def digits():\n    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), "
        "nn.Flatten(), nn.Linear(288, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    runner, out = CliRunner(), ["-o", str(tmp_path / "out.pt"), "--epochs", "1"]
    task = ["--task", "super-resolution", "--size", "16", "--preset", "ecbsr"]
    done = runner.invoke(app, ["train", "made:sr", "--data", str(root), *task, *out])
    assert done.exit_code == 0 and "psnr" in done.output, done.output
    done = runner.invoke(app, ["train", "made:digits", "--data", "digits", *out])
    assert done.exit_code == 0 and "top1" in done.output, done.output
    done = runner.invoke(app, ["train", "made:digits", "--data", "cifar", *out])
    assert done.exit_code != 0 and "no such file or folder: cifar" in str(done.exception)
