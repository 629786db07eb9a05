"""lower: ONNX Q/DQ -> a TensorRT engine, for TensorRT 10 and 11. Never yet run on a real engine.

The network is strongly typed: every layer has the precision that the file gives it, so there are no
precision flags and no calibrators."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from repfx.errors import CheckError, InputError
from repfx.files.store import write_whole
from repfx.lowering.onnx.external import elsewhere, require
from repfx.lowering.onnx.index import known
from repfx.lowering.tensorrt.bindings import Place, joined, log_of, present, watched
from repfx.lowering.tensorrt.inspector import count_layers
from repfx.lowering.tensorrt.run import latency, run

__all__ = ["Engine", "Profile", "build", "latency", "run", "trtexec"]
SHOWN = 10


@dataclass(frozen=True)
class Profile:
    """The batch sizes an engine accepts, from `min` to `max`, and `opt`, the one it is tuned for.

    Raises InputError unless 1 <= min <= opt <= max."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(
                f"a profile needs 1 <= min <= opt <= max; these are {self.min}, {self.opt} and "
                f"{self.max}"
            )


@dataclass(frozen=True)
class Engine:
    """A built engine.

    `path`, `metadata`: the engine file and the JSON file beside it. `layers`: the number of layers
    by precision ("?" where it is not reported). `reformats`: how many more layers only change a
    layout. `version`: the TensorRT version that built the engine and can run it."""

    path: Path
    metadata: Path
    layers: dict[str, int]
    reformats: int
    version: str


def build(
    onnx_path: Place,
    engine_path: Place,
    *,
    profile: Profile | None = None,
    workspace_gib: float = 4.0,
    timing_cache: Place | None = None,
    progress: bool = False,
    hardware_compatible: bool = False,
) -> Engine:
    """Builds an engine from an ONNX file for the GPU of this machine, with a JSON file beside it.

    The JSON file is `engine_path` + ".json".

    `profile`: the sizes of the batch, the only dimension that may be dynamic; 1, 8, 32 when None.
    `workspace_gib`: the most device memory one layer may use, in GiB. `timing_cache`: a file that
    is read if it exists and written after the build. `hardware_compatible`: the engine also runs on
    other GPUs, from Ampere on, but slower.

    Raises InputError where the file cannot be used (operators are named) or a path cannot be
    written; MissingPart, with the trtexec command, without TensorRT or a CUDA device; CheckError
    where TensorRT builds no engine; KeyboardInterrupt on Ctrl-C. In each case no engine file is
    written."""
    profile = profile or Profile()
    order = _Order(onnx_path, profile, workspace_gib, hardware_compatible)
    goal, beside = Path(engine_path), _metadata(engine_path)
    line = trtexec(
        onnx_path,
        engine_path,
        profile,
        workspace_gib,
        timing_cache,
        hardware_compatible=hardware_compatible,
    )
    for path in (goal, beside, timing_cache):
        _check_place(path)
    trt, gpu = present(
        f". On a machine with TensorRT and a GPU, this builds the same engine:\n{line}"
    )
    log = log_of(trt)
    log.errors.clear()
    plan, timings = _plan(trt, log, order, timing_cache, progress)
    found = _described(trt, log, plan, order)
    about = {"tensorrt": trt.__version__, "gpu": gpu, **order.told(), **found}
    if timing_cache is not None:
        write_whole(timing_cache, lambda part: Path(part).write_bytes(timings))
    write_whole(goal, lambda part: Path(part).write_bytes(plan))
    write_whole(beside, lambda part: Path(part).write_text(json.dumps(about, indent=1) + "\n"))
    return Engine(goal, beside, found["layers"], found["reformats"], str(trt.__version__))


@dataclass(frozen=True)
class _Order:
    """Everything that decides which engine is built."""

    onnx: Place
    profile: Profile
    workspace_gib: float
    hardware_compatible: bool

    def told(self) -> dict[str, Any]:
        digest = hashlib.sha256(Path(self.onnx).read_bytes()).hexdigest()
        return {
            "hardware_compatible": self.hardware_compatible,
            "onnx": {"name": Path(self.onnx).name, "sha256": digest},
            "profile": asdict(self.profile),
            "workspace_gib": self.workspace_gib,
        }


