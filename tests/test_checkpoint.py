"""Checkpoints say what they are, and one that is not what it should be is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.files import checkpoint
from repfx.quant import FakeQuant, Grid


def model(scale: float | None = 0.5) -> nn.Module:
    found = nn.Sequential(nn.Linear(2, 2), FakeQuant(Grid(8)))
    quant: Any = found[1]
    if scale is not None:
        quant.set_scale(torch.tensor(scale))
    return found


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path, saved, other = tmp_path / "a.ck", model(), model(None)
    checkpoint.write(path, "repfx.fit", saved, {"at": [1, 2.5], "rows": ["a"]})
    found = checkpoint.read(path, "repfx.fit", ("at", "rows"))
    assert found["at"] == [1, 2.5] and found["rows"] == ["a"]
    checkpoint.load_model(path, other, found)
    assert other[1].calibrated and torch.equal(other[0].weight, saved[0].weight)
    checkpoint.write(path, "repfx.fit", model(None), {})
    checkpoint.load_model(path, other, checkpoint.read(path, "repfx.fit", ()))
    assert not other[1].calibrated
    saved[1].scale.zero_()  # where a learned step may be for a moment
    checkpoint.write(path, "repfx.fit", saved, {})
    checkpoint.load_model(path, other, checkpoint.read(path, "repfx.fit", ()))
    assert other[1].calibrated
    assert [p.name for p in tmp_path.iterdir()] == ["a.ck"]


class Evil:
    def __repr__(self) -> str:
        return "a pickled object"

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code came back",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"not a file of torch", "not a checkpoint of repfx.fit, or it is damaged"),
        ({"format": "other 1"}, "is not a checkpoint of repfx.fit$"),
        ({"weights": 1}, "is not a checkpoint of repfx.fit$"),
        ([1, 2], "is not a checkpoint of repfx.fit$"),
        ({"format": "repfx.reconstruct 1"}, "not a checkpoint of repfx.fit; .* repfx.reconstruct"),
        ({"format": "repfx.fit 2"}, "in version 2; this repfx reads 1"),
        ({"format": "repfx.fit 1", "model": {}}, "is damaged: it has no at"),
        ({"format": "repfx.fit 1", "model": Evil()}, "or it is damaged"),
    ],
    ids=str,
)
def test_a_file_that_is_none_is_refused(
    content: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.ck"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(repfx.InputError, match=text):
        checkpoint.read(path, "repfx.fit", ("at",))
    assert "code came back" not in capsys.readouterr().out


def test_a_cut_file_and_one_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.ck"
    checkpoint.write(path, "repfx.fit", model(), {})
    path.write_bytes(path.read_bytes()[:-200])
    for bad in (path, tmp_path / "no.ck"):
        with pytest.raises(repfx.InputError, match="or it is damaged"):
            checkpoint.read(bad, "repfx.fit", ())


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "a.ck"
    checkpoint.write(path, "repfx.fit", model(), {})
    found, other = checkpoint.read(path, "repfx.fit", ()), nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(repfx.InputError, match=r"another model: 1\.scale is not in the model; .*2"):
        checkpoint.load_model(path, other, found)


def test_one_kind_of_run_does_not_go_on_from_the_other(tmp_path: Path) -> None:
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU())
    path = tmp_path / "run.ck"
    quantized = repfx.transform(net, ["ptq"], example=x)
    repfx.reconstruct(quantized, [x], iterations=1, checkpoint=path)
    with pytest.raises(repfx.InputError, match=r"of repfx\.fit; it is one of repfx\.rec"):
        repfx.fit(net, "classification", (x, y), epochs=1, checkpoint=path, progress=False)
