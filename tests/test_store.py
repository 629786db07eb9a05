"""save and load: exact, whole or nothing, and unable to run code."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, fx, nn

import repfx
from repfx.blocks import RepVGG
from repfx.capture.exported import load_exported
from repfx.cli.inputs import example_for
from repfx.graph.inputs import note_inputs, noted_inputs
from repfx.testing import assert_same, randomise


class Mixed(nn.Module):
    """A bit of everything a graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm, self.linear = (
            RepVGG(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Linear(8, 4),
        )
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("seen", torch.tensor(3), persistent=False)
        self.tied = self.linear

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.hardtanh(self.norm(F.relu(self.block(x))) * self.scale, -1.0, float("inf"))
        y = F.dropout(
            F.interpolate(y, scale_factor=2.0, mode="nearest")[:, :, 1:-1], 0.1, self.training
        )
        return {
            "logits": self.tied(self.linear.weight.t().shape[0] * y.mean((2, 3)) / 8),
            "size": y.shape[2],
        }


def picture() -> Tensor:
    return torch.randn(2, 3, 10, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("passes", [[], ["fuse"], ["ptq"]], ids=str)
def test_round_trip(passes: list[str], tmp_path: Path) -> None:
    model = repfx.transform(randomise(Mixed().eval()), passes)
    if passes == ["ptq"]:
        repfx.calibrate(model, [picture()])
    path = tmp_path / "model.pt"
    repfx.save(model, path)
    loaded = repfx.load(path)
    assert isinstance(loaded, fx.GraphModule)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert_same(model, loaded, picture(), 0.0)
    if not passes:
        assert loaded.get_submodule("tied") is loaded.get_submodule("linear")
    assert [m.training for m in loaded.modules()] == [m.training for m in model.modules()]
    assert "seen" not in loaded.state_dict() and int(loaded.seen) == 3
    assert not repfx.transform(repfx.transform(loaded, ["fuse"]), ["fuse"]).meta["repfx"].merged
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = repfx.transform(nn.Sequential(nn.Conv2d(3, 3, 1), Own()), ["fuse"])
    with pytest.raises(repfx.InputError, match=r"cannot save 1: .*Own is code of your own"):
        repfx.save(model, tmp_path / "model.pt")
    assert not os.listdir(tmp_path)


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    repfx.save(repfx.transform(RepVGG(3, 8, 3, padding=1), ["fuse"]), path)
    inode = path.stat().st_ino
    repfx.save(repfx.transform(RepVGG(3, 8, 3, padding=1), ["fuse"]), path)
    assert (
        path.stat().st_ino != inode
    )  # a new file took the name: the old one was never open for writing
    before = path.read_bytes()

    def interrupted(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("repfx.files.store.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        repfx.save(repfx.transform(RepVGG(3, 4, 3, padding=1), ["fuse"]), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


def graph_file(path: Path, nodes: list, **tree) -> Path:
    model = {"class": "torch.fx.GraphModule", "training": False, "path": "", "graph": nodes, **tree}
    save_file(
        {"t": torch.zeros(1)}, path, metadata={"repfx": json.dumps({"format": "1", "model": model})}
    )
    return path


def node(name: str, op: str, target: str, args: list, kwargs: list | None = None) -> list:
    return [name, op, target, {"tuple": args}, {"dict": kwargs or []}, None]


X, OUT = node("x", "placeholder", "x", []), node("output", "output", "output", [{"node": "y"}])
EVIL = "__import__('pathlib').Path(r'{flag}').touch()"
HOSTILE = {
    "a function that loads pickles": [
        X,
        node("y", "call_function", "torch.load", ["/etc/passwd"]),
        OUT,
    ],
    "a method that is no tensor's": [
        X,
        node("y", "call_method", "__reduce__", [{"node": "x"}]),
        OUT,
    ],
    "an attribute that leads out": [
        X,
        node("y", "call_function", "getattr", [{"node": "x"}, "__class__"]),
        OUT,
    ],
    "code in an argument's name": [
        X,
        node("y", "call_function", "torch.relu", [], [["p=1) or (EVIL", {"node": "x"}]]),
        OUT,
    ],
    "code in a placeholder": [
        node("x", "placeholder", "x=EVIL", []),
        node("y", "call_function", "torch.relu", [{"node": "x"}]),
        OUT,
    ],
    "a keyword as a placeholder": [
        node("x", "placeholder", "class", []),
        node("y", "call_function", "torch.relu", []),
        OUT,
    ],
    "an operator that opens files": [
        X,
        node("y", "call_function", "aten:from_file.default", ["/tmp/x", True, 8]),
        OUT,
    ],
    "code in a path": [X, node("y", "call_module", 'a"]; EVIL; ["', [{"node": "x"}]), OUT],
    "a maker of callables": [X, node("y", "call_function", "operator.methodcaller", ["eval"]), OUT],
    "a node that is not there": [X, node("y", "call_function", "torch.relu", [{"node": "z"}]), OUT],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    nodes = json.loads(
        json.dumps(HOSTILE[name]).replace("EVIL", json.dumps(EVIL.format(flag=flag))[1:-1])
    )
    with pytest.raises(repfx.InputError, match="is damaged"):
        repfx.load(graph_file(tmp_path / "model.pt", nodes))(torch.zeros(2))
    assert not flag.exists()


def test_a_hostile_class_is_refused(tmp_path: Path) -> None:
    child = {"class": "os.system", "training": False, "path": "a"}
    with pytest.raises(repfx.InputError, match="is not allowed"):
        repfx.load(graph_file(tmp_path / "model.pt", [X], children={"a": child}))


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, pickle.dumps({"a": 1})], ids=["empty", "noise", "pickle"]
)
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(repfx.InputError, match="not a model saved by repfx"):
        repfx.load(path)
    with pytest.raises(repfx.InputError, match="no such file"):
        repfx.load(tmp_path / "other.pt")


def test_truncated_and_unwritable(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = repfx.transform(RepVGG(3, 8, 3, padding=1), ["fuse"])
    repfx.save(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(repfx.InputError, match="damaged"):
        repfx.load(path)
    with pytest.raises(repfx.InputError, match="cannot write"):
        repfx.save(model, tmp_path / "no" / "model.pt")


def exported(path: Path) -> Path:
    dims = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4)},)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    torch.export.save(torch.export.export(net, (picture(),), dynamic_shapes=dims), path)
    return path


def rewritten(path: Path, change) -> Path:
    """The archive with its program changed by a function of the JSON text."""
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    for name in entries:
        if name.endswith("models/model.json"):
            entries[name] = change(entries[name].decode()).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def test_exported_programs_are_read_by_content(tmp_path: Path) -> None:
    program = load_exported(exported(tmp_path / "net.bin"))
    assert len(repfx.transform(program, ["fuse"]).meta["repfx"].merged) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("torch.ops.aten.relu.default", "torch.os.system"),
        lambda text: text.replace(
            "torch.ops.aten.relu.default", "torch.ops.aten.from_file.default"
        ),
        lambda text: text.replace('"name": "input"', '"name": "input=print()"'),
        lambda text: text.replace('"expr_str": "', '"expr_str": "Max(\\"print()\\", 1) + '),
    ],
    ids=["function", "file operator", "name", "expression"],
)
def test_hostile_programs_are_refused(change, tmp_path: Path) -> None:
    with pytest.raises(repfx.InputError, match="would run code"):
        load_exported(rewritten(exported(tmp_path / "net.pt2"), change))


