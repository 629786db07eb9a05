"""The command line as a person meets it: exit codes, one readable paragraph, what is printed."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import repfx
from repfx.blocks import RepVGG
from repfx.cli import main, options
from repfx.cli.inputs import real_input
from repfx.cli.models import load_model
from repfx.cli.options import named, whole
from repfx.lowering.runtimes.isa import isas, running

pytestmark = pytest.mark.slow

FACTORY = """
import torch
from torch import nn
from repfx.blocks import RepVGG

def net():
    torch.manual_seed(0)
    blocks = RepVGG(3, 8, 3, padding=1), nn.ReLU(), RepVGG(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

class Own(nn.Module):
    # Its own code picks by the entries of the data, which no graph can hold.
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > -1e9 else x

def own():
    return nn.Sequential(nn.Conv2d(3, 3, 3), Own()).eval()

def scripted():
    act = torch.jit.script(nn.Sequential(nn.ReLU()))
    return nn.Sequential(nn.Conv2d(3, 3, 3), act, nn.Conv2d(3, 3, 3)).eval()

def spread(model):
    return float(model(torch.ones(2, 3, 16, 16)).abs().max())

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
    np.save(
        path / "data.npy", np.random.default_rng(0).normal(size=(12, 3, 16, 16)).astype(np.float32)
    )
    np.save(path / "wrong.npy", np.zeros((4, 5, 8, 8), dtype=np.float32))
    np.save(path / "empty.npy", np.zeros((0, 3, 8, 8), dtype=np.float32))
    return path


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, which saves the seconds that imports take."""
    out, err, paths = io.StringIO(), io.StringIO(), list(sys.path)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for console in (options.out, options.err):  # they read COLUMNS when they are made
            patch.setattr(console, "_width", 200)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["repfx", *args])
        with pytest.raises(SystemExit) as end:
            main()
    sys.path[:] = paths
    code = end.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def run_alone(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own."""
    command = [sys.executable, "-c", "from repfx.cli import main; main()", *args]
    env = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(repfx.__file__).parent.parent)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=env)


