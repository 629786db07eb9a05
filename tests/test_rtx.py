"""TensorRT for RTX: what the process that builds is told and says, and what a real one makes of our
files. `make trt` installs it; without it the second half is skipped.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensorrt
import onnx
import pytest
import test_lint
import test_placement
import torch
from onnx import TensorProto, helper
from torch import nn

import repfx
from repfx.errors import CheckError, InputError, MissingPart, RepfxError
from repfx.lowering.onnx.index import Index
from repfx.lowering.tensorrt import builder, rtx
from repfx.lowering.tensorrt.engine import Engine, Profile, build
from repfx.testing import randomise
from repfx.testing.random_net import random_net

needs_rtx = pytest.mark.skipif(
    rtx.module() is None, reason="TensorRT for RTX is not installed: make trt"
)


def says(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> Callable[[], rtx.Built]:
    """A build whose process runs this code. `tell` prints an event, `job` is what it was given."""
    script = folder / "script.py"
    head = """
        import json, os, signal, sys, time
        from pathlib import Path
        job = json.loads(Path(sys.argv[1]).read_text())
        def tell(**event): print(json.dumps(event), flush=True)
        tell(version="1.7.1")
    """
    script.write_text(textwrap.dedent(head) + textwrap.dedent(code))
    monkeypatch.setattr(builder, "__file__", str(script))
    monkeypatch.setattr(rtx, "MODULES", ("json",))
    job = rtx.Job(folder / "net.onnx", {"x": [[1, 3], [8, 3], [32, 3]]}, 2.0, ["SM86"], b"old")
    return lambda: rtx.build(job)


def test_what_the_process_gets_and_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "Name: a, LayerType: kgen, Outputs: [ { Dimensions: [-1,5], Datatype: Half }], "
    run = says(
        monkeypatch,
        tmp_path,
        f"""
        assert job["shapes"] == {{"x": [[1, 3], [8, 3], [32, 3]]}} and job["workspace_mib"] == 2048
        assert job["compute_capability"] == ["SM86"] and job["module"] == "json"
        tell(phase="Building", total=3); tell(phase="Building", step=1); print("words of others")
        cache = Path(job["cache"])
        cache.write_bytes(cache.read_bytes() + b", new")
        Path(job["plan"]).write_bytes(b"engine")
        tell(layers=[{line!r}, "no layer"])
        """,
    )
    built = run()
    assert (built.engine, built.cache, built.version) == (b"engine", b"old, new", "1.7.1")
    assert [(k.kind, k.precision, k.writes) for k in built.plan.kernels] == [("kgen", "FP16", 10)]


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("tell(refused=['node a', 'node b'])", InputError, "node b"),
        ("tell(error='no kernel'); tell(failed=[])", CheckError, "built no engine.*no kernel"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", CheckError, "died of signal 11"),
        ("tell(error='odd'); sys.exit(3)", CheckError, "exit code 3.*odd"),
        ("raise RuntimeError('bad import')", CheckError, "bad import"),
        ("tell(version='1.6.1'); tell(failed=[])", MissingPart, "too old"),
    ],
)
def test_why_there_is_no_engine(
    code: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=f"(?s){words}"):
        says(monkeypatch, tmp_path, code)()


def test_ctrl_c_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    wait = f"Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    run = says(monkeypatch, tmp_path, wait)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before, start = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_unknown_gpus_are_named() -> None:
    with pytest.raises(InputError, match=r"8\.0, 8\.6, 8\.9, 12\.0, 12\.1, not '7\.5'"):
        rtx.capabilities(["8.6", "7.5"])


def test_without_it_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "MODULES", ("no_such_module",))
    path = write(tmp_path, nn.Conv2d(3, 4, 1))
    with pytest.raises(MissingPart, match=r"pip install 'repfx\[rtx\]'"):
        engine_of(path)
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx"}


def write(folder: Path, net: nn.Module, size: int = 16, target: str = "tensorrt") -> Path:
    """The net in INT8 as an ONNX file."""
    x = torch.randn(2, 3, size, size)
    int8 = repfx.transform(net.eval(), ["ptq"], example=x, target=target)
    repfx.calibrate(int8, [x])
    return repfx.lower(int8, folder / "net.onnx", example=x, target=target).onnx


def in_integers(path: Path) -> int:
    """How many layers of a file have Q/DQ on both sides, as the lint counts them."""
    index = Index(onnx.load(path))
    return sum(
        index.dq(layer.x) is not None and bool(layer.weight) and index.dq(layer.weight) is not None
        for layer in index.layers
    )


def engine_of(path: Path, **options: Any) -> Engine:
    return build(path, path.with_suffix(".engine"), compute_capability=["8.6"], **options)


@needs_rtx
@pytest.mark.parametrize("kind", test_placement.NETS)
@pytest.mark.parametrize("float16", [False, True])
def test_every_layer_but_gates_is_in_integers(kind: Any, float16: bool, tmp_path: Path) -> None:
    _, model, x = test_placement.made(kind, "tensorrt")
    repfx.calibrate(model, [x])
    path = repfx.lower(model, tmp_path / "net.onnx", example=x, float16=float16).onnx
    layers = engine_of(path).layers
    assert layers["INT8"] == kind.layers - kind.gates and sum(layers.values()) == kind.layers


@needs_rtx
@pytest.mark.parametrize("seed", range(6))
def test_random_nets(seed: int, tmp_path: Path) -> None:
    net, x = random_net(seed)
    int8 = repfx.transform(net, ["ptq"], example=x)
    repfx.calibrate(int8, [x])
    path = repfx.lower(int8, tmp_path / "net.onnx", example=x).onnx
    assert engine_of(path).layers.get("INT8", 0) == in_integers(path)


@needs_rtx
def test_the_files_of_an_engine(tmp_path: Path) -> None:
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval())
    path, cache = write(tmp_path, net), tmp_path / "timing"
    engine = engine_of(path, timing_cache=cache, profile=Profile(2, 4, 4))
    about = json.loads(engine.metadata.read_text())
    assert engine.layers == about["layers"] == {"INT8": 2} and engine.runtime == rtx.NAME
    assert about["compute_capability"] == ["SM86"] and about["profile"]["max"] == 4
    # The input as float, its codes and their four channels; then each layer's.
    assert about["bytes_per_image"] == engine.traffic
    assert about["kernels"][0]["reads"] == 3 * 16 * 16 * 4
    assert engine.path.stat().st_size > 1000 and cache.is_file()
    assert {p.name for p in tmp_path.iterdir()} == {
        "net.onnx",
        "net.engine",
        "net.engine.json",
        "timing",
    }


def typed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The file with the types of its outputs, without which TensorRT's parser reads none."""
    try:
        known = onnx.shape_inference.infer_shapes(proto).graph
        made = {v.name: v for v in (*known.value_info, *known.output)}
    except Exception:  # an operator that onnx does not know
        made = {}
    for out in proto.graph.output:
        given = made.get(out.name)
        if given is None or not given.type.tensor_type.elem_type:
            given = helper.make_tensor_value_info(out.name, TensorProto.FLOAT, None)
        out.CopyFrom(given)
    return proto


