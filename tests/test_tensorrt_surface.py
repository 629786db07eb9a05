"""Every name of TensorRT that repfx uses, looked up in the real bindings of 10.13 and 11.4, without
TensorRT itself.

Opt-in, as it fetches the bindings (1 MB each) from PyPI into a temporary folder:
REPFX_TENSORRT_SURFACE=1. The bindings load against three stub libraries that hold the nine
functions they link to. The wheels are NVIDIA's: no part of them is kept or committed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.network

ROOT = Path(__file__).parent.parent
WHEELS = {"10": "tensorrt_cu12_bindings==10.13.*", "11": "tensorrt_cu13_bindings==11.4.*"}
STUBS = {
    "libnvinfer": [
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getPluginRegistry",
        "getBuilderPluginRegistry",
    ],
    "libnvinfer_plugin": ["initLibNvInferPlugins"],
    "libnvonnxparser": [
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ],
}
LOOK = """
import ctypes, json, sys
from pathlib import Path

folder, used = Path(sys.argv[1]), json.loads(sys.argv[2])
libraries = sorted(folder.glob("lib*.so.*"))
kept = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in libraries]
sys.path.insert(0, str(folder))
import tensorrt_bindings as trt

missing = []
for holder, names in used.items():
    for name in names:
        if not hasattr(getattr(trt, holder, None) if holder else trt, name):
            missing.append(f"{holder}.{name}".strip("."))
sys.modules["tensorrt"] = trt
from repfx.lowering.tensorrt import bindings

assert bindings.tensorrt() is trt
log = bindings.log_of(trt)
with bindings.watched(trt, False) as monitor:
    monitor.phase_start("Building", None, 2)
    assert monitor.step_complete("Building", 0)
    monitor.phase_finish("Building")
trt.init_libnvinfer_plugins(log, "")
flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
try:
    trt.Builder(log)
    refused = False
except TypeError:
    refused = True
signatures = {f"{h}.{n}": str(getattr(getattr(getattr(trt, h), n), "__doc__", ""))
              for h, ns in used.items() if h
              for n in ns if hasattr(getattr(trt, h, None), n)}
print(json.dumps({"version": trt.__version__, "missing": missing, "flags": flags,
                  "refused": refused,
                  "signatures": signatures}))
"""
# what the calls pass by position, as the real bindings spell it
CALLS = {
    "Builder.build_serialized_network": ["network", "config"],
    "IBuilderConfig.set_memory_pool_limit": ["pool", "pool_size"],
    "IBuilderConfig.create_timing_cache": ["serialized_timing_cache"],
    "IBuilderConfig.set_timing_cache": ["cache", "ignore_mismatch"],
    "IOptimizationProfile.set_shape": ["input", "min", "opt", "max"],
    "OnnxParser.parse_from_file": ["model"],
    "Runtime.deserialize_cuda_engine": ["serialized_engine"],
    "EngineInspector.get_engine_information": ["format"],
    "ICudaEngine.get_tensor_profile_shape": ["name", "profile_index"],
    "IExecutionContext.set_input_shape": ["name", "shape"],
    "IExecutionContext.set_tensor_address": ["name", "memory"],
    "IExecutionContext.execute_async_v3": ["stream_handle"],
    "IProgressMonitor.phase_start": ["phase_name", "parent_phase", "num_steps"],
    "IProgressMonitor.step_complete": ["phase_name", "step"],
    "IProgressMonitor.phase_finish": ["phase_name"],
}


def _surface() -> dict[str, list[str]]:
    spec = importlib.util.spec_from_file_location(
        "fake_tensorrt_names", Path(__file__).parent / "fake_tensorrt.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return {holder: sorted(names) for holder, names in module.surface().items()}


def _bindings(major: str, folder: Path) -> None:
    """The bindings and their stubs in the folder; skips where they cannot be had."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which builds the stub libraries, is not here")
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    got = subprocess.run([*fetch, WHEELS[major]], capture_output=True, text=True, timeout=300)
    wheels = list(folder.glob("*.whl"))
    if got.returncode or not wheels:
        pytest.skip(f"{WHEELS[major]} cannot be had from PyPI: {got.stderr.strip()[-200:]}")
    zipfile.ZipFile(wheels[0]).extractall(folder)
    for name, functions in STUBS.items():
        source = folder / f"{name}.c"
        source.write_text("".join(f"void *{f}(void) {{ return 0; }}\n" for f in functions))
        out = f"{name}.so.{major}"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{out}", "-o", str(folder / out), str(source)],
            check=True,
        )


@pytest.mark.parametrize("major", sorted(WHEELS))
def test_every_name_exists_in_the_real_bindings(major: str, tmp_path: Path) -> None:
    if os.environ.get("REPFX_TENSORRT_SURFACE") != "1":
        pytest.skip(
            "fetches NVIDIA's bindings: REPFX_TENSORRT_SURFACE=1 pytest "
            "tests/test_tensorrt_surface.py"
        )
    _bindings(major, tmp_path)
    used = _surface()
    got = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path), json.dumps(used)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert got.returncode == 0, got.stderr[-2000:]
    said = json.loads(got.stdout.splitlines()[-1])
    assert said["missing"] == [], said["version"]
    assert said["version"].startswith({"10": "10.13", "11": "11.4"}[major])
    assert said["flags"] == {"10": 2, "11": 1}[major]
    assert said["refused"], "the stubs build no Builder"
    for call, names in CALLS.items():
        arguments = said["signatures"][call]
        places = [arguments.find(f"{name}: ") for name in names]
        assert -1 not in places and places == sorted(places), f"{call}: {arguments[:200]}"


def test_the_calls_checked_are_calls_that_are_made() -> None:
    used = _surface()
    for call in CALLS:
        holder, name = call.split(".")
        assert name in used[holder], call
