"""One call for every runtime on this machine: session(runtime, file)(inputs) -> outputs."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from repfx.errors import InputError, MissingPart, unknown
from repfx.lowering.runtimes.sessions import SESSIONS, openvino_core

Session = Callable[[Sequence[Tensor]], list[Tensor]]
Model = str | os.PathLike[str] | onnx.ModelProto


def write_ir(model: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Converts an ONNX file to OpenVINO IR: `path` (.xml), with its weights (.bin) beside it.

    Raises InputError for another suffix or a path that cannot be written, MissingPart without
    OpenVINO."""
    goal = Path(path)
    if goal.suffix.lower() != ".xml":
        raise InputError(f"OpenVINO IR is an .xml file with a .bin beside it, not {path}")
    openvino = openvino_module()
    part = goal.with_name(f".{goal.stem}.part.xml")
    try:
        read = openvino_core().read_model(str(model))
        openvino.save_model(read, str(part), compress_to_fp16=False)
        os.replace(part.with_suffix(".bin"), goal.with_suffix(".bin"))
        os.replace(part, goal)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {path}: {str(error).strip().splitlines()[-1]}") from error
    finally:
        part.unlink(missing_ok=True)
        part.with_suffix(".bin").unlink(missing_ok=True)


RUNTIMES = tuple(SESSIONS)


def session(name: str, model: Model, optimize: bool = True, threads: int | None = None) -> Session:
    """A session of the named runtime: a function from inputs to outputs.

    With `optimize`, ONNX Runtime rounds biases to int32, even where they are float in the file.
    OpenVINO always optimizes. Raises InputError for an unknown runtime, MissingPart for one that is
    not installed."""
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    if name == "openvino":
        openvino_module()
    run = SESSIONS[name](
        model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model),
        optimize,
        threads,
    )
    return lambda inputs: [
        torch.from_numpy(np.asarray(o)) for o in run([x.detach().cpu().numpy() for x in inputs])
    ]


def installed() -> list[str]:
    """The names of the runtimes that are installed."""
    return [name for name in RUNTIMES if importlib.util.find_spec(name) is not None]


def openvino_module() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingPart("OpenVINO is not installed: pip install repfx[openvino]") from error
    logging.getLogger("openvino").setLevel(logging.ERROR)
    return openvino
