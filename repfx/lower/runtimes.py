"""Runtimes that execute an ONNX file on this machine, behind one call: session(file)(inputs) -> outputs."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from repfx.errors import InputError, MissingPart, unknown

Session = Callable[[Sequence[Tensor]], list[Tensor]]
Model = str | os.PathLike[str] | onnx.ModelProto


def onnxruntime_session(model: Model, optimize: bool = True, threads: int | None = None) -> Session:
    """In ONNX Runtime on the CPU; without `optimize` each operator runs as written.

    Optimized, convolutions run on integers and biases are rounded to int32, which the file does not ask for.
    """
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow others' turns
    # Else it rewrites int8 activations as uint8, and from opset 21 on fails where a Q/DQ pair was copied across a pool.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    given = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session: Any = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.asarray(o)) for o in session.run(None, feeds)]

    return run


def openvino_session(model: Model, optimize: bool = True, threads: int | None = None) -> Session:
    """In OpenVINO on the CPU, in float32 where the file is; its plugin always optimizes. Raises MissingPart without it."""
    openvino = openvino_module()
    core = openvino.Core()
    given = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(core.read_model(given), "CPU", config)
    request = compiled.create_infer_request()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        found = request.infer([np.ascontiguousarray(x.detach().cpu().numpy()) for x in inputs])
        return [torch.from_numpy(np.array(found[o])) for o in compiled.outputs]

    return run


def write_ir(model: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Writes an ONNX file as OpenVINO IR: `path` (.xml) and its weights (.bin) beside it.

    Raises InputError for another suffix or a path that cannot be written, MissingPart without OpenVINO.
    """
    goal = Path(path)
    if goal.suffix.lower() != ".xml":
        raise InputError(f"OpenVINO IR is an .xml file with its .bin beside it, not {path}")
    openvino = openvino_module()
    part = goal.with_name(f".{goal.stem}.part.xml")
    try:
        openvino.save_model(openvino.Core().read_model(str(model)), str(part), compress_to_fp16=False)
        os.replace(part.with_suffix(".bin"), goal.with_suffix(".bin"))
        os.replace(part, goal)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {path}: {str(error).strip().splitlines()[-1]}") from error
    finally:
        part.unlink(missing_ok=True)
        part.with_suffix(".bin").unlink(missing_ok=True)


RUNTIMES: dict[str, Callable[..., Session]] = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}


def session(name: str, model: Model, optimize: bool = True, threads: int | None = None) -> Session:
    """A session by the runtime's name. Raises InputError for an unknown one, MissingPart for one that is not installed."""
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    return RUNTIMES[name](model, optimize, threads)


def installed() -> list[str]:
    """The runtimes that can run here."""
    return [name for name in RUNTIMES if importlib.util.find_spec(name) is not None]


def openvino_module() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingPart("OpenVINO is not installed: pip install repfx[openvino]") from error
    logging.getLogger("openvino").setLevel(logging.ERROR)
    return openvino