def test_the_whole_path(folder: Path) -> None:
    done = run(folder, "inspect", "mynet:net")
    assert (
        done.returncode == 0
        and "2 blocks merge" in done.stdout
        and "conv 3x3, 3 → 8" in done.stdout
    )
    done = run(
        folder,
        "transform",
        "mynet:net",
        "--weights",
        "weights.pt",
        "--passes",
        "fuse",
        "-o",
        "fused.pt",
    )
    assert done.returncode == 0 and "wrote fused.pt" in done.stdout
    six = ["--bits", "6", "--iterations", "5", "--keep", "1"]
    done = run(folder, "quantize", "fused.pt", "--data", "data.npy", "-o", "int6.pt", *six)
    assert done.returncode == 0 and "kept wide: " in done.stdout, done.stderr
    done = run(
        folder, "quantize", "fused.pt", "--data", "data.npy", "-o", "int8.pt", "--method", "mse"
    )
    assert done.returncode == 0 and "SQNR against the float model" in done.stdout
    done = run(folder, "lower", "int8.pt", "--onnx", "--data", "data.npy", "-o", "int8.onnx")
    assert (
        done.returncode == 0
        and "codes differ on equal inputs" in done.stdout
        and (folder / "int8.onnx").exists()
    )
    done = run(folder, "lint", "int8.onnx")
    assert done.returncode == 0 and "optimization profile" in done.stdout, done.stderr
    done = run(
        folder,
        "lower",
        "int8.pt",
        "--trt",
        "--shape",
        "3,16,16",
        "-o",
        "int8.engine",
        "--batches",
        "1,4,16",
    )
    assert (
        done.returncode == 3
        and "wrote int8.onnx" in done.stdout
        and not (folder / "int8.engine").exists()
    )
    assert "trtexec --onnx=int8.onnx" in done.stderr and "16x3x16x16" in done.stderr, done.stderr
    for target in ("openvino", "onnxruntime"):
        done = run(
            folder,
            "quantize",
            "fused.pt",
            "--data",
            "data.npy",
            "-o",
            "cpu.pt",
            "--method",
            "max",
            "--target",
            target,
        )
        assert done.returncode == 0, done.stderr
    done = run(folder, "lint", "cpu.onnx")
    assert done.returncode == 2 and "cpu.onnx" in done.stderr
    old = ["--opset", "13", "--dynamic"]
    done = run(folder, "lower", "cpu.pt", "--openvino", "--shape", "3,16,16", "-o", "cpu.xml", *old)
    assert done.returncode == 0 and "OpenVINO against torch" in done.stdout, done.stderr
    assert re.search(r"OpenVINO: (\d+) of \1 layers run in integers\n", done.stdout), done.stdout
    assert not re.search(r" Q\d\d ", done.stdout), done.stdout
    assert (
        (folder / "cpu.xml").exists()
        and (folder / "cpu.bin").exists()
        and not list(folder.glob(".cpu*"))
    )
    assert onnx.load(folder / "cpu.onnx").opset_import[0].version == 13 and shape_of(
        folder / "cpu.onnx"
    ) == (3, 0, 0)
    (folder / "same.onnx").write_bytes((folder / "cpu.pt").read_bytes())
    done = run(folder, "lower", "same.onnx", "--onnx")
    assert done.returncode == 2 and "would be written over the model" in done.stderr
    done = run(folder, "lower", "cpu.pt", "--trt", "--dynamic", "-o", "cpu.engine")
    assert done.returncode == 2 and "for one height and width: leave out --dynamic" in done.stderr
    done = run(folder, "lint", "cpu.onnx")
    assert done.returncode == 1 and "Q02" in done.stdout  # uint8 is for CPUs
    done = run(folder, "lint", "cpu.onnx", "--select", "Q24", "--json")
    assert done.returncode == 0 and {f["rule"] for f in json.loads(done.stdout)} == {"Q24"}
    done = run(folder, "lint", "cpu.onnx", "--select", "Q99")
    assert done.returncode == 2 and "unknown rule 'Q99'" in done.stderr
    done = run(folder, "lint", "--explain", "Q08")
    assert done.returncode == 0 and "its parser rejects int32" in done.stdout
    assert run(folder, "lint").returncode == 2
    done = run(folder, "lint", "cpu.onnx", "--target", "onnxruntime")
    assert done.returncode == 0 and "nothing found" in done.stdout, done.stdout
    done = run(
        folder, "bench", "net.pt", "--shape", "3,16,16", "--rounds", "2", "--json", "bench.json"
    )
    assert done.returncode == 0 and "INT8" in done.stdout, done.stderr
    assert (
        running() in done.stdout
        and json.loads((folder / "bench.json").read_text())["cpu"] == running()
    )
    rows = json.loads((folder / "bench.json").read_text())["milliseconds"]
    forms = {(r["form"], r["runtime"]) for r in rows}
    assert forms >= {
        ("train form", "torch"),
        ("merged", "torch"),
        ("INT8", "onnxruntime"),
        ("INT8", "openvino"),
    }
    assert all(0 < r["fastest"] <= r["median"] <= r["slowest"] for r in rows)
    layers = {r["runtime"]: r["kernels"] for r in rows if r["form"] == "INT8"}
    assert {(k["integers"] > 1, len(k["floats"])) for k in layers.values()} == {(True, 0)}, layers
    done = run(folder, "inspect", "net.pt")
    assert done.returncode == 0
    done = run(folder, "transform", "pickled.pt", "--trust-pickle", "-o", "trusted.pt")
    assert done.returncode == 0 and (folder / "trusted.pt").exists()