def test_pickles_inside_programs_are_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "net.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/data/constants/opaque_obj_0", pickle.dumps(print))
    with pytest.raises(repfx.InputError, match="opaque_obj_0"):
        load_exported(path)


def test_a_saved_model_knows_the_size_of_its_inputs(tmp_path: Path) -> None:
    """That of the example, or of the images it was calibrated on; `repfx lower` takes it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    guessed = repfx.transform(net, ["ptq"])
    assert noted_inputs(guessed) == []
    given = repfx.transform(net, ["fuse"], example=torch.randn(2, 3, 20, 12))
    assert noted_inputs(given) == [(torch.float32, (3, 20, 12))]
    assert noted_inputs(repfx.transform(given, ["ptq"])) == [(torch.float32, (3, 20, 12))]
    repfx.calibrate(guessed, [torch.randn(4, 3, 24, 40)])
    repfx.save(guessed, tmp_path / "int8.pt")
    loaded = repfx.load(tmp_path / "int8.pt")
    assert noted_inputs(loaded) == [(torch.float32, (3, 24, 40))]
    (x,) = example_for(loaded, None, None)
    assert x.shape == (2, 3, 24, 40)
    assert example_for(loaded, None, "3,8,8")[0].shape == (2, 3, 8, 8)


def test_inputs_of_several_kinds_are_kept(tmp_path: Path) -> None:
    model: Any = nn.Module()
    model.meta = {}
    note_inputs(model, (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2)))
    assert noted_inputs(model) == [(torch.int64, (5,)), (torch.float32, ())]
    shapes = [(x.dtype, tuple(x.shape)) for x in example_for(model, None, None)]
    assert shapes == [(torch.int64, (2, 5)), (torch.float32, (2,))]
    note_inputs(model, ([torch.zeros(2)],))
    assert noted_inputs(model) == []
