"""lower: ONNX Q/DQ -> a TensorRT engine, on TensorRT 10 and 11. Nothing here has ever run on a real
engine.

The network is strongly typed: every precision is what the file says, so there are no precision
flags and no calibrators."""

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
    """The batch sizes an engine takes, and the one it is fastest for. Raises InputError unless 1 <=
    min <= opt <= max.
    """

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(
                f"a profile has 1 <= min <= opt <= max; these are {self.min}, {self.opt}, "
                f"{self.max}"
            )


@dataclass(frozen=True)
class Engine:
    """A built engine. `layers`: how many by precision ("?": not told). `reformats`: layers that
    only change a layout.

    `path`, `metadata`: the engine and the JSON beside it. `version`: of the TensorRT that built it,
    the one that runs it."""

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
    """Builds the engine of an ONNX file for the GPU at hand, with a JSON beside it (`engine_path` +
    ".json").

    `profile`: of the batch, the only dimension that may be dynamic; 1, 8, 32 when None.
    `workspace_gib`: the most device memory one layer may use, in GiB. `timing_cache`: a file that
    is read where it exists and written after the build. `hardware_compatible`: runs on every GPU
    from Ampere on, slower.

    Raises InputError where the file cannot be used (the operators are named) or a path not written,
    MissingPart, with the trtexec line, without TensorRT or a CUDA device, CheckError where TensorRT
    builds nothing; KeyboardInterrupt on Ctrl-C. No engine file is left then."""
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
        f". Where TensorRT and a GPU are at hand this builds the same engine:\n{line}"
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
    """What decides the engine that is built."""

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
    """The engine, and the timings that were taken for it, none without a cache."""
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    network, parser = _parse(trt, builder, log, order.onnx)
    config = _config(trt, builder, order.workspace_gib, order.hardware_compatible)
    _add_profile(builder, config, _inputs(_read(order.onnx)), order.profile)
    # the cache must outlive the build
    cache = None if timing_cache is None else _load_cache(config, Path(timing_cache))
    with watched(trt, progress) as monitor:
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    del parser
    if monitor.stopped:
        raise KeyboardInterrupt
    if plan is None:
        raise CheckError(
            f"TensorRT {trt.__version__} built no engine of {order.onnx}: {joined(log.errors)}"
        )
    return plan, b"" if cache is None else cache.serialize()


def _described(trt: Any, log: Any, plan: bytes, order: _Order) -> dict[str, Any]:
    """What the engine says of itself: its inputs and outputs, and how many layers of what kind."""
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise CheckError(
            f"TensorRT cannot load the engine it built of {order.onnx}: {joined(log.errors)}"
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
    """The shell line that builds the engine `build` builds. Raises InputError where the file or a
    value cannot be used.
    """
    profile = profile or Profile()
    if not (math.isfinite(workspace_gib) and workspace_gib * 1024 >= 1):
        raise InputError(f"the workspace is at least 1 MiB; workspace_gib is {workspace_gib}")
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
    # trtexec 10 reads the last letter alone (B, K, M, G): "MiB" would be bytes
    words.append(f"--memPoolSize=workspace:{int(workspace_gib * 1024)}M")
    if timing_cache is not None:
        words.append(f"--timingCacheFile={os.fspath(timing_cache)}")
    if hardware_compatible:
        words.append("--hardwareCompatibilityLevel=ampere+")
    # TensorRT 11 is always strongly typed and takes the word without effect; 10 needs it
    return shlex.join([*words, "--stronglyTyped", "--profilingVerbosity=detailed"])


def _quoted(name: str) -> str:
    """As trtexec reads names that may hold a colon: 'x:0' in quotes, which are part of the word."""
    return name if re.fullmatch(r"[\w./-]+", name) else f"'{name}'"


def _inputs(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """The inputs of the file by name; None is the batch dimension where it is dynamic."""
    constants = {t.name for t in model.graph.initializer}
    out: dict[str, tuple[int | None, ...]] = {}
    for info in model.graph.input:
        if info.name in constants:
            continue
        if not info.type.tensor_type.HasField("shape"):
            raise InputError(f"input {info.name} of the file has no shape")
        out[info.name] = known(info.type.tensor_type.shape)
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if axis > 0 and out[info.name][axis] is None:
                raise InputError(
                    f"dimension {axis} ({dim.dim_param or 'unnamed'}) of input {info.name} "
                    "is dynamic; only the batch, "
                    "dimension 0, may be: export the model at one size"
                )
    return out


def _read(onnx_path: Place) -> onnx.ModelProto:
    """The file without weights that it keeps elsewhere; they are there."""
    try:
        model = onnx.load(os.fspath(onnx_path), load_external_data=False)
    except Exception as error:
        raise InputError(
            f"{onnx_path} is no ONNX file: {str(error).strip() or type(error)}"
        ) from error
    require(model, Path(onnx_path))
    return model


def _check_apart(read: list[Place], *written: Place | None) -> None:
    """No file of a build is written over another."""
    taken = {os.path.realpath(file) for file in read}
    for file in written:
        if file is None:
            continue
        if (real := os.path.realpath(file)) in taken:
            raise InputError(
                f"{file} is named twice: the ONNX file, engine, its .json and timing cache "
                "are files apart"
            )
        taken.add(real)


def _metadata(engine_path: Place) -> Path:
    return Path(f"{os.fspath(engine_path)}.json")


def _filled(shape: tuple[int | None, ...], batch: int) -> tuple[int, ...]:
    return tuple(batch if d is None else d for d in shape)


def _check_place(path: Place | None) -> None:
    """Found out before minutes of building, not after."""
    if path is None:
        return
    parent = Path(path).parent
    if Path(path).is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"cannot write {path}: {parent} is no folder that can be written, or the path "
            "is a folder"
        )


def _parse(trt: Any, builder: Any, log: Any, onnx_path: Place) -> tuple[Any, Any]:
    """The network, strongly typed, and its parser, which owns the weights until the engine is
    built.
    """
    creation = trt.NetworkDefinitionCreationFlag
    # 11 takes the flag without effect, so a later version may drop it
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
        raise CheckError(f"TensorRT refuses the profile {batch}")


def _load_cache(config: Any, path: Path) -> Any:
    """Attaches the timings of the file, or none where there is no file or it is of another GPU or
    version.
    """
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _ports(trt: Any, engine: Any) -> dict[str, dict[str, Any]]:
    """The inputs and outputs by name: the shape (-1 is dynamic) and the type."""
    ports: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {}}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        side = "inputs" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "outputs"
        ports[side][name] = {
            "shape": list(engine.get_tensor_shape(name)),
            "dtype": str(engine.get_tensor_dtype(name).name),
        }
    return ports
