"""Parses an ONNX file and builds an engine, with any TensorRT module that it is given.

As a script it does so in a process of its own, because TensorRT for RTX may die on a bad file:

    python -P builder.py JOB.json

It prints one JSON object a line: what is being done, and at the end what came of it. It imports the
standard library only, so that a process starts quickly."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

Shapes = dict[str, list[list[int]]]  # by input: the smallest, usual and largest


def parse(trt: Any, builder: Any, log: Any, onnx: str) -> tuple[Any, Any, list[str]]:
    """The strongly typed network, its parser, which owns the weights, and what the parser refuses.

    The network is whole only if nothing is refused."""
    creation = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 ignores the flag, so a later version may drop it.
    flags = 1 << int(creation.STRONGLY_TYPED) if hasattr(creation, "STRONGLY_TYPED") else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(onnx):
        return network, parser, []
    found = []
    for i in range(parser.num_errors):
        fault = parser.get_error(i)
        found.append(f"node {fault.node_name()!r} ({fault.node_operator()}): {fault.desc()}")
    return network, parser, list(dict.fromkeys(found)) or [*log.errors, "it gives no reason"][:1]


def configure(trt: Any, builder: Any, workspace_mib: int) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return config


def add_profile(builder: Any, config: Any, shapes: Shapes) -> bool:
    """Whether the sizes of the dynamic inputs are accepted."""
    if not shapes:
        return True
    profile = builder.create_optimization_profile()
    for name, sizes in shapes.items():
        profile.set_shape(name, *(tuple(size) for size in sizes))
    return bool(config.add_optimization_profile(profile) >= 0)


def load_cache(config: Any, data: bytes) -> Any:
    """Attaches a timing cache, an empty one if this was made on another GPU or version."""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _tell(**event: object) -> None:
    print(json.dumps(event), flush=True)


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, and the list of the engine's layers, which the builder logs at the end."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)
                _tell(error=msg)  # it may die next
            elif "LayerType:" in msg:
                self.layers += [line for line in msg.splitlines() if "LayerType:" in line]

    return Log()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            _tell(phase=phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            _tell(phase=phase_name, step=step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            _tell(phase=phase_name, step=None)

    return Monitor()


def main(job: dict[str, Any]) -> None:
    """Builds job["onnx"] into job["plan"] with the module job["module"]."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits ends this one
    trt = importlib.import_module(job["module"])
    _tell(version=str(trt.__version__))
    log = _log(trt)
    builder = trt.Builder(log)
    network, parser, refused = parse(trt, builder, log, job["onnx"])
    if refused:
        _tell(refused=refused)
        return
    config = configure(trt, builder, job["workspace_mib"])
    wanted = job["compute_capability"]
    if wanted:
        config.num_compute_capabilities = len(wanted)
        for i, name in enumerate(wanted):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    if not add_profile(builder, config, job["shapes"]):
        _tell(failed=["it rejects the sizes of the batch"])
        return
    cache = load_cache(config, Path(job["cache"]).read_bytes()) if job["cache"] else None
    config.progress_monitor = monitor = _monitor(trt)
    plan = builder.build_serialized_network(network, config)
    del parser, monitor
    if plan is None:
        _tell(failed=log.errors)
        return
    Path(job["plan"]).write_bytes(plan)
    if cache is not None:
        Path(job["cache"]).write_bytes(cache.serialize())
    _tell(layers=log.layers)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
