"""The command line as a person meets it: real processes, exit codes, one readable paragraph."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import repfx
from repfx.blocks import RepVGG

FACTORY = """
import torch
from torch import nn
from repfx.blocks import RepVGG

def net():
    torch.manual_seed(0)
    blocks = RepVGG(3, 8, 3, padding=1), nn.ReLU(), RepVGG(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def no_convs():
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))

def nothing():
    return 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "mynet.py").write_text(FACTORY)
    torch.manual_seed(0)
    blocks = RepVGG(3, 8, 3, padding=1), nn.ReLU(), RepVGG(8, 8, 3, padding=1), nn.ReLU()
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    repfx.save(repfx.transform(model.eval(), []), path / "net.pt")
    torch.save(model, path / "pickled.pt")
    torch.save(model.state_dict(), path / "weights.pt")
    (path / "plain.pkl").write_bytes(pickle.dumps(print))
    (path / "cut.pt").write_bytes((path / "net.pt").read_bytes()[:-64])
    (path / "cut_zip.pt").write_bytes((path / "pickled.pt").read_bytes()[:400])
    with torch.no_grad():
        model[0].main.conv.weight[0] = float("nan")
    torch.save(model.state_dict(), path / "nan.pt")
    np.save(path / "data.npy", np.random.default_rng(0).normal(size=(12, 3, 16, 16)).astype(np.float32))
    np.save(path / "wrong.npy", np.zeros((4, 5, 8, 8), dtype=np.float32))
    np.save(path / "empty.npy", np.zeros((0, 3, 8, 8), dtype=np.float32))
    return path


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from repfx.cli import main; main()", *args]
    env = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(repfx.__file__).parent.parent)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=env)


def test_the_whole_path(folder: Path) -> None:
    done = run(folder, "inspect", "mynet:net")
    assert done.returncode == 0 and "2 blocks merge" in done.stdout and "conv 3x3, 3 → 8" in done.stdout
    done = run(folder, "transform", "mynet:net", "--weights", "weights.pt", "--passes", "fuse", "-o", "fused.pt")
    assert done.returncode == 0 and "wrote fused.pt" in done.stdout
    six = ["--bits", "6", "--iterations", "5", "--keep", "1"]
    done = run(folder, "quantize", "fused.pt", "--data", "data.npy", "-o", "int6.pt", *six)
    assert done.returncode == 0 and "kept wide: " in done.stdout, done.stderr
    done = run(folder, "quantize", "fused.pt", "--data", "data.npy", "-o", "int8.pt", "--method", "mse")
    assert done.returncode == 0 and "SQNR against the float model" in done.stdout
    done = run(folder, "lower", "int8.pt", "--onnx", "--data", "data.npy", "-o", "int8.onnx")
    assert done.returncode == 0 and "codes differ by one" in done.stdout and (folder / "int8.onnx").exists()
    done = run(folder, "lint", "int8.onnx")
    assert done.returncode == 0 and "optimization profile" in done.stdout, done.stderr
    done = run(folder, "lower", "int8.pt", "--trt", "--shape", "3,16,16", "-o", "int8.engine", "--batches", "1,4,16")
    assert done.returncode == 3 and "wrote int8.onnx" in done.stdout and not (folder / "int8.engine").exists()
    assert "trtexec --onnx=int8.onnx" in done.stderr and "16x3x16x16" in done.stderr, done.stderr
    for target in ("openvino", "onnxruntime"):
        done = run(
            folder, "quantize", "fused.pt", "--data", "data.npy", "-o", "cpu.pt", "--method", "max", "--target", target
        )
        assert done.returncode == 0, done.stderr
    done = run(folder, "lint", "cpu.onnx")
    assert done.returncode == 2 and "cpu.onnx" in done.stderr
    done = run(folder, "lower", "cpu.pt", "--openvino", "--shape", "3,16,16", "-o", "cpu.xml")
    assert done.returncode == 0 and "OpenVINO against torch" in done.stdout, done.stderr
    assert (folder / "cpu.xml").exists() and (folder / "cpu.bin").exists() and not list(folder.glob(".cpu*"))
    done = run(folder, "lint", "cpu.onnx")
    assert done.returncode == 1 and "Q01" in done.stdout  # uint8 is for CPUs
    done = run(folder, "bench", "net.pt", "--shape", "3,16,16", "--rounds", "2", "--json", "bench.json")
    assert done.returncode == 0 and "INT8" in done.stdout, done.stderr
    rows = json.loads((folder / "bench.json").read_text())["milliseconds"]
    forms = {(r["form"], r["runtime"]) for r in rows}
    assert forms >= {("train form", "torch"), ("merged", "torch"), ("INT8", "onnxruntime"), ("INT8", "openvino")}
    assert all(0 < r["fastest"] <= r["median"] <= r["slowest"] for r in rows)
    done = run(folder, "inspect", "net.pt")
    assert done.returncode == 0
    done = run(folder, "transform", "pickled.pt", "--trust-pickle", "-o", "trusted.pt")
    assert done.returncode == 0 and (folder / "trusted.pt").exists()


