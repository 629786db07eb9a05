"""A strict stand-in for `tensorrt`: the part of it that repfx uses and no more, in two flavours,
"10.13" and "11.4".

A name that repfx does not use is missing here, a wrong argument is a TypeError, a new attribute on
an object is an AttributeError. An "engine" is JSON; running it fills every output with the mean of
the inputs."""

from __future__ import annotations

import ast
import ctypes
import enum
import json
import signal
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ROOM = Path(__file__).parent.parent / "repfx" / "lowering" / "tensorrt"
FILES = [ROOM / name for name in ("bindings.py", "builder.py", "engine.py", "run.py")]
# the variables that hold TensorRT objects in those files, by what they are
VARIABLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "fault": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "creation": "NetworkDefinitionCreationFlag",
}
# what only TensorRT for RTX has, and `__version__`, which is no function or class
RTX_ONLY = {
    "ComputeCapability",
    "num_compute_capabilities",
    "set_compute_capability",
}


def surface() -> dict[str, set[str]]:
    """Every name of TensorRT that repfx uses, read from its source: by class, "" for the module's
    own.
    """
    used: dict[str, set[str]] = {"": set()}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                _add(used, node)
            elif isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if (
                        isinstance(base, ast.Attribute)
                        and isinstance(base.value, ast.Name)
                        and base.value.id == "trt"
                    ):
                        names = {f.name for f in node.body if isinstance(f, ast.FunctionDef)} - {
                            "__init__"
                        }
                        used.setdefault(base.attr, set()).update(names)
    return {
        name: {n for n in names if not n.startswith("__") and n not in RTX_ONLY}
        for name, names in used.items()
    }


def _add(used: dict[str, set[str]], node: ast.Attribute) -> None:
    holder = node.value
    if isinstance(holder, ast.Name) and holder.id == "trt":
        used[""].add(node.attr)
    elif isinstance(holder, ast.Name) and holder.id in VARIABLES:
        used.setdefault(VARIABLES[holder.id], set()).add(node.attr)
    elif (
        isinstance(holder, ast.Attribute)
        and isinstance(holder.value, ast.Name)
        and holder.value.id == "trt"
    ):
        used.setdefault(holder.attr, set()).add(node.attr)


@dataclass
class Fake:
    """`module`: to be put where `tensorrt` is imported from. The rest: how it behaves, and what it
    was asked to do.
    """

    module: types.ModuleType
    parse_errors: list[tuple[str, str, str]] = field(default_factory=list)
    build: str = (
        "ok"  # none: gives no engine; interrupt: Ctrl-C arrives; broken: the engine does not load
    )
    stale_cache: bool = False
    runs: bool = True
    report: str = '{"Layers": []}'
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def asked(self, name: str) -> list[tuple[Any, ...]]:
        return [c[1:] for c in self.calls if c[0] == name]


def _typed(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"incompatible function arguments: {value!r}")
    return value


