"""lower: ONNX Q/DQ -> a TensorRT engine, by TensorRT 10 or 11 or by TensorRT for RTX.

The network is strongly typed: every layer has the precision that the file gives it, so there are no
precision flags and no calibrators. TensorRT 10 and 11 build on the GPU that the engine is for; that
path has been checked against their bindings only, never on a GPU. TensorRT for RTX builds on any
machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from repfx.errors import CheckError, InputError
from repfx.files.store import write_whole
from repfx.lowering.onnx.external import elsewhere, require
from repfx.lowering.onnx.index import Index, known
from repfx.lowering.tensorrt import builder as builds
from repfx.lowering.tensorrt import rtx
from repfx.lowering.tensorrt.bindings import Place, joined, log_of, present, usable, watched
from repfx.lowering.tensorrt.inspector import count_layers
from repfx.lowering.tensorrt.plan import Plan
from repfx.lowering.tensorrt.run import Trial, latency, run, tried

__all__ = ["Engine", "Profile", "Trial", "build", "latency", "run", "tried", "trtexec"]


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
    by precision ("?" where it is not reported); of TensorRT for RTX, the convolutions and matrix
    products. `reformats`: how many more layers only change a layout. `version`: the TensorRT
    version that built the engine and can run it. `pointwise`, `traffic`: the kernels that compute
    each value on its own, and the bytes of activations that all kernels read and write for one
    image, where TensorRT for RTX tells them. `runtime`: which TensorRT it is."""

    path: Path
    metadata: Path
    layers: dict[str, int]
    reformats: int
    version: str
    pointwise: int | None = None
    traffic: int | None = None
    runtime: str = "TensorRT"

    def __str__(self) -> str:
        layers = ", ".join(f"{n} {name}" for name, n in sorted(self.layers.items()))
        text = f"{self.runtime} {self.version}: {layers}; {self.reformats} reformats"
        if self.pointwise is not None and self.traffic is not None:
            text += f", {self.pointwise} pointwise kernels, {self.traffic / 1e6:.1f} MB an image"
        return text


def build(
    onnx_path: Place,
    engine_path: Place,
    *,
    profile: Profile | None = None,
    workspace_gib: float = 4.0,
    timing_cache: Place | None = None,
    progress: bool = False,
    hardware_compatible: bool = False,
    compute_capability: Sequence[str] = (),
) -> Engine:
    """Builds an engine from an ONNX file, with a JSON file beside it, `engine_path` + ".json".

    TensorRT 10 or 11 builds it for the GPU of this machine, if both are there. Otherwise TensorRT
    for RTX does, also if a `compute_capability` is given: 8.0, 8.6, 8.9, 12.0 or 12.1, or several.
    With none it builds for all that it knows.

    `profile`: the sizes of the batch, the only dimension that may be dynamic; 1, 8, 32 when None.
    `workspace_gib`: the most device memory one layer may use, in GiB. `timing_cache`: a file that
    is read if it exists and written after the build. `hardware_compatible`: the engine also runs on
    other GPUs, from Ampere on, but slower; not with TensorRT for RTX.

    Raises InputError where the file cannot be used (operators are named) or a path cannot be
    written; MissingPart, with the trtexec command, without any TensorRT that can build here;
    CheckError where none is built; KeyboardInterrupt on Ctrl-C. In each case no engine file is
    written."""
    profile = profile or Profile()
    order = _Order(onnx_path, profile, workspace_gib, hardware_compatible)
    wanted = rtx.capabilities(compute_capability)
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
    if wanted or (rtx.module() and not usable()):
        return _ahead(order, goal, wanted, timing_cache, progress)
    trt, gpu = present(
        f". {rtx.NAME} builds engines without a GPU: pip install 'repfx[rtx]'. On a machine with "
        f"TensorRT and a GPU, this builds the same engine:\n{line}"
    )
    log = log_of(trt)
    log.errors.clear()
    plan, timings = _plan(trt, log, order, timing_cache, progress)
    found = _described(trt, log, plan, order)
    about = {"tensorrt": trt.__version__, "gpu": gpu, **order.told(), **found}
    _write(goal, plan, about, timing_cache, timings)
    return Engine(goal, beside, found["layers"], found["reformats"], str(trt.__version__))


def _write(
    goal: Path, plan: bytes, about: dict[str, Any], timing_cache: Place | None, timings: bytes
) -> None:
    if timing_cache is not None:
        write_whole(timing_cache, lambda part: Path(part).write_bytes(timings))
    write_whole(goal, lambda part: Path(part).write_bytes(plan))
    text = json.dumps(about, indent=1) + "\n"
    write_whole(_metadata(goal), lambda part: Path(part).write_text(text))


def _ahead(
    order: _Order, goal: Path, wanted: list[str], timing_cache: Place | None, progress: bool
) -> Engine:
    """Builds the engine with TensorRT for RTX, for GPUs that need not be here."""
    if order.hardware_compatible:
        raise InputError(
            f"{rtx.NAME} has no hardware_compatible; name each compute_capability, or none for all"
        )
    file = None if timing_cache is None else Path(timing_cache)
    known = b"" if file is None or not file.is_file() else file.read_bytes()
    job = rtx.Job(
        Path(order.onnx),
        _sizes(_inputs(_read(order.onnx)), order.profile),
        order.workspace_gib,
        wanted,
        None if file is None else known,
        progress,
    )
    built = rtx.build(job)
    plan = built.plan
    layers = _counted(plan, order.onnx)
    about = {
        "tensorrt_rtx": built.version,
        "compute_capability": wanted or "all",
        **order.told(),
        "layers": layers,
        "reformats": plan.reformats,
        "pointwise": plan.pointwise,
        "bytes_per_image": plan.traffic,
        "kernels": [asdict(kernel) for kernel in plan.kernels],
    }
    _write(goal, built.engine, about, timing_cache, built.cache)
    return Engine(
        goal,
        _metadata(goal),
        layers,
        plan.reformats,
        built.version,
        plan.pointwise,
        plan.traffic,
        rtx.NAME,
    )


def _counted(plan: Plan, onnx_path: Place) -> dict[str, int]:
    """The file's convolutions and matrix products by the precision they are computed in."""
    names = [layer.node.name for layer in Index(onnx.load(os.fspath(onnx_path))).layers]
    if not names or not all(names):  # layers without names, or in a subgraph: count kernels
        return plan.layers
    return dict(sorted(Counter(plan.precisions(names).values()).items()))


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
    network, parser, refused = builds.parse(trt, builder, log, os.fspath(order.onnx))
    if refused:
        raise InputError(
            f"TensorRT {trt.__version__} cannot read {order.onnx}:{rtx.listed(refused)}"
        )
    config = builds.configure(trt, builder, int(order.workspace_gib * 1024))
    if order.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if not builds.add_profile(builder, config, _sizes(_inputs(_read(order.onnx)), order.profile)):
        raise CheckError(f"TensorRT rejects the profile {order.profile}")
    # The cache must outlive the build.
    cache = None
    if timing_cache is not None:
        file = Path(timing_cache)
        cache = builds.load_cache(config, file.read_bytes() if file.is_file() else b"")
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


def _sizes(inputs: dict[str, tuple[int | None, ...]], batch: Profile) -> builds.Shapes:
    """The smallest, usual and largest size of each dynamic input."""
    return {
        name: [list(_filled(shape, n)) for n in (batch.min, batch.opt, batch.max)]
        for name, shape in inputs.items()
        if None in shape
    }


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
