"""Sessions of ONNX Runtime and OpenVINO on numpy arrays, also as a program of its own.

    python sessions.py FOLDER

runs FOLDER/0/model.onnx on the inputs.npz beside it and writes outputs.npz there, then FOLDER/1 and
so on. It imports neither repfx nor torch, so that it starts quickly even on an emulated processor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def in_onnxruntime(model: str | bytes, optimize: bool = True, threads: int | None = None) -> Run:
    """A session on the CPU; without `optimize` each operator runs as written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = 3
    # Threads that spin while idle would slow down whatever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without this it rewrites int8 activations as uint8, and from opset 21 on fails where a Q/DQ
    # pair was copied across a pool.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


@cache
def openvino_core() -> Any:
    """The one core of this process, which is never freed.

    Each core of OpenVINO 2026.4 sets up a stack for signals. If two are freed in the order in which
    they were made, the stack that is left is no longer in memory, and Ctrl-C ends the process with
    a segmentation fault."""
    import openvino

    return openvino.Core()


def in_openvino(model: str | bytes, optimize: bool = True, threads: int | None = None) -> Run:
    """A session on the CPU, which runs float layers in float32 and always optimizes."""
    core = openvino_core()
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(core.read_model(model), "CPU", config)
    request = compiled.create_infer_request()

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = request.infer([np.ascontiguousarray(x) for x in inputs])
        return [np.array(found[o]) for o in compiled.outputs]

    return run


SESSIONS: dict[str, Callable[..., Run]] = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text())
    for at in (folder / str(i) for i in range(task["files"])):
        held = np.load(at / "inputs.npz")
        outputs = SESSIONS[task["runtime"]](str(at / "model.onnx"))(
            [held[name] for name in held.files]
        )
        np.savez(at / "outputs.npz", *outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