BUDGET, KEEP = ("--budget", "1"), ("--keep", "1")
BAD = {
    "missing file": (["inspect", "none.pt"], 2, "no such file: none.pt"),
    "truncated file": (["inspect", "cut.pt"], 2, "damaged"),
    "truncated archive": (["inspect", "cut_zip.pt"], 2, "damaged"),
    "pickled module": (
        ["inspect", "pickled.pt"],
        2,
        "is a pickle: loading it would run code from it. Safe ways",
    ),
    "plain pickle": (["inspect", "plain.pkl"], 2, "is a pickle"),
    "state_dict": (["inspect", "weights.pt"], 2, "is a state_dict, not a model"),
    "NaN weights": (
        ["inspect", "mynet:net", "--weights", "nan.pt"],
        2,
        "0.main.conv.weight holds NaN",
    ),
    "weights that do not fit": (
        ["inspect", "mynet:no_convs", "--weights", "weights.pt"],
        2,
        "does not fit",
    ),
    "unknown pass": (
        ["transform", "net.pt", "--passes", "fuze", "-o", "x.pt"],
        2,
        "one of: bnfold, expand, fuse, ptq, qarep, qprep, repq",
    ),
    "unknown method": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "x.pt", "--method", "best"],
        2,
        "unknown method 'best'; choose one of: auto, entropy, mae, max, mse, percentile, repapq",
    ),
    "an option of another method": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "x.pt", "--method", "mse", *BUDGET],
        2,
        "--budget is for --method auto, not for mse",
    ),
    "steps for the ladder": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "x.pt", "--method", "auto", *KEEP],
        2,
        "--iterations, --cache and --keep are not for --method auto",
    ),
    "too little time": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "x.pt", "--time", "0"],
        2,
        "time=0 is too short",
    ),
    "a metric that is not there": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "x.pt", "--metric", "json:accuracy"],
        2,
        "cannot import json:accuracy",
    ),
    "no folder to write to": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "none/x.pt"],
        2,
        "no such folder: none",
    ),
    "one mean, three stds": (
        ["quantize", "net.pt", "--data", ".", "-o", "x.pt", "--mean", "0.5"],
        2,
        "mean and std have a value for each channel, 1 (gray) or 3 (RGB), not 1 and 3",
    ),
    "an order of channels": (
        ["quantize", "net.pt", "--data", ".", "-o", "x.pt", "--order", "GRB"],
        2,
        "unknown order 'GRB'; choose one of: BGR, RGB",
    ),
    "unknown device": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "x.pt", "--device", "gpu"],
        2,
        "--device gpu cannot",
    ),
    "no such device": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "x.pt", "--device", "cuda:99"],
        2,
        "--device cuda:99 cannot be used",
    ),
    "wrong input shape": (
        ["quantize", "net.pt", "--data", "wrong.npy", "-o", "x.pt"],
        2,
        "5, 8, 8)",
    ),
    "empty calibration set": (
        ["quantize", "net.pt", "--data", "empty.npy", "-o", "x.pt"],
        2,
        "calibration set is empty",
    ),
    "no pictures": (
        ["quantize", "net.pt", "--data", ".", "-o", "x.pt"],
        2,
        "calibration set is empty",
    ),
    "unwritable output": (["transform", "net.pt", "-o", "no/x.pt"], 2, "cannot write no/x.pt"),
    "no convolutions": (
        ["inspect", "mynet:no_convs"],
        2,
        "has no convolution and no linear layer",
    ),
    "no such factory": (["inspect", "mynet:nett"], 2, "cannot import mynet:nett"),
    "a factory of something else": (["inspect", "mynet:nothing"], 2, "not an nn.Module"),
    "not calibrated": (
        ["lower", "int8raw.pt", "--onnx", "-o", "x.onnx", "--shape", "3,16,16"],
        2,
        "not calibrated",
    ),
    "lower to what": (["lower", "net.pt", "-o", "x.onnx"], 2, "--onnx"),
    "an array of another shape": (
        ["lower", "net.pt", "--onnx", "-o", "x.onnx", "--shape", "3,32,64", "--data", "data.npy"],
        2,
        "--shape is 3,32,64, but an input in data.npy is 3,16,16",
    ),
    "pictures of one channel": (
        ["lower", "net.pt", "--onnx", "-o", "x.onnx", "--shape", "1,8,8", "--data", "."],
        2,
        "--shape is 3,HEIGHT,WIDTH, not 1,8,8",
    ),
    "a shape that is not numbers": (
        ["lower", "net.pt", "--onnx", "-o", "x.onnx", "--shape", "3,nan,32"],
        2,
        "--shape must be whole numbers from 1, separated by commas, not '3,nan,32'",
    ),
    "a shape beyond memory": (
        ["bench", "net.pt", "--shape", "3,1000000000,1000000000"],
        2,
        "inputs of --shape 3,1000000000,1000000000 do not fit into memory",
    ),
    "two batches": (
        ["lower", "net.pt", "--onnx", "-o", "x.onnx", "--batches", "1,8"],
        2,
        "--batches must be 3 whole numbers from 1, separated by commas, not '1,8'",
    ),
    "a folder for a file": (
        ["lower", "net.pt", "--onnx", "-o", "."],
        2,
        "-o must name a file to write; . is a folder",
    ),
    "means that are not numbers": (
        ["quantize", "net.pt", "--data", "data.npy", "-o", "x.pt", "--mean", "0,nan,0"],
        2,
        "--mean must be numbers separated by commas, not '0,nan,0'",
    ),
    "bench of a quantized model": (
        ["bench", "int8raw.pt", "--shape", "3,16,16"],
        2,
        "bench needs the float model: it quantizes a copy",
    ),
    "usage": (["inspect"], 2, "Missing argument"),
    "unknown command": (["inspekt"], 2, "No such command"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, folder: Path) -> None:
    if "int8raw.pt" in BAD[name][0]:
        repfx.save(repfx.transform(repfx.load(folder / "net.pt"), ["ptq"]), folder / "int8raw.pt")
    args, code, text = BAD[name]
    done = run(folder, *args)
    assert done.returncode == code, done.stderr
    assert text in done.stderr and "Traceback" not in done.stderr
    assert not list(folder.glob("x.*")) and not list(folder.glob(".x.*"))