def _plan(
    trt: Any, log: Any, order: _Order, timing_cache: Place | None, progress: bool
) -> tuple[bytes, bytes]:
    """The serialized engine, and the timing cache, empty where none was asked for."""
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    network, parser = _parse(trt, builder, log, order.onnx)
    config = _config(trt, builder, order.workspace_gib, order.hardware_compatible)
    _add_profile(builder, config, _inputs(_read(order.onnx)), order.profile)
    # The cache must outlive the build.
    cache = None if timing_cache is None else _load_cache(config, Path(timing_cache))
    with watched(trt, progress) as monitor:
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    del parser
    if monitor.stopped:
        raise KeyboardInterrupt
    if plan is None:
        raise CheckError(
            f"TensorRT {trt.__version__} built no engine from {order.onnx}: {joined(log.errors)}"
        )
    return plan, b"" if cache is None else cache.serialize()


def _described(trt: Any, log: Any, plan: bytes, order: _Order) -> dict[str, Any]:
    """What the engine reports about itself: its inputs and outputs, and its layers, counted."""
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise CheckError(
            f"TensorRT cannot load the engine it built from {order.onnx}: {joined(log.errors)}"
        )
    inspector = engine.create_engine_inspector()
    layers, reformats = count_layers(
        inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    )
    return {**_ports(trt, engine), "layers": layers, "reformats": reformats}


def trtexec(
    onnx_path: Place,
    engine_path: Place,
    profile: Profile | None = None,
    workspace_gib: float = 4.0,
    timing_cache: Place | None = None,
    *,
    hardware_compatible: bool = False,
) -> str:
    """The shell command that builds the same engine as `build`.

    Raises InputError where the file or a value cannot be used."""
    profile = profile or Profile()
    if not (math.isfinite(workspace_gib) and workspace_gib * 1024 >= 1):
        raise InputError(f"the workspace must be at least 1 MiB; workspace_gib is {workspace_gib}")
    model = _read(onnx_path)
    read = [onnx_path, *(Path(onnx_path).parent / location for _, location in elsewhere(model))]
    _check_apart(read, engine_path, _metadata(engine_path), timing_cache)
    words = ["trtexec", f"--onnx={os.fspath(onnx_path)}", f"--saveEngine={os.fspath(engine_path)}"]
    dynamic = {name: shape for name, shape in _inputs(model).items() if None in shape}
    if dynamic:
        for size in ("min", "opt", "max"):
            full = {
                n: "x".join(map(str, _filled(s, getattr(profile, size))))
                for n, s in dynamic.items()
            }
            words.append(
                f"--{size}Shapes=" + ",".join(f"{_quoted(n)}:{s}" for n, s in full.items())
            )
    # trtexec 10 reads only the last letter (B, K, M, G), so "MiB" would mean bytes.
    words.append(f"--memPoolSize=workspace:{int(workspace_gib * 1024)}M")
    if timing_cache is not None:
        words.append(f"--timingCacheFile={os.fspath(timing_cache)}")
    if hardware_compatible:
        words.append("--hardwareCompatibilityLevel=ampere+")
    # TensorRT 10 needs --stronglyTyped. TensorRT 11 always is, and ignores the flag.
    return shlex.join([*words, "--stronglyTyped", "--profilingVerbosity=detailed"])


def _quoted(name: str) -> str:
    """The name as trtexec reads it: one with a colon, such as 'x:0', in quotes."""
    return name if re.fullmatch(r"[\w./-]+", name) else f"'{name}'"


