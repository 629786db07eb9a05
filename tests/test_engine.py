"""The TensorRT engine, driven through a strict stand-in: what is asked of TensorRT, what is
written, what is refused.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from repfx.cli import deploy
from repfx.errors import CheckError, InputError, MissingPart
from repfx.lowering.tensorrt import bindings, engine, rtx
from repfx.lowering.tensorrt import run as engine_run
from repfx.lowering.tensorrt.engine import Profile, build, latency, run, tried, trtexec
from repfx.lowering.tensorrt.inspector import count_layers
from repfx.rewrite.difference import difference

_SPEC = importlib.util.spec_from_file_location(
    "fake_tensorrt", Path(__file__).parent / "fake_tensorrt.py"
)
assert _SPEC is not None and _SPEC.loader is not None
fake_tensorrt = importlib.util.module_from_spec(_SPEC)
sys.modules["fake_tensorrt"] = fake_tensorrt
_SPEC.loader.exec_module(fake_tensorrt)

VERSIONS = ["10.13", "11.4"]


def write(path: Path, *shape: int | str, name: str = "x", out: str = "y") -> Path:
    x = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info(out, TensorProto.FLOAT, shape)
    graph = helper.make_graph([helper.make_node("Relu", [name], [out])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "net.onnx", "batch", 3, 8, 8)


@pytest.fixture(params=VERSIONS)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = fake_tensorrt.make(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", made.module)
    monkeypatch.setattr(bindings, "_gpu", lambda: {"name": "fake", "compute_capability": "9.0"})
    return made


def left(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_what_is_asked_of_tensorrt(fake: Any, file: Path, tmp_path: Path) -> None:
    made = build(
        file,
        tmp_path / "net.engine",
        profile=Profile(2, 4, 16),
        workspace_gib=0.5,
        hardware_compatible=True,
    )
    assert fake.asked("create_network") == [
        (1 << int(fake.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED),)
    ]
    assert fake.asked("set_shape") == [("x", (2, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8))]
    assert fake.asked("set_memory_pool_limit") == [("WORKSPACE", 2**29)]
    assert [c[0].name for c in fake.asked("profiling_verbosity")] == ["DETAILED"]
    assert [c[0].name for c in fake.asked("hardware_compatibility_level")] == ["AMPERE_PLUS"]
    assert fake.asked("create_timing_cache") == []
    assert made.version == fake.module.__version__
    assert left(tmp_path) == {"net.onnx", "net.engine", "net.engine.json"}


def test_the_flag_is_by_name() -> None:
    values = [
        int(fake_tensorrt.make(v).module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        for v in VERSIONS
    ]
    assert values == [1, 0]


def test_the_metadata(fake: Any, file: Path, tmp_path: Path) -> None:
    fake.report = json.dumps(
        {"Layers": [{"Name": "c", "Weights": {"Type": "Int8"}}, {"LayerType": "Reformat"}, "d"]}
    )
    made = build(file, tmp_path / "net.engine")
    said = json.loads(made.metadata.read_text())
    assert said == {
        "tensorrt": fake.module.__version__,
        "gpu": {"name": "fake", "compute_capability": "9.0"},
        "hardware_compatible": False,
        "onnx": {"name": "net.onnx", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        "profile": {"min": 1, "opt": 8, "max": 32},
        "workspace_gib": 4.0,
        "inputs": {"x": {"shape": [-1, 3, 8, 8], "dtype": "FLOAT"}},
        "outputs": {"y": {"shape": [-1, 3, 8, 8], "dtype": "FLOAT"}},
        "layers": {"?": 1, "INT8": 1},
        "reformats": 1,
    }
    assert (made.layers, made.reformats) == ({"?": 1, "INT8": 1}, 1)


def test_the_timing_cache_is_read_and_written(fake: Any, file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    build(file, tmp_path / "a", timing_cache=cache)
    assert cache.read_bytes() == b"+timed"
    build(file, tmp_path / "b", timing_cache=cache)
    assert cache.read_bytes() == b"+timed+timed"
    fake.stale_cache = True
    build(file, tmp_path / "c", timing_cache=cache)
    assert cache.read_bytes() == b"+timed"


def test_a_fixed_batch_has_no_profile(fake: Any, tmp_path: Path) -> None:
    build(write(tmp_path / "n.onnx", 1, 3, 8, 8), tmp_path / "n.engine")
    assert fake.asked("set_shape") == []
    assert "Shapes" not in trtexec(tmp_path / "n.onnx", "n.engine")


@pytest.mark.parametrize("how", ["none", "broken"])
def test_a_failed_build_leaves_nothing(fake: Any, file: Path, tmp_path: Path, how: str) -> None:
    fake.build = how
    with pytest.raises(
        CheckError, match="could not find any implementation" if how == "none" else "not compatible"
    ):
        build(file, tmp_path / "net.engine", timing_cache=tmp_path / "timings")
    assert left(tmp_path) == {"net.onnx"}


@pytest.mark.parametrize("progress", [False, True])
def test_ctrl_c_stops_the_build(fake: Any, file: Path, tmp_path: Path, progress: bool) -> None:
    before = signal.getsignal(signal.SIGINT)
    fake.build = "interrupt"
    (tmp_path / "net.engine").write_bytes(b"an older one")
    with pytest.raises(KeyboardInterrupt):
        build(file, tmp_path / "net.engine", progress=progress)
    assert fake.asked("stopped") == [(1,)]
    assert (tmp_path / "net.engine").read_bytes() == b"an older one"
    assert left(tmp_path) == {"net.onnx", "net.engine"}
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_is_shown(fake: Any, file: Path, tmp_path: Path) -> None:
    build(file, tmp_path / "net.engine", progress=True)
    with bindings.watched(fake.module, True) as monitor:
        monitor.phase_start("Tactics", "Building", 4)
        assert monitor.step_complete("Tactics", 2)
        assert [(t.description, t.completed, t.total) for t in monitor.bars.tasks] == [
            ("Tactics", 3, 4)
        ]
        monitor.phase_finish("Tactics")
        assert not monitor.bars.tasks


def test_what_the_parser_refuses_is_named(fake: Any, file: Path, tmp_path: Path) -> None:
    fake.parse_errors = [("/head/Det", "Det", "no importer registered for op: Det")] + [
        (f"n{i}", "Celu", "unsupported") for i in range(15)
    ]
    with pytest.raises(InputError) as caught:
        build(file, tmp_path / "net.engine")
    assert "'/head/Det' (Det): no importer" in str(caught.value) and "'n8' (Celu)" in str(
        caught.value
    )
    assert "and 6 more" in str(caught.value)
    assert left(tmp_path) == {"net.onnx"}


def test_what_is_refused_before_anything_is_built(fake: Any, file: Path, tmp_path: Path) -> None:
    goal = tmp_path / "net.engine"
    with pytest.raises(InputError, match=r"dimension 2 \(height\) of input x is dynamic"):
        build(write(tmp_path / "wide.onnx", "batch", 3, "height", 8), goal)
    with pytest.raises(InputError, match="is not an ONNX file"):
        build(tmp_path / "absent.onnx", goal)
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff\xffnothing")
    with pytest.raises(InputError, match="is not an ONNX file"):
        build(tmp_path / "bad.onnx", goal)
    with pytest.raises(InputError, match="cannot write"):
        build(file, tmp_path / "absent" / "net.engine")
    with pytest.raises(InputError, match="cannot write"):
        build(file, tmp_path)
    for gib in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="workspace"):
            build(file, goal, workspace_gib=gib)
    for sizes in ((0, 1, 1), (2, 1, 3), (1, 4, 3)):
        with pytest.raises(InputError, match="min <= opt <= max"):
            Profile(*sizes)
    assert fake.calls == [] and not goal.exists()


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path / "n.onnx", "batch", 3))
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    )
    onnx.save(
        model, tmp_path / "n.onnx", save_as_external_data=True, location="n.data", size_threshold=0
    )
    trtexec(tmp_path / "n.onnx", "e")
    (tmp_path / "n.data").unlink()
    with pytest.raises(InputError, match=r"n\.data, which is not beside it"):
        trtexec(tmp_path / "n.onnx", "e")
    constant = helper.make_node("Constant", [], ["w"], value=model.graph.initializer.pop())
    model.graph.node.insert(0, constant)
    onnx.save(model, tmp_path / "c.onnx")
    with pytest.raises(InputError, match=r"keeps w in n\.data, which is not beside it"):
        trtexec(tmp_path / "c.onnx", "e")


def test_no_file_of_a_build_is_written_over_another(fake: Any, file: Path, tmp_path: Path) -> None:
    model = onnx.load(file)
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    )
    onnx.save(model, file, save_as_external_data=True, location="net.data", size_threshold=0)
    (tmp_path / "link").symlink_to(file)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    goal = tmp_path / "net.engine"
    pairs = (
        *(
            (path, None)
            for path in (
                file,
                tmp_path / "link",
                tmp_path / "net.data",
                f"{tmp_path}/../{tmp_path.name}/net.onnx",
            )
        ),
        *((goal, path) for path in (goal, f"{goal}.json", file, tmp_path / "net.data")),
    )
    for engine_path, cache in pairs:
        with pytest.raises(InputError, match="is named twice"):
            build(file, engine_path, timing_cache=cache)
        with pytest.raises(InputError, match="is named twice"):
            trtexec(file, engine_path, timing_cache=cache)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before and fake.calls == []


def test_without_tensorrt_or_a_gpu_the_line_is_given(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = tmp_path / "net.engine"
    line = trtexec(file, goal)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPart, match="pip install tensorrt") as caught:
        build(file, goal)
    assert str(caught.value).endswith(line) and caught.value.exit_code == 3
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make("11.4").module)
    monkeypatch.setattr(bindings, "_gpu", lambda: None)
    with pytest.raises(MissingPart, match="CUDA") as caught:
        build(file, goal)
    assert str(caught.value).endswith(line)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make("8.6").module)
    with pytest.raises(MissingPart, match="too old"):
        build(file, goal)
    assert left(tmp_path) == {"net.onnx"}


def test_the_trtexec_line(tmp_path: Path) -> None:
    file = write(tmp_path / "my net.onnx", "batch", 3, 8, 8)
    words = shlex.split(
        trtexec(
            file,
            "out.engine",
            Profile(1, 2, 4),
            1.5,
            tmp_path / "t.cache",
            hardware_compatible=True,
        )
    )
    assert words == [
        "trtexec",
        f"--onnx={file}",
        "--saveEngine=out.engine",
        "--minShapes=x:1x3x8x8",
        "--optShapes=x:2x3x8x8",
        "--maxShapes=x:4x3x8x8",
        "--memPoolSize=workspace:1536M",
        f"--timingCacheFile={tmp_path / 't.cache'}",
        "--hardwareCompatibilityLevel=ampere+",
        "--stronglyTyped",
        "--profilingVerbosity=detailed",
    ]


def test_trtexec_is_told_which_colon_ends_a_name(tmp_path: Path) -> None:
    line = trtexec(write(tmp_path / "n.onnx", "batch", 3, 8, 8, name="x:0"), "e", Profile(1, 2, 4))
    assert "--minShapes='x:0':1x3x8x8" in shlex.split(line)


def test_a_dimension_of_minus_one_is_dynamic(fake: Any, tmp_path: Path) -> None:
    assert "--maxShapes=x:32x3x8x8" in trtexec(write(tmp_path / "n.onnx", -1, 3, 8, 8), "e")
    build(tmp_path / "n.onnx", tmp_path / "n.engine")
    assert fake.asked("set_shape") == [("x", (1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))]
    with pytest.raises(InputError, match=r"dimension 2 .* is dynamic"):
        trtexec(write(tmp_path / "n.onnx", "batch", 3, -1, 8), "e")


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return 0.25


class _Stream:
    cuda_stream = 7

    def synchronize(self) -> None:
        pass


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_run, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("device")
def test_an_engine_runs(fake: Any, file: Path, tmp_path: Path) -> None:
    made = build(file, tmp_path / "net.engine")
    x = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    out = run(made.path, {"x": x})
    assert out["y"].shape == x.shape and np.allclose(out["y"], x.mean(), atol=1e-6)
    fake.calls.clear()
    assert latency(made.path, {"x": x}, 3) == [0.25] * 3
    assert len(fake.asked("execute_async_v3")) == 3 + engine_run.WARM_UP


@pytest.mark.usefixtures("device")
def test_an_engine_is_compared_and_timed(fake: Any, file: Path, tmp_path: Path) -> None:
    made = build(file, tmp_path / "net.engine")
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    trial = tried(made.path, file, {"x": x.numpy()}, 3)
    assert trial.difference.sqnr == pytest.approx(
        difference(x.relu(), torch.full_like(x, float(x.mean()))).sqnr, abs=1e-4
    )
    assert (trial.gpu, trial.milliseconds, trial.batch) == ("fake", 0.25, 4)
    assert str(trial).endswith("; 0.250 ms for 4 images on fake")
    named = write(tmp_path / "other.onnx", "batch", 3, 8, 8, out="z")
    with pytest.raises(CheckError, match=r"outputs are \['z'\], the engine's \['y'\]"):
        tried(made.path, named, {"x": x.numpy()}, 3)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("batch", "images"), [("batch", 8), (2, 2)])
def test_the_command_runs_the_engine_where_a_gpu_is(
    fake: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    batch: str | int,
    images: int,
) -> None:
    """With the batch that the engine is tuned for, whatever the example has."""
    file = write(tmp_path / "net.onnx", batch, 3, 8, 8)
    made = build(file, tmp_path / "net.engine")
    deploy._try(made, file, (torch.ones(2, 3, 8, 8),), 8)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("the engine against ONNX Runtime: max abs 0, ")
    assert said.endswith(f"0.250 ms for {images} images on fake")
    fake.runs = False
    deploy._try(made, file, (torch.ones(2, 3, 8, 8),), 8)
    assert "was not run: TensorRT failed to run" in " ".join(capsys.readouterr().out.split())
    deploy._try(made, file, (), 8)
    assert "was not run: the file has other inputs" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(bindings, "_gpu", lambda: None)
    deploy._try(made, file, (torch.ones(2, 3, 8, 8),), 8)
    assert capsys.readouterr().out.startswith("the engine was not run: torch sees no CUDA")


@pytest.mark.usefixtures("device")
def test_the_tensorrt_that_built_an_engine_runs_it(
    fake: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build(file, tmp_path / "net.engine")
    x = np.ones((2, 3, 8, 8), np.float32)
    made.metadata.write_text('{"tensorrt_rtx": "1.7"}')
    monkeypatch.setattr(rtx, "module", lambda: None)
    with pytest.raises(MissingPart, match="engine of TensorRT for RTX, which is not installed"):
        run(made.path, {"x": x})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "pretended_rtx", fake.module)
    monkeypatch.setattr(rtx, "module", lambda: "pretended_rtx")
    assert np.allclose(run(made.path, {"x": x})["y"], 1)
    made.metadata.write_text('{"tensorrt_rtx"')
    with pytest.raises(InputError, match="is not the JSON file of an engine"):
        run(made.path, {"x": x})
    made.metadata.write_text("[1]")
    with pytest.raises(InputError, match=r"is not the JSON file of an engine: it holds \[1\]"):
        run(made.path, {"x": x})
    made.metadata.unlink()
    with pytest.raises(MissingPart, match="TensorRT is not installed"):
        run(made.path, {"x": x})


@pytest.mark.usefixtures("device")
def test_what_an_engine_refuses(fake: Any, file: Path, tmp_path: Path) -> None:
    made = build(file, tmp_path / "net.engine", profile=Profile(1, 2, 4))
    x = np.zeros((2, 3, 8, 8), np.float32)
    with pytest.raises(InputError, match=r"engine takes \(1, 3, 8, 8\) to \(4, 3, 8, 8\)"):
        run(made.path, {"x": np.zeros((5, 3, 8, 8), np.float32)})
    with pytest.raises(InputError, match="x is float64; the engine takes float32"):
        run(made.path, {"x": x.astype(np.float64)})
    with pytest.raises(InputError, match="takes x; given: z"):
        run(made.path, {"z": x})
    with pytest.raises(InputError, match="cannot read"):
        run(tmp_path / "absent", {"x": x})
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(InputError, match="not compatible"):
        run(tmp_path / "other", {"x": x})
    with pytest.raises(InputError, match="rounds"):
        latency(made.path, {"x": x}, 0)
    fake.runs = False
    with pytest.raises(CheckError, match="failed to run"):
        run(made.path, {"x": x})


def test_layers_are_counted_in_both_schemas() -> None:
    ten = {
        "Layers": [
            {
                "Name": "a",
                "LayerType": "CaskConvolution",
                "Outputs": [{"Format/Datatype": "Row major Int8 format"}],
            },
            {
                "Name": "b",
                "LayerType": "PointWiseV2",
                "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}],
            },
            {
                "Name": "c",
                "LayerType": "CaskConvolution",
                "Weights": {"Type": "Int8"},
                "Outputs": [{"Format/Datatype": "FP32"}],
            },
            {
                "Name": "Reformatting CopyNode for Input Tensor 0 to a",
                "LayerType": "Reformat",
                "Origin": "REFORMAT",
            },
        ],
        "Bindings": ["x", "y"],
    }
    assert count_layers(json.dumps(ten)) == ({"FP16": 1, "INT8": 2}, 1)
    eleven = {
        "Layers": [
            {"Name": "a", "Outputs": [{"DataType": "Int8", "Format": "kCHW32"}]},
            {"Name": "b", "Outputs": [{"DataType": "Float"}]},
            {"Name": "d", "Outputs": [{"DataType": "BFloat16"}]},
            {"Name": "e", "Outputs": [{"Format": "N/A due to dynamic shapes"}]},
        ],
        "I/O Tensors": [{"Name": "x"}],
    }
    assert count_layers(json.dumps(eleven)) == ({"?": 1, "BF16": 1, "FP32": 1, "INT8": 1}, 0)


@pytest.mark.parametrize("text", ["", "no json", "{}", "[]", "3", '{"Layers": 3}', "null"])
def test_a_report_that_cannot_be_read_is_no_error(text: str) -> None:
    assert count_layers(text) == ({}, 0)


@pytest.mark.parametrize(
    "text", ['{"Layers": [null, 3, [], {"Outputs": []}, {"Outputs": [3], "Weights": 4}]}']
)
def test_a_strange_layer_is_unknown(text: str) -> None:
    assert count_layers(text) == ({"?": 5}, 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_has_what_is_used_and_nothing_else(version: str) -> None:
    used = fake_tensorrt.surface()
    made = fake_tensorrt.make(version)
    assert {n for n in vars(made.module) if not n.startswith("__")} == used.pop("")
    for name, part in fake_tensorrt.CLASSES[version].items():
        if hasattr(part, "__members__"):
            has = set(part.__members__) - ({"NONE", "OUTPUT"} if name == "TensorIOMode" else set())
        else:
            has = {n for k in part.__mro__[:-1] for n in vars(k) if not n.startswith("_")} - {
                "settable"
            }
        assert has == used.pop(name, set()), name
    assert not used


def test_every_object_of_tensorrt_is_known_to_the_surface() -> None:
    """A parameter of unknown type is one of the variables whose attributes are checked, or the
    log."""
    for path in fake_tensorrt.FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.arg)
                and isinstance(node.annotation, ast.Name)
                and node.annotation.id == "Any"
            ):
                assert node.arg in {*fake_tensorrt.VARIABLES, "trt", "log", "severity", "_"}, (
                    f"{path.name}: {node.arg}"
                )


def test_engine_gives_its_functions() -> None:
    assert all(hasattr(engine, name) for name in engine.__all__)