@pytest.mark.parametrize(
    "text", ["nan,3,3", "inf,3", "-3,32", "0", "3,32.7", "3,1e9", "", "1,,2", "3,x", f"{2**31}"]
)
def test_a_shape_is_whole_numbers_from_one(text: str) -> None:
    with pytest.raises(repfx.InputError, match="--shape must be whole numbers from 1"):
        whole("shape", text)
    assert whole("shape", "3, 32") == (3, 32)


@pytest.mark.parametrize("text", ["1,8", "1,8,32,64", "1,nan,8", "1,2.5,8"])
def test_batches_are_three(text: str) -> None:
    with pytest.raises(repfx.InputError, match="--batches must be 3 whole numbers from 1"):
        whole("batches", text, 3)


def test_only_a_known_suffix_is_replaced(tmp_path: Path) -> None:
    files = {
        name: named(tmp_path / name, ".onnx").name
        for name in ("net.onnx", "net.plan", "net.xml", "net.v2", "net", "n.1.trt")
    }
    assert list(files.values()) == [
        "net.onnx",
        "net.onnx",
        "net.onnx",
        "net.v2.onnx",
        "net.onnx",
        "n.1.onnx",
    ]
    engines = [
        named(tmp_path / name, ".engine", ".plan").name
        for name in ("net.onnx", "net.plan", "net.v2")
    ]
    assert engines == ["net.engine", "net.plan", "net.v2.engine"]
    for folder in (tmp_path, Path(".")):
        with pytest.raises(repfx.InputError, match="is a folder"):
            named(folder, ".onnx")


def test_names_with_dots_and_brackets(folder: Path) -> None:
    """A version is not cut off, and brackets are no markup."""
    (folder / "m[v2].d").mkdir()
    (folder / "m[v2].d" / "net.onnx").write_bytes(b"another model")
    done = run(
        folder, "lower", "net.pt", "--onnx", "--shape", "3,16,16", "-o", "m[v2].d/net.v2:smile:"
    )
    assert done.returncode == 0, done.stderr
    assert "wrote m[v2].d/net.v2:smile:.onnx (" in done.stdout
    assert (folder / "m[v2].d" / "net.onnx").read_bytes() == b"another model"
    done = run(folder, "transform", "net.pt", "-o", "m[v2].d/net.pt")
    assert done.returncode == 0 and "wrote m[v2].d/net.pt" in done.stdout


