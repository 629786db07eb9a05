"""Runs a TensorRT engine on torch tensors, whose device addresses are passed to TensorRT.

An engine is run by the TensorRT that built it, 10 or 11 or TensorRT for RTX, as the JSON file
beside it says. Both have the same functions."""

from __future__ import annotations

import importlib
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from repfx.errors import CheckError, InputError, MissingPart
from repfx.lowering.runtimes.run import session
from repfx.lowering.tensorrt import rtx
from repfx.lowering.tensorrt.bindings import Place, gpu_for, joined, log_of, tensorrt
from repfx.rewrite.difference import Difference, difference

DEVICE = "cuda"
WARM_UP = 10
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


def run(engine_path: Place, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs an engine once: its outputs by name for inputs by name.

    Inputs and outputs are (N, ...) with N within the profile. bfloat16 outputs become float32.

    Raises InputError where the engine cannot be loaded or an input does not fit it, MissingPart
    without TensorRT or a CUDA device, CheckError where the engine fails."""
    launch, outputs, stream = _prepared(engine_path, feeds)
    launch()
    stream.synchronize()
    return {
        n: (t.float() if t.dtype == torch.bfloat16 else t).cpu().numpy() for n, t in outputs.items()
    }


def latency(engine_path: Place, feeds: dict[str, np.ndarray], rounds: int = 100) -> list[float]:
    """The milliseconds that each of `rounds` runs takes on the GPU after a warm-up.

    Inputs and outputs stay in device memory. Raises what `run` raises."""
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, not {rounds}")
    launch, _, stream = _prepared(engine_path, feeds)
    for _ in range(WARM_UP):
        launch()
    taken = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        launch()
        end.record(stream)
        stream.synchronize()
        taken.append(float(start.elapsed_time(end)))
    return taken


@dataclass(frozen=True)
class Trial:
    """An engine that was run: on which GPU, how far it is from ONNX Runtime, and how fast.

    `difference`: its outputs against those of ONNX Runtime for the same file and inputs.
    `milliseconds`: the median of all runs, for a batch of `batch` images."""

    gpu: str
    difference: Difference
    milliseconds: float
    batch: int

    def __str__(self) -> str:
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        return f"{self.difference}; {self.milliseconds:.3f} ms for {images} on {self.gpu}"


def tried(
    engine_path: Place, onnx_path: Place, feeds: dict[str, np.ndarray], rounds: int = 100
) -> Trial:
    """Runs an engine, compares it with ONNX Runtime on the file it was built from, and times it.

    Raises what `run` raises, and CheckError where the engine's outputs are not the file's."""
    found = run(engine_path, feeds)
    graph = onnx.load(os.fspath(onnx_path), load_external_data=False).graph
    names = [output.name for output in graph.output]
    if set(names) != set(found):
        raise CheckError(f"the file's outputs are {names}, the engine's {list(found)}")
    # What the file says, not what ONNX Runtime's optimizer makes of it.
    reference = session("onnxruntime", str(onnx_path), optimize=False)
    wanted = reference([torch.from_numpy(feeds[given.name]) for given in graph.input])
    off = difference(wanted, [torch.from_numpy(found[name]) for name in names])
    taken = latency(engine_path, feeds, rounds)
    batch = max((len(x) for x in feeds.values() if x.ndim), default=1)
    return Trial(gpu_for("")["name"], off, statistics.median(taken), batch)


def _builder_of(engine_path: Place) -> Any:
    """The module of the TensorRT that built an engine; without a JSON file, TensorRT 10 or 11."""
    beside = Path(f"{engine_path}.json")
    try:
        about = json.loads(beside.read_text()) if beside.is_file() else {}
    except ValueError as error:
        raise InputError(f"{beside} is not the JSON file of an engine: {error}") from error
    if not isinstance(about, dict):
        raise InputError(f"{beside} is not the JSON file of an engine: it holds {about!r:.40}")
    if "tensorrt_rtx" not in about:
        return tensorrt()
    name = rtx.module()
    if name is None:
        raise MissingPart(
            f"{engine_path} is an engine of {rtx.NAME}, which is not installed: "
            "pip install 'repfx[rtx]'"
        )
    return importlib.import_module(name)


def _prepared(
    engine_path: Place, feeds: dict[str, np.ndarray]
) -> tuple[Callable[[], None], dict[str, Tensor], torch.cuda.Stream]:
    """A function that starts one run on the stream, the device tensors it writes, the stream."""
    trt = _builder_of(engine_path)
    gpu_for("")
    log = log_of(trt)
    log.errors.clear()
    runtime, engine, context = _loaded(trt, log, engine_path)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    if set(feeds) != set(inputs):
        raise InputError(
            f"the engine takes {', '.join(inputs)}; given: {', '.join(feeds) or 'nothing'}"
        )
    tensors = {name: _given(engine, context, name, feeds[name]) for name in inputs}
    for name in names:
        if name not in tensors:
            tensors[name] = _room(engine, context, name)
        if not context.set_tensor_address(name, tensors[name].data_ptr()):
            raise CheckError(f"TensorRT rejects the memory for {name}: {joined(log.errors)}")
    stream = torch.cuda.Stream()
    # The copies above ran on another stream.
    torch.cuda.synchronize()

    alive = (runtime, engine, tensors)

    def launch() -> None:
        if not (alive and context.execute_async_v3(stream.cuda_stream)):
            raise CheckError(f"TensorRT failed to run {engine_path}: {joined(log.errors)}")

    return launch, {n: t for n, t in tensors.items() if n not in feeds}, stream


def _loaded(trt: Any, log: Any, engine_path: Place) -> tuple[Any, Any, Any]:
    """The runtime, the engine and a context to run it in; the first two must outlive the third."""
    try:
        data = Path(engine_path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {engine_path}: {error.strerror or error}") from error
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise InputError(
            f"TensorRT {trt.__version__} cannot load {engine_path}: {joined(log.errors)}. "
            "An engine runs only with the TensorRT version and on the kind of GPU that built it"
        )
    context = engine.create_execution_context()
    if context is None:
        raise CheckError(f"TensorRT cannot run {engine_path}: {joined(log.errors)}")
    return runtime, engine, context


def _given(engine: Any, context: Any, name: str, value: np.ndarray) -> Tensor:
    """Puts an input on the device and tells the context its shape."""
    tensor = _fed(engine, name, value)
    if not context.set_input_shape(name, tuple(tensor.shape)):
        lowest, _, highest = engine.get_tensor_profile_shape(name, 0)
        raise InputError(
            f"{name} is {tuple(tensor.shape)}; the engine takes {tuple(lowest)} to {tuple(highest)}"
        )
    return tensor


def _room(engine: Any, context: Any, name: str) -> Tensor:
    """Memory for an output, whose shape follows from the shapes of the inputs."""
    shape = tuple(context.get_tensor_shape(name))
    if min(shape, default=0) < 0:
        raise InputError(
            f"the size of output {name} depends on the data; such engines are not supported here"
        )
    return torch.empty(shape, dtype=_dtype(engine, name), device=DEVICE)


def _fed(engine: Any, name: str, value: np.ndarray) -> Tensor:
    wanted = _dtype(engine, name)
    tensor = torch.from_numpy(np.array(value))
    if tensor.dtype != wanted:
        raise InputError(
            f"{name} is {value.dtype}; the engine takes {str(wanted).removeprefix('torch.')}"
        )
    return tensor.to(DEVICE)


def _dtype(engine: Any, name: str) -> torch.dtype:
    kind = str(engine.get_tensor_dtype(name).name)
    if kind not in _DTYPES:
        raise InputError(f"{name} is {kind}, which no torch tensor holds")
    return _DTYPES[kind]