BAD = {
    "missing file": (["inspect", "none.pt"], 2, "no such file: none.pt"),
    "truncated file": (["inspect", "cut.pt"], 2, "damaged"),
    "truncated archive": (["inspect", "cut_zip.pt"], 2, "damaged"),
    "pickled module": (["inspect", "pickled.pt"], 2, "is a pickle: loading it would run code from it. Safe ways"),
    "plain pickle": (["inspect", "plain.pkl"], 2, "is a pickle"),
    "state_dict": (["inspect", "weights.pt"], 2, "is a state_dict, not a model"),
    "NaN weights": (["inspect", "mynet:net", "--weights", "nan.pt"], 2, "0.main.conv.weight holds NaN"),
    "weights that do not fit": (["inspect", "mynet:no_convs", "--weights", "weights.pt"], 2, "does not fit"),
    "unknown pass": (
        ["transform", "net.pt", "--passes", "fuze", "-o", "x.pt"],
        2,
        "one of: bnfold, expand, fuse, ptq, qarep, qprep, repq",
    ),
    "unknown method": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "x.pt", "--method", "best"],
        2,
        "unknown method 'best'; choose one of: entropy, mae, max, mse, percentile",
    ),
    "wrong input shape": (["quantize", "net.pt", "--data", "wrong.npy", "-o", "x.pt"], 2, "(5, 8, 8)"),
    "empty calibration set": (["quantize", "net.pt", "--data", "empty.npy", "-o", "x.pt"], 2, "calibration set is empty"),
    "no pictures": (["quantize", "net.pt", "--data", ".", "-o", "x.pt"], 2, "calibration set is empty"),
    "unwritable output": (["transform", "net.pt", "-o", "no/x.pt"], 2, "cannot write no/x.pt"),
    "no convolutions": (["inspect", "mynet:no_convs"], 2, "holds no convolution and no linear layer"),
    "no such factory": (["inspect", "mynet:nett"], 2, "cannot import mynet:nett"),
    "a factory of something else": (["inspect", "mynet:nothing"], 2, "not an nn.Module"),
    "not calibrated": (["lower", "int8raw.pt", "--onnx", "-o", "x.onnx", "--shape", "3,16,16"], 2, "not calibrated"),
    "lower to what": (["lower", "net.pt", "-o", "x.onnx"], 2, "--onnx"),
    "usage": (["inspect"], 2, "Missing argument"),
    "unknown command": (["inspekt"], 2, "No such command"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, folder: Path) -> None:
    if name == "not calibrated":
        repfx.save(repfx.transform(repfx.load(folder / "net.pt"), ["ptq"]), folder / "int8raw.pt")
    args, code, text = BAD[name]
    done = run(folder, *args)
    assert done.returncode == code, done.stderr
    assert text in done.stderr and "Traceback" not in done.stderr
    assert not list(folder.glob("x.*")) and not list(folder.glob(".x.*"))


def test_debug_shows_where(folder: Path) -> None:
    done = run(folder, "inspect", "none.pt", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_a_missing_part_is_named(folder: Path) -> None:
    (folder / "sklearn.py").write_text("raise ImportError('not installed')")
    try:
        done = run(folder, "demo", "-o", "demo")
    finally:
        (folder / "sklearn.py").unlink()
    assert done.returncode == 3 and "pip install repfx[demo]" in done.stderr


def test_ctrl_c_in_the_middle_of_a_write(folder: Path) -> None:
    """The process is told to stop while the file is being written: the old file stays, and nothing lies beside it."""
    (folder / "slow.py").write_text(
        "import signal, time, pathlib, repfx.graph.store as store\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "def slow(tensors, path, metadata=None):\n"
        "    pathlib.Path(path).write_bytes(b'half'); pathlib.Path('writing').touch(); time.sleep(60)\n"
        "store.save_file = slow\n"
        "from repfx.cli import main; main()\n"
    )
    (folder / "kept.pt").write_bytes(b"old")
    env = {**os.environ, "PYTHONPATH": str(Path(repfx.__file__).parent.parent)}
    command = [sys.executable, "slow.py", "transform", "net.pt", "-o", "kept.pt"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)
    for _ in range(600):
        if (folder / "writing").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors
    assert (folder / "kept.pt").read_bytes() == b"old" and not list(folder.glob(".kept*"))


def test_a_folder_of_pictures(folder: Path) -> None:
    from PIL import Image

    from repfx.tune import Images

    pictures = folder / "pictures" / "cats"
    pictures.mkdir(parents=True)
    for i, size in enumerate([(20, 30), (40, 24), (16, 16)]):
        Image.fromarray(np.full((*size, 3), 100 + i, dtype=np.uint8)).save(pictures / f"{i}.png")
    batches = list(Images(folder / "pictures", size=16, mean=(0.5,) * 3, std=(0.5,) * 3).batches(2))
    assert [tuple(b.shape) for b in batches] == [(2, 3, 16, 16), (1, 3, 16, 16)]
    assert torch.allclose(batches[1], torch.full((1, 3, 16, 16), 102 / 255 * 2 - 1), atol=1e-6)
    (pictures / "3.png").write_bytes(b"not a picture")
    done = run(folder, "quantize", "net.pt", "--data", "pictures", "--size", "16", "-o", "x.pt")
    assert done.returncode == 2 and "3.png is not a readable picture" in done.stderr