def shape_of(file: Path) -> tuple[int, ...]:
    """Of the file's input, without the batch."""
    (info,) = onnx.load(file).graph.input
    return tuple(d.dim_value for d in info.type.tensor_type.shape.dim[1:])


def test_the_file_has_the_size_that_was_asked_for(folder: Path) -> None:
    from PIL import Image

    (folder / "wide").mkdir()
    for i, size in enumerate([(20, 30), (40, 24), (16, 90)]):
        Image.fromarray(np.full((*size, 3), 100 + i, dtype=np.uint8)).save(
            folder / "wide" / f"{i}.png"
        )
    done = run(
        folder,
        "lower",
        "net.pt",
        "--onnx",
        "--shape",
        "3,32,64",
        "--data",
        "wide",
        "-o",
        "wide.onnx",
    )
    assert done.returncode == 0 and shape_of(folder / "wide.onnx") == (3, 32, 64), done.stderr
    assert real_input(folder / "wide", "3,64,32").shape == (3, 3, 64, 32)
    assert (
        real_input(folder / "data.npy", "3,16,16").shape
        == real_input(folder / "data.npy", None).shape
        == (8, 3, 16, 16)
    )


def test_openvino_is_the_target_and_is_compared(folder: Path) -> None:
    """Of a float16 file too; what is quantized for OpenVINO needs no --target beside --openvino."""
    x = torch.from_numpy(np.load(folder / "data.npy"))
    net = repfx.transform(repfx.load(folder / "net.pt"), ["ptq"], target="openvino")
    repfx.save(repfx.calibrate(net, [x]), folder / "ov.pt")
    done = run(
        folder,
        "lower",
        "ov.pt",
        "--onnx",
        "--openvino",
        "--shape",
        "3,16,16",
        "-o",
        "ov.onnx",
        "--isa",
        "all",
    )
    assert done.returncode == 0 and "OpenVINO against torch: " in done.stdout, done.stderr
    for isa in isas("openvino"):
        assert f"OpenVINO on {isa.name} against torch: " in done.stdout
    done = run(
        folder,
        "lower",
        "ov.pt",
        "--openvino",
        "--shape",
        "3,16,16",
        "-o",
        "bad.onnx",
        "--isa",
        "AVX9",
    )
    assert done.returncode == 2 and "SSE41" in done.stderr and not (folder / "bad.onnx").exists()
    done = run(
        folder, "lower", "ov.pt", "--openvino", "--float16", "--shape", "3,16,16", "-o", "half.XML"
    )
    assert done.returncode == 0 and (folder / "half.XML").exists(), done.stderr
    assert "OpenVINO in float32 against torch: " in done.stdout


def test_an_exported_program_is_lowered(folder: Path) -> None:
    net = repfx.load(folder / "net.pt").eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 16, 16),)), folder / "net.pt2")
    done = run(folder, "lower", "net.pt2", "--onnx", "--shape", "3,16,16", "-o", "exported.onnx")
    assert done.returncode == 0 and shape_of(folder / "exported.onnx") == (3, 16, 16), done.stderr


def test_a_malformed_file_is_named(folder: Path) -> None:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="conv", group=1.5)
    infos = [onnx.helper.make_empty_tensor_value_info(n) for n in "xy"]
    w = onnx.numpy_helper.from_array(np.ones((8, 3, 1, 1), np.float32), "w")
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", infos[:1], infos[1:], [w])),
        folder / "odd.onnx",
    )
    done = run(folder, "lint", "odd.onnx")
    assert (
        done.returncode == 2
        and "odd.onnx is malformed" in done.stderr
        and "group of conv (Conv) is 1.5" in done.stderr
    )