def _inputs(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """The inputs of the file by name; None is the batch dimension where it is dynamic."""
    constants = {t.name for t in model.graph.initializer}
    out: dict[str, tuple[int | None, ...]] = {}
    for info in model.graph.input:
        if info.name in constants:
            continue
        if not info.type.tensor_type.HasField("shape"):
            raise InputError(f"the input {info.name} of the file has no shape")
        out[info.name] = known(info.type.tensor_type.shape)
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if axis > 0 and out[info.name][axis] is None:
                raise InputError(
                    f"dimension {axis} ({dim.dim_param or 'unnamed'}) of input {info.name} "
                    "is dynamic; only the batch, dimension 0, may be: export the model at one size"
                )
    return out


def _read(onnx_path: Place) -> onnx.ModelProto:
    """The model without the weights in other files, which were checked to exist."""
    try:
        model = onnx.load(os.fspath(onnx_path), load_external_data=False)
    except Exception as error:
        raise InputError(
            f"{onnx_path} is not an ONNX file: {str(error).strip() or type(error)}"
        ) from error
    require(model, Path(onnx_path))
    return model


def _check_apart(read: list[Place], *written: Place | None) -> None:
    """Raises InputError where one file of a build would overwrite another."""
    taken = {os.path.realpath(file) for file in read}
    for file in written:
        if file is None:
            continue
        if (real := os.path.realpath(file)) in taken:
            raise InputError(
                f"{file} is named twice: the ONNX file, the engine, its .json and the timing "
                "cache must be different files"
            )
        taken.add(real)


def _metadata(engine_path: Place) -> Path:
    return Path(f"{os.fspath(engine_path)}.json")


def _filled(shape: tuple[int | None, ...], batch: int) -> tuple[int, ...]:
    return tuple(batch if d is None else d for d in shape)


def _check_place(path: Place | None) -> None:
    """Raises InputError for a path that cannot be written, before minutes of building."""
    if path is None:
        return
    parent = Path(path).parent
    if Path(path).is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"cannot write {path}: it is a folder, or {parent} is not a folder that can be "
            "written to"
        )


def _parse(trt: Any, builder: Any, log: Any, onnx_path: Place) -> tuple[Any, Any]:
    """The strongly typed network, and its parser, which owns the weights until the build ends."""
    creation = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 ignores the flag, so a later version may drop it.
    flags = 1 << int(creation.STRONGLY_TYPED) if hasattr(creation, "STRONGLY_TYPED") else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(os.fspath(onnx_path)):
        found = []
        for i in range(parser.num_errors):
            fault = parser.get_error(i)
            found.append(f"node {fault.node_name()!r} ({fault.node_operator()}): {fault.desc()}")
        found = list(dict.fromkeys(found)) or list(log.errors)
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        shown = "".join(f"\n  {text}" for text in found[:SHOWN])
        raise InputError(f"TensorRT {trt.__version__} cannot read {onnx_path}:{shown}{more}")
    return network, parser


def _config(trt: Any, builder: Any, workspace_gib: float, hardware_compatible: bool) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace_gib * 1024) << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


def _add_profile(
    builder: Any, config: Any, inputs: dict[str, tuple[int | None, ...]], batch: Profile
) -> None:
    if not any(None in shape for shape in inputs.values()):
        return
    shapes = builder.create_optimization_profile()
    for name, shape in inputs.items():
        if None in shape:
            shapes.set_shape(name, *(_filled(shape, n) for n in (batch.min, batch.opt, batch.max)))
    if config.add_optimization_profile(shapes) < 0:
        raise CheckError(f"TensorRT rejects the profile {batch}")


def _load_cache(config: Any, path: Path) -> Any:
    """Attaches the timing cache in the file.

    Attaches an empty one where there is no file, or it was made on another GPU or version."""
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _ports(trt: Any, engine: Any) -> dict[str, dict[str, Any]]:
    """The engine's inputs and outputs by name, each with its shape (-1 is dynamic) and type."""
    ports: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {}}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        side = "inputs" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "outputs"
        ports[side][name] = {
            "shape": list(engine.get_tensor_shape(name)),
            "dtype": str(engine.get_tensor_dtype(name).name),
        }
    return ports
