"""Checkpoints and model files as people have them: what loads, and what is said where it cannot."""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import repfx
from repfx.cli.models import load_model
from repfx.errors import InputError
from repfx.files.weights import load_weights
from repfx.testing import randomise

State = dict[str, Tensor]


class Small(nn.Module):
    def __init__(self, width: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, 2, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


def small(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Small())


def before(prefix: str, state: State) -> State:
    return {prefix + k: v for k, v in state.items()}


def without(state: State, *ends: str) -> State:
    return {k: v for k, v in state.items() if not k.endswith(ends)}


def compiled_part(state: State) -> State:
    return {k.replace("body.", "body._orig_mod."): v for k, v in state.items()}


FORMS: dict[str, Callable[[State, State], Any]] = {  # of the weights, and of others of that shape
    "state_dict": lambda s, o: s,
    "ordered": lambda s, o: OrderedDict(s),
    "in state_dict": lambda s, o: {"state_dict": s, "epoch": 9},
    "in model": lambda s, o: {
        "model": s,
        "optimizer": {"state": {0: {"momentum": o["head.bias"]}}},
    },
    "in model_state_dict": lambda s, o: {"model_state_dict": s, "loss": 0.5},
    "in a name of its own": lambda s, o: {"whatever": {"inner": s}, "step": 3},
    "two deep": lambda s, o: {"checkpoint": {"model": s}, "best": {"acc": 71.2}},
    "DDP": lambda s, o: before("module.", s),
    "DDP in state_dict": lambda s, o: {"state_dict": before("module.", s), "arch": "small"},
    "compiled": lambda s, o: before("_orig_mod.", s),
    "DDP of compiled": lambda s, o: before("module._orig_mod.", s),
    "compiled of DDP": lambda s, o: before("_orig_mod.module.", s),
    "a compiled part": lambda s, o: compiled_part(s),
    "Lightning": lambda s, o: {"state_dict": before("model.", s), "pytorch-lightning_version": "2"},
    "Lightning and more": lambda s, o: {
        "state_dict": {**before("net.", s), "criterion.weight": torch.ones(3)},
        "hyper_parameters": {"lr": 0.1},
    },
    "a teacher beside it": lambda s, o: {
        **before("student.model.", s),
        **without(before("teacher.", o), "head.bias"),
    },
    "EMA beside it": lambda s, o: {"state_dict": o, "state_dict_ema": s},
    "ema and model": lambda s, o: {"model": o, "ema": before("module.", s), "updates": 4},
    "an average without statistics": lambda s, o: {
        "model": {**o, **without(s, "weight", "bias")},
        "ema": {k: v for k, v in s.items() if k.endswith(("weight", "bias"))},
    },
    "ours": lambda s, o: {"model": o, "ema": [3, s], "format": "repfx.fit 1"},
    "SWA beside it": lambda s, o: {"model": o, "swa_model": before("module.", s)},
    "gradients first": lambda s, o: {"grads": o, "model": s},
    "a start first": lambda s, o: {"init_state": o, "state_dict": s},
    "an optimizer by names": lambda s, o: {"optimizer": {"grad_ema": o}, "model": s},
    "a teacher first": lambda s, o: {"teacher": o, "student": s},
    "an average of another net": lambda s, o: {
        "model": s,
        "ema": {**o, "head.weight": o["head.bias"]},
    },
    "the same twice": lambda s, o: {"model": s, "last": dict(s)},
    "random states": lambda s, o: {"model": s, "rng": np.random.get_state(), "a": np.uint8(3)},
    "an average of less": lambda s, o: {"model": s, "ema": {"head.weight": o["head.weight"]}},
    "args": lambda s, o: {"state_dict": s, "args": argparse.Namespace(lr=1, path=Path("a"))},
    "numpy": lambda s, o: {
        "model": s,
        "best": np.float64(71.2),
        "seen": np.arange(3),
        "n": np.int64(2),
    },
    "no counts of batches": lambda s, o: without(s, "num_batches_tracked"),
    "half": lambda s, o: {
        k: v.half().float() if v.is_floating_point() else v for k, v in s.items()
    },
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_checkpoint_loads(form: str, tmp_path: Path) -> None:
    source, other = small(1), small(2)
    state = FORMS[form](source.state_dict(), other.state_dict())
    torch.save(state, tmp_path / "t.pth")
    model = small(3)
    said = load_weights(model, tmp_path / "t.pth")
    for (name, ours), theirs in zip(
        model.state_dict().items(), source.state_dict().values(), strict=True
    ):
        if form == "half":
            theirs = theirs.half().to(theirs.dtype) if theirs.is_floating_point() else theirs
        if "num_batches" not in name or "counts" not in form:
            assert torch.equal(ours, theirs), name
    assert said.startswith("the weights")
    assert ("others are not of the model" in said) == (
        form in ("Lightning and more", "a teacher beside it")
    )


def test_half_and_safetensors(tmp_path: Path) -> None:
    source = small(1)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    save_file(before("module.", halves), tmp_path / "t.safetensors")
    model = small(3)
    said = load_weights(model, tmp_path / "t.safetensors")
    assert said == "the weights, whose keys begin with 'module.'"
    assert model.head.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(model.head.weight, source.head.weight.half().float())  # type: ignore


def test_the_model_has_a_prefix_that_the_file_lacks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"backbone": small(3)})
    torch.save(small(1).state_dict(), tmp_path / "t.pth")
    load_weights(model, tmp_path / "t.pth")
    assert torch.equal(model["backbone"].head.weight, small(1).head.weight)  # type: ignore