def test_debug_shows_where(folder: Path) -> None:
    done = run_alone(folder, "inspect", "none.pt", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_a_missing_part_is_named(folder: Path) -> None:
    (folder / "sklearn.py").write_text("raise ImportError('not installed')")
    try:
        done = run_alone(folder, "demo", "-o", "demo")
    finally:
        (folder / "sklearn.py").unlink()
    assert done.returncode == 3 and "pip install repfx[demo]" in done.stderr


def test_ctrl_c_in_the_middle_of_a_write(folder: Path) -> None:
    """The process is told to stop while the file is being written: the old file stays, and nothing
    lies beside it.
    """
    (folder / "slow.py").write_text(
        "import signal, time, pathlib, repfx.files.store as store\n"
        # A shell's background jobs ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def slow(tensors, path, metadata=None):\n"
        "    pathlib.Path(path).write_bytes(b'half'); pathlib.Path('writing').touch(); "
        "time.sleep(60)\n"
        "store.save_file = slow\n"
        "from repfx.cli import main; main()\n"
    )
    (folder / "kept.pt").write_bytes(b"old")
    env = {**os.environ, "PYTHONPATH": str(Path(repfx.__file__).parent.parent)}
    command = [sys.executable, "slow.py", "transform", "net.pt", "-o", "kept.pt"]
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env
    )
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

    from repfx.data import Images

    pictures = folder / "pictures" / "cats"
    pictures.mkdir(parents=True)
    for i, size in enumerate([(20, 30), (40, 24), (16, 16)]):
        Image.fromarray(np.full((*size, 3), 100 + i, dtype=np.uint8)).save(pictures / f"{i}.png")
    batches = list(Images(folder / "pictures", size=16, mean=(0.5,) * 3, std=(0.5,) * 3).batches(2))
    assert [tuple(b.shape) for b in batches] == [(2, 3, 16, 16), (1, 3, 16, 16)]
    assert torch.allclose(batches[1], torch.full((1, 3, 16, 16), 102 / 255 * 2 - 1), atol=1e-6)
    (pictures / "3.png").write_bytes(b"not a picture")
    done = run(folder, "quantize", "net.pt", "--data", "pictures", "--size", "16", "-o", "x.pt")
    assert done.returncode == 2 and "3.png is not a readable image" in done.stderr


def test_quantize_by_default_climbs_and_writes_everything(folder: Path) -> None:
    same = ("quantize", "net.pt", "--data", "data.npy")
    done = run(folder, *same, "--json", "tried.json", "--report", "tried.html", "-o", "auto.pt")
    assert done.returncode == 0, done.stderr
    tried = json.loads((folder / "tried.json").read_text())
    assert "12 of 12 images" in done.stdout and "9 images calibrated it, 3 judged it" in done.stdout
    for rung in tried["rungs"]:
        assert rung["name"] in done.stdout
    assert "3 of 3 layers run in integers" in done.stdout and tried["chosen"] in done.stdout
    assert "what each way to quantize should take" in done.stdout.split("→")[0]
    assert (folder / "tried.html").read_text().startswith("<!doctype html>")
    assert isinstance(repfx.load(folder / "auto.pt"), nn.Module)
    own = ("--metric", "mynet:spread", "--budget", "1000", "--target", "onnxruntime")
    done = run(folder, *same, *own, "-o", "auto.onnx")
    assert done.returncode == 0, done.stderr
    assert "meets the budget of 1000 of the metric" in done.stdout
    assert len(onnx.load(folder / "auto.onnx").graph.node) > 5


def test_with_no_option_but_the_target(folder: Path) -> None:
    done = run(folder, "quantize", "net.pt", "--data", "data.npy", "--target", "openvino")
    assert done.returncode == 0 and "wrote net-int8.pt" in done.stdout, done.stderr
    assert (folder / "net-int8.pt").exists()