PARSER, BUILDER, DIES = "cannot read", "built no engine", "died of signal 11"
# What TensorRT for RTX 1.7.1 does with each file that triggers a rule: the error, or how many
# layers it runs in integers.
DOES: dict[str, str | int] = {
    "Q00 float_model": 0,
    "Q00 quantized_inside_an_if": 1,
    "Q01 zero_point_of_three": PARSER,
    "Q02 uint8": 1,
    "Q02 computed_zero_point": BUILDER,
    "Q02 int16": PARSER,
    "Q03 no_zero_point": 1,
    "Q04 negative_scale": PARSER,
    "Q04 scale_of_shape_one": 0,
    "Q04 computed_scale": DIES,
    "Q05 activation_by_channel": 0,
    "Q06 conv_along_its_inputs": 0,
    "Q06 transposed_linear_along_its_inputs": 0,
    "Q06 transposed_conv_by_channel": 0,
    "Q06 transposed_conv_by_output_channel": 0,
    "Q07 channels_in_opset_12": 1,
    "Q07 opset_21": 1,
    "Q08 int32_bias": PARSER,
    "Q09 clip_before_dq": 1,
    "Q09 transposed_codes": BUILDER,
    "Q10 float_weight": 0,
    "Q10 float_activation": 0,
    "Q10 float_weight_of_a_transposed_convolution": 0,
    "Q10 float_weight_behind_an_if": 0,
    "Q10 a_cast_between_dq_and_the_layer": 1,
    "Q11 q_before_relu": 1,
    "Q11 q_between_batch_norm_and_relu": 1,
    "Q12 lone_batch_norm": 1,
    "Q13 skip_in_float": 1,
    "Q13 conv_branch_quantized": 1,
    "Q14 two_convs_summed": 2,
    "Q14 two_convs_summed_behind_a_cast": 2,
    "Q15 two_scales": 2,
    "Q16 concat_of_two_scales": 1,
    "Q16 concat_of_two_scales_quantized_again": 2,
    "Q16 concat_of_one_scale": 1,
    "Q16 concat_half_quantized": 1,
    "Q17 average_in_float": 2,
    "Q17 max_pool_quantized_again": 1,
    "Q17 max_pool_in_float": 1,
    "Q18 quantized_twice": 1,
    "Q19 two_channels_a_group": 1,
    "Q20 float_head": 1,
    "Q21 output_quantized": 1,
    "Q22 microsoft": PARSER,
    "Q22 convolution_of_integers": PARSER,
    "Q22 convolution_of_codes": PARSER,
    "Q24 dynamic_batch": 1,
    "Q25 scale_changes": 1,
    "Q26 conv_before_sigmoid": 2,
    "Q26 relu_before_signed_codes": 2,
    "Q27 int4_convolution": BUILDER,
    "Q27 int4_product": 0,
}