def make(version: str) -> Fake:
    trt = types.ModuleType("tensorrt")
    fake = Fake(trt)
    note = fake.calls.append

    class Strict:
        """New attributes are refused but for those a subclass of the caller makes."""

        settable: tuple[str, ...] = ()

        def __setattr__(self, name: str, value: Any) -> None:
            if (
                type(self).__module__ == __name__
                and not name.startswith("_")
                and name not in self.settable
            ):
                raise AttributeError(f"{type(self).__name__} has no attribute {name}")
            object.__setattr__(self, name, value)

    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1

    class ILogger(Strict):
        INTERNAL_ERROR = Severity.INTERNAL_ERROR
        ERROR = Severity.ERROR

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class IProgressMonitor(Strict):
        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            raise NotImplementedError

        def step_complete(self, phase_name: str, step: int) -> bool:
            raise NotImplementedError

        def phase_finish(self, phase_name: str) -> None:
            raise NotImplementedError

    flags = {"STRONGLY_TYPED": 1 if version.startswith("10") else 0}
    kinds = {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "INT64": 8}
    dtypes = enum.IntEnum("DataType", kinds)
    numpy_of = {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "INT8": np.int8,
        "INT32": np.int32,
        "INT64": np.int64,
    }
    modes = enum.IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
    creation = enum.IntEnum("NetworkDefinitionCreationFlag", flags)
    pools = enum.IntEnum("MemoryPoolType", {"WORKSPACE": 0})
    verbosity = enum.IntEnum("ProfilingVerbosity", {"DETAILED": 2})
    levels = enum.IntEnum("HardwareCompatibilityLevel", {"AMPERE_PLUS": 1})
    forms = enum.IntEnum("LayerInformationFormat", {"JSON": 1})

    class IHostMemory(bytes):
        pass

    class INetworkDefinition(Strict):
        def __init__(self, flags: int) -> None:
            self._flags = flags
            self._ports: dict[Any, Any] = {}

    class ParserError(Strict):
        def __init__(self, name: str, operator: str, text: str) -> None:
            self._said = (name, operator, text)

        def node_name(self) -> str:
            return self._said[0]

        def node_operator(self) -> str:
            return self._said[1]

        def desc(self) -> str:
            return self._said[2]

    class OnnxParser(Strict):
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._logger = (
                _typed(network, INetworkDefinition),
                _typed(logger, ILogger),
            )

        def parse_from_file(self, model: str) -> bool:
            note(("parse_from_file", _typed(model, str)))
            graph = onnx.load(model).graph
            constants = {t.name for t in graph.initializer}
            for side, infos in (("INPUT", graph.input), ("OUTPUT", graph.output)):
                for info in infos:
                    dims = [
                        d.dim_value if d.HasField("dim_value") else -1
                        for d in info.type.tensor_type.shape.dim
                    ]
                    if info.name not in constants:
                        self._network._ports[info.name] = {
                            "mode": side,
                            "shape": dims,
                            "dtype": "FLOAT",
                        }
            return not fake.parse_errors

        @property
        def num_errors(self) -> int:
            return len(fake.parse_errors)

        def get_error(self, index: int) -> ParserError:
            return ParserError(*fake.parse_errors[index])

    class IOptimizationProfile(Strict):
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            for shape in (min, opt, max):
                assert all(_typed(d, int) > 0 for d in _typed(shape, tuple))
            self._shapes[_typed(input, str)] = (min, opt, max)
            note(("set_shape", input, min, opt, max))

    class ITimingCache(Strict):
        def __init__(self, data: bytes) -> None:
            self._data = data

        def serialize(self) -> IHostMemory:
            return IHostMemory(self._data + b"+timed")

    class IBuilderConfig(Strict):
        settable = ("profiling_verbosity", "progress_monitor", "hardware_compatibility_level")
        profiling_verbosity = progress_monitor = hardware_compatibility_level = None

        def __init__(self) -> None:
            self._profiles: list[Any] = []

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if not name.startswith("_"):
                wanted = {
                    "profiling_verbosity": verbosity,
                    "progress_monitor": IProgressMonitor,
                    "hardware_compatibility_level": levels,
                }
                note((name, _typed(value, wanted[name])))

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            note(("set_memory_pool_limit", _typed(pool, pools).name, _typed(pool_size, int)))

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(_typed(profile, IOptimizationProfile))
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            note(("create_timing_cache", _typed(serialized_timing_cache, bytes)))
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            _typed(ignore_mismatch, bool)
            return not (fake.stale_cache and _typed(cache, ITimingCache)._data)

    class Builder(Strict):
        def __init__(self, logger: Any) -> None:
            self._logger = _typed(logger, ILogger)

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            note(("create_network", _typed(flags, int)))
            return INetworkDefinition(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> IHostMemory | None:
            monitor = _typed(config, IBuilderConfig).progress_monitor
            monitor.phase_start("Building", None, 3)
            for step in range(3):
                if fake.build == "interrupt" and step == 1:
                    signal.raise_signal(signal.SIGINT)  # to this thread, so at once
                if not monitor.step_complete("Building", step):
                    note(("stopped", step))
                    monitor.phase_finish("Building")
                    return None
            monitor.phase_finish("Building")
            dynamic = {
                n for n, p in network._ports.items() if p["mode"] == "INPUT" and -1 in p["shape"]
            }
            profile = config._profiles[0]._shapes if config._profiles else {}
            if fake.build == "none" or dynamic != set(profile):
                self._logger.log(
                    Severity.ERROR, "could not find any implementation for node Conv_3"
                )
                return None
            if fake.build == "broken":
                return IHostMemory(b"no engine")
            return IHostMemory(json.dumps({"ports": network._ports, "profile": profile}).encode())

    class EngineInspector(Strict):
        def get_engine_information(self, format: Any) -> str:
            _typed(format, forms)
            return fake.report

    class ICudaEngine(Strict):
        def __init__(self, said: dict[str, Any]) -> None:
            self._ports, self._profile = said["ports"], said["profile"]

        @property
        def num_io_tensors(self) -> int:
            return len(self._ports)

        def get_tensor_name(self, index: int) -> str:
            return list(self._ports)[_typed(index, int)]

        def get_tensor_mode(self, name: str) -> Any:
            return modes[self._ports[name]["mode"]]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self._ports[name]["shape"])

        def get_tensor_dtype(self, name: str) -> Any:
            return dtypes[self._ports[name]["dtype"]]

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            assert profile_index == 0
            return [tuple(s) for s in self._profile.get(name, [self._ports[name]["shape"]] * 3)]

        def create_engine_inspector(self) -> EngineInspector:
            return EngineInspector()

        def create_execution_context(self) -> IExecutionContext:
            return IExecutionContext(self)

    class IExecutionContext(Strict):
        def __init__(self, engine: Any) -> None:
            self._engine = engine
            self._shapes: dict[str, Any] = {}
            self._addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            self._shapes[name] = _typed(shape, tuple)
            return len(shape) == len(low) and all(
                a <= d <= b for a, d, b in zip(low, shape, high, strict=True)
            )

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            batch = next(iter(self._shapes.values()))[0]
            return self._shapes.get(name) or tuple(
                batch if d == -1 else d for d in self._engine.get_tensor_shape(name)
            )

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = _typed(memory, int)
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            _typed(stream_handle, int)
            assert set(self._addresses) == set(self._engine._ports)
            note(("execute_async_v3",))
            mean = np.mean([_memory(self, n, numpy_of).mean() for n in self._shapes])
            for name in set(self._addresses) - set(self._shapes):
                _memory(self, name, numpy_of)[...] = mean
            return fake.runs

    class Runtime(Strict):
        def __init__(self, logger: Any) -> None:
            self._logger = _typed(logger, ILogger)

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            try:
                return ICudaEngine(json.loads(_typed(serialized_engine, bytes)))
            except ValueError:
                self._logger.log(Severity.ERROR, "the engine plan file is not compatible")
                return None

    def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool:
        _typed(logger, ILogger), _typed(namespace, str)
        return True

    parts: list[Any] = [
        ILogger,
        IProgressMonitor,
        INetworkDefinition,
        ParserError,
        OnnxParser,
        IOptimizationProfile,
        ITimingCache,
        IBuilderConfig,
        Builder,
        EngineInspector,
        ICudaEngine,
        IExecutionContext,
        Runtime,
        modes,
        creation,
        pools,
        verbosity,
        levels,
        forms,
    ]
    used = surface()
    for part in parts:
        if part.__name__ in used[""]:
            setattr(trt, part.__name__, part)
    trt.init_libnvinfer_plugins = init_libnvinfer_plugins  # type: ignore[attr-defined]
    trt.__version__ = f"{version}.0"  # type: ignore[attr-defined]
    CLASSES[version] = {part.__name__: part for part in parts}
    return fake


CLASSES: dict[str, dict[str, Any]] = {}


def _memory(context: Any, name: str, numpy_of: dict[str, Any]) -> np.ndarray:
    shape, kind = (
        context.get_tensor_shape(name),
        numpy_of[context._engine.get_tensor_dtype(name).name],
    )
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    raw = (ctypes.c_char * size).from_address(context._addresses[name])
    return np.frombuffer(raw, dtype=kind).reshape(shape)