def test_what_cannot_be_saved_is_said_before_an_image_is_read(folder: Path) -> None:
    broken = folder / "broken_images"
    broken.mkdir()
    for i in range(4):
        (broken / f"{i}.png").write_bytes(b"not an image")
    same = ("--data", "broken_images")
    done = run_alone(folder, "quantize", "mynet:own", *same, "-o", "own.pt")
    assert done.returncode == 2 and "cannot save" in done.stderr, done.stderr
    assert "own.onnx" in done.stderr and not (folder / "own.pt").exists()
    done = run_alone(
        folder, "quantize", "mynet:own", *same, "-o", "own.onnx"
    )  # nor can it be exported
    assert done.returncode == 2 and "cannot export" in done.stderr, done.stderr
    done = run_alone(folder, "quantize", "mynet:scripted", *same, "-o", "scripted.pt")
    assert done.returncode == 2 and "scripted.onnx" in done.stderr, done.stderr
    data = ("--data", "data.npy", "--budget", "100")
    done = run_alone(folder, "quantize", "mynet:scripted", *data, "-o", "scripted.onnx")
    assert done.returncode == 0 and (folder / "scripted.onnx").exists(), done.stderr


def test_labels_judge_by_the_folders_of_classes(folder: Path) -> None:
    from PIL import Image

    for label in range(4):
        (folder / "classes" / str(label)).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng((label, i)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "classes" / str(label) / f"{i}.png")
    args = ("--data", "classes", "--size", "16", "--labels", "--budget", "100", "-o", "labels.pt")
    done = run(folder, "quantize", "net.pt", *args)
    assert done.returncode == 0 and "points of accuracy; the float net has" in done.stdout
    assert "16 of 16 images" in done.stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--bits", "4", "-o", "four.onnx"], "4 bits"),
        (["--report", "nowhere/a.html"], "no such folder: nowhere"),
        (["--json", "nowhere/a.json"], "no such folder: nowhere"),
        (["--bias"], "--bias is for a method of ranges"),
    ],
)
def test_what_cannot_be_written_is_said_first(
    options: list[str], text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repfx.quantize", lambda *args, **kwargs: pytest.fail("it worked"))
    done = run(folder, "quantize", "net.pt", "--data", "data.npy", *options)
    assert done.returncode == 2 and text in done.stderr, done.stderr


def test_labels_come_from_the_part_to_validate_on_and_need_classes(folder: Path) -> None:
    from PIL import Image

    root = folder / "parts"
    for part, labels in (("train", "abcd"), ("val", "abcd")):
        for label in labels:
            (root / part / label).mkdir(parents=True)
            for i in range(2 if part == "val" else 3):
                Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(root / part / label / f"{i}.png")
    args = ("--size", "16", "--labels", "--budget", "100", "-o", "labels.pt")
    done = run(folder, "quantize", "net.pt", "--data", "parts", *args)
    assert done.returncode == 0 and "8 of 8 images" in done.stdout, done.stderr
    (folder / "around").mkdir()
    shutil.move(root / "val", folder / "around" / "mine")
    done = run(folder, "quantize", "net.pt", "--data", "around", *args)
    assert done.returncode == 2 and "one class folder, mine" in done.stderr
    (root / "train" / "e").mkdir()
    Image.new("RGB", (16, 16)).save(root / "train" / "e" / "0.png")
    Image.new("RGB", (16, 16)).save(root / "train" / "e" / "1.png")
    Image.new("RGB", (16, 16)).save(root / "train" / "e" / "2.png")
    Image.new("RGB", (16, 16)).save(root / "train" / "e" / "3.png")
    done = run(folder, "quantize", "net.pt", "--data", "parts", *args)
    assert done.returncode == 2 and "labels are from 0 to 3" in done.stderr, done.stderr


def test_a_saved_model_is_never_taken_for_a_pickle(tmp_path: Path) -> None:
    """One file in 32 starts with the byte that pickles start with."""
    path, starts = tmp_path / "net.pt", set()
    for length in range(1, 300, 4):
        net = nn.Sequential()
        net.add_module("c" * length, nn.Conv2d(3, 4, 1))
        repfx.save(repfx.transform(net.eval(), []), path)
        starts.add(path.read_bytes()[:1])
        assert isinstance(load_model(str(path)), nn.Module)
    assert b"\x80" in starts