def test_every_trigger_is_known() -> None:
    assert set(DOES) == set(test_lint.CASES)


WRONG = {"Q00 quantized_inside_an_if", "Q02 uint8", "Q25 scale_changes"}  # in what they compute


@pytest.mark.parametrize("name", DOES)
def test_the_lint_says_what_it_does(name: str) -> None:
    """E where there is no engine or it computes something else, W where a layer is in float."""
    does = DOES[name]
    found = {f.severity for f in repfx.lint(test_lint.CASES[name](), "rtx") if f.rule == name[:3]}
    if isinstance(does, str) or name in WRONG or name == "Q00 float_model":
        assert "E" in found
    elif does == 0 or name == "Q16 concat_of_two_scales":
        assert found == {"W"}
    else:
        assert found <= {"I"}


@needs_rtx
@pytest.mark.parametrize("name", DOES)
def test_what_it_does_with_what_the_lint_finds(name: str, tmp_path: Path) -> None:
    path, does = tmp_path / "net.onnx", DOES[name]
    onnx.save(typed(test_lint.CASES[name]()), path)
    if isinstance(does, int):
        assert engine_of(path).layers.get("INT8", 0) == does
        return
    with pytest.raises(RepfxError, match=does):
        engine_of(path)
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx"}


@needs_rtx
def test_lower_trt_word_for_word(tmp_path: Path) -> None:
    """What a file needs is in it: the size that it was calibrated on, and where results go."""
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval())
    int8 = repfx.transform(net, ["ptq"])
    repfx.calibrate(int8, [torch.randn(4, 3, 24, 40)])
    repfx.save(int8, tmp_path / "model.pt")
    command = [sys.executable, "-m", "repfx", "lower", "model.pt", "--trt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "2 INT8" in " ".join(done.stdout.split())
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.pt",
        "model.onnx",
        "model.engine",
        "model.engine.json",
    }
    (given,) = onnx.load(tmp_path / "model.onnx").graph.input
    assert [d.dim_value for d in given.type.tensor_type.shape.dim[1:]] == [3, 24, 40]


@needs_rtx
def test_it_has_every_name_that_runs_an_engine() -> None:
    """No engine can be run here; `run` treats it as it does TensorRT 10 and 11."""
    trt = importlib.import_module(rtx.module() or "")
    for holder, names in fake_tensorrt.surface().items():
        there = getattr(trt, holder) if holder else trt
        assert [n for n in sorted(names) if not hasattr(there, n)] == [], holder


@needs_rtx
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 64, 64, 3, 1, 1) for i in range(40)))
    path = write(tmp_path, net, 32)
    command = [
        "import os, signal, subprocess, threading",
        # A shell starts what it runs in the background without Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        "from repfx.lowering.tensorrt.engine import build",
        "class Popen(subprocess.Popen):  # Ctrl-C comes once the process that builds has started",
        "    def __init__(self, *args, **kwargs):",
        "        super().__init__(*args, **kwargs)",
        "        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()",
        "subprocess.Popen = Popen",
        f"build({str(path)!r}, {str(tmp_path / 'net.engine')!r})",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and b"KeyboardInterrupt" in error
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx"}