def test_a_place_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "t.pth"
    torch.save({"model": small(1).state_dict(), "ema": small(2).state_dict()}, file)
    model = small(3)
    said = load_weights(model, file)
    assert said == "the weights at 'ema' (also there: model)"
    assert torch.equal(model.head.weight, small(2).head.weight)  # type: ignore
    load_weights(model, file, "model")
    assert torch.equal(model.head.weight, small(1).head.weight)  # type: ignore
    with pytest.raises(InputError, match=r"no weights at 'best'; it has model, ema"):
        load_weights(model, file, "best")


def test_one_of_two_prefixes_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "t.pth"
    one, two = small(1).state_dict(), small(2).state_dict()
    torch.save({**before("a.", one), **before("b.net.", two)}, file)
    model = small(3)
    load_weights(model, file, "b.net")
    assert torch.equal(model.head.weight, two["head.weight"])  # type: ignore


def test_tied_weights_and_our_own_file(tmp_path: Path) -> None:
    """safetensors keeps one of the names of a tied weight, and repfx.save writes safetensors."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, bias=False)
            self.second.weight = self.first.weight

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

        def set_extra_state(self, state: Any) -> None:
            del state

    torch.manual_seed(1)
    source = Tied()
    save_file({k: v for k, v in source.state_dict().items() if "first" in k}, tmp_path / "t.bin")
    torch.manual_seed(2)
    model = Tied()
    load_weights(model, tmp_path / "t.bin")
    assert torch.equal(model.second.weight, source.first.weight)
    fused = repfx.transform(small(1).eval(), [], example=torch.randn(1, 3, 8, 8))
    repfx.save(fused, tmp_path / "ours.pt")
    again = small(3)
    load_weights(again, tmp_path / "ours.pt")
    assert torch.equal(again.head.weight, small(1).head.weight)  # type: ignore


def test_a_file_of_another_program_is_no_checkpoint(tmp_path: Path) -> None:
    for kind in ("onnx", "HDF5", "torchscript"):
        path = write_stranger(kind, tmp_path)
        with pytest.raises(InputError, match=STRANGERS[kind]):
            load_weights(small(), path)
    with pytest.raises(InputError, match="is a folder"):
        load_weights(small(), tmp_path)


def test_a_whole_pickled_model_needs_trust(tmp_path: Path) -> None:
    file = tmp_path / "t.pth"
    torch.save({"model": small(1).half(), "epoch": 3}, file)
    model = small(3)
    with pytest.raises(InputError, match=r"it needs \S*Small\. If you trust its source"):
        load_weights(model, file)
    assert torch.equal(model.head.weight, small(3).head.weight)  # type: ignore
    load_weights(model, file, trust=True)
    assert torch.equal(model.head.weight, small(1).half().float().head.weight)  # type: ignore


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("where", ["args", "top", "deep"])
def test_no_code_runs(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state: dict[str, Any] = {"state_dict": small().state_dict()}
    if where == "args":
        state["args"] = argparse.Namespace(x=Evil())
    elif where == "deep":
        state["more"] = [{"x": {"y": Evil()}}]
    torch.save(Evil() if where == "top" else state, "t.pth")
    with pytest.raises(InputError, match="cannot be read without running code"):
        load_weights(small(), "t.pth")
    assert not Path("pwned").exists()


WRONG: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (
        lambda s: without(s, "head.bias"),
        r"1 of 9 weights are missing, such as head.bias",
    ),
    "renamed": (
        lambda s: {k.replace("head.weight", "head.kernel"): v for k, v in s.items()},
        r"head.weight; it has head.kernel instead",
    ),
    "another net": (lambda s: {"conv.weight": torch.ones(3)}, "8 of 9 weights are missing"),
    "another shape": (
        lambda s: {**s, "head.weight": torch.ones(5, 4, 1, 1)},
        r"head.weight is \(5, 4, 1, 1\), torch.float32; the model needs \(2, 4, 1, 1\)",
    ),
    "integers": (
        lambda s: {**s, "head.weight": (100 * s["head.weight"]).to(torch.int8)},
        r"head.weight is \(2, 4, 1, 1\), torch.int8",
    ),
    "complex": (
        lambda s: {**s, "head.bias": s["head.bias"].to(torch.complex64)},
        "torch.complex64",
    ),
    "two": (
        lambda s: {"model": s, "best_model": {k: v + 1 for k, v in s.items()}},
        r"several weights that fit: model, best_model; say which, as in --weights \S*t.pth#model",
    ),
    "two prefixes": (
        lambda s: {**before("a.", s), **before("b.", {k: v + 1 for k, v in s.items()})},
        r"several weights that fit: a, b; say which",
    ),
    "sparse": (lambda s: {**s, "head.bias": s["head.bias"].to_sparse()}, "head.bias"),
    "no weights": (lambda s: {"epoch": 3, "acc": 0.5}, "no state_dict, but a dict of epoch, acc"),
    "a list": (lambda s: [1, 2], "no state_dict, but a list"),
    "a tensor": (lambda s: torch.ones(3), "no state_dict, but a Tensor"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_weights_that_do_not_fit(kind: str, tmp_path: Path) -> None:
    make, message = WRONG[kind]
    torch.save(make(small().state_dict()), tmp_path / "t.pth")
    model = small(3)
    with pytest.raises(InputError, match=message):
        load_weights(model, tmp_path / "t.pth")
    for ours, untouched in zip(
        model.state_dict().values(), small(3).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, untouched)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "t.pth").write_bytes(b"no checkpoint")
    (tmp_path / "t.safetensors").write_bytes(b"no safetensors")
    for name, message in (
        ("t.pth", "cannot be read without"),
        ("t.safetensors", "is not a safetensors file"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            load_weights(small(), tmp_path / name)


def archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "{}")


def write_stranger(kind: str, path: Path) -> Path:
    """A model file of another program."""
    if kind == "onnx":
        torch.onnx.export(
            small().eval(), (torch.randn(1, 3, 8, 8),), path / "m.bin", dynamo=True, verbose=False
        )
        return path / "m.bin"
    if kind == "torchscript":
        torch.jit.save(torch.jit.script(small()), path / "m.pt")
        return path / "m.pt"
    if kind == "SavedModel":
        (path / "saved").mkdir()
        (path / "saved" / "saved_model.pb").write_bytes(b"\x08\x01")
        return path / "saved"
    if kind == "transformers":
        (path / "hf").mkdir()
        (path / "hf" / "config.json").write_text(json.dumps({"model_type": "resnet"}))
        save_file({"a": torch.ones(2)}, path / "hf" / "model.safetensors")
        return path / "hf"
    if kind == "Keras":
        archive(path / "m.keras", "metadata.json", "config.json", "model.weights.h5")
        return path / "m.keras"
    content = {
        "HDF5": ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(64)),
        "TensorFlow Lite": ("m.tflite", struct.pack("<I", 28) + b"TFL3" + bytes(64)),
        "TensorRT": ("m.engine", b"ptrt" + bytes(64)),
        "OpenVINO": ("m.xml", b'<?xml version="1.0"?>\n<net name="m" version="11"></net>'),
        "TensorFlow graph": ("m.pb", b"\x0a\x05" + bytes(64)),
    }[kind]
    (path / content[0]).write_bytes(content[1])
    return path / content[0]


STRANGERS = {
    "onnx": "is an ONNX file; start from the PyTorch model",
    "torchscript": "is a TorchScript program, which has no modules to rewrite",
    "SavedModel": "is a SavedModel of TensorFlow",
    "transformers": "is a folder of transformers",
    "Keras": "is a Keras model",
    "HDF5": "holds HDF5, as Keras writes it",
    "TensorFlow Lite": "is a TensorFlow Lite model",
    "TensorRT": "is an engine of TensorRT",
    "OpenVINO": "is a model of OpenVINO",
    "TensorFlow graph": "is a TensorFlow graph",
}


@pytest.mark.parametrize("kind", list(STRANGERS))
def test_files_of_other_programs_are_known(kind: str, tmp_path: Path) -> None:
    path = write_stranger(kind, tmp_path)
    for trust in (False, True):
        with pytest.raises(InputError, match=STRANGERS[kind]) as found:
            load_model(str(path), trust_pickle=trust)
        assert "package.module:factory" in str(found.value)


def test_our_own_files_are_no_strangers(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    repfx.save(repfx.transform(small().eval(), ["fuse"], example=x), tmp_path / "m.pt")
    torch.export.save(torch.export.export(small().eval(), (x,)), tmp_path / "m.pt2")
    for name in ("m.pt", "m.pt2"):
        assert load_model(str(tmp_path / name)) is not None
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a folder, not a model"):
        load_model(str(tmp_path / "empty"))


def test_a_factory_takes_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somenets.py").write_text(
        "from torch import nn\n"
        "class zoo:\n"
        "    @staticmethod\n"
        "    def net(width, *, kernel=(1, 1), name=None):\n"
        "        return nn.Sequential(nn.Conv2d(3, width, kernel), nn.Identity())\n"
        "def plain():\n    return nn.Conv2d(3, 5, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = load_model("somenets:zoo.net(8, kernel=(3, 1), name='a:b')")
    assert made[0].weight.shape == (8, 3, 3, 1)
    assert load_model("somenets:plain").weight.shape == load_model("somenets:plain()").weight.shape
    torch.save({"model": before("module.", made.state_dict())}, "t.pth")
    again = load_model("somenets:zoo.net(8, kernel=(3, 1))", "t.pth#model")
    assert torch.equal(again[0].weight, made[0].weight)
    for text, message in (
        ("somenets:zoo.net(8, name=open('x'))", "arguments are plain values"),
        ("somenets:zoo.net(__import__('os').system('touch pwned'))", "arguments are plain values"),
        ("somenets:zoo.net(8, **{'kernel': 3})", "is not package.module:factory"),
        ("somenets:zoo.net(8", "arguments are plain values"),
        ("somenets:3", "is not package.module:factory"),
        ("somenets:zoo.net()", r"somenets:zoo.net\(\) failed"),
        ("somenets:zoo", r"somenets:zoo\(\) returned"),
        ("somenets:none", "cannot import"),
    ):
        with pytest.raises(InputError, match=message):
            load_model(text)
    assert not Path("pwned").exists()


@pytest.mark.zoo
@pytest.mark.slow
def test_a_net_of_a_library_on_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "repfx", "inspect", "timm:create_model('repvgg_a0', num_classes=7)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "22 blocks merge" in done.stdout
