"""Sessions of ONNX Runtime and OpenVINO on numpy arrays. Run as a program it is a process of its
own for one comparison:

    python sessions.py FOLDER

runs FOLDER/0/model.onnx on inputs.npz beside it and writes what it gives as outputs.npz, and so on.
It needs nothing of repfx and no torch, so that it starts quickly, also on a processor that is
emulated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def in_onnxruntime(model: str | bytes, optimize: bool = True, threads: int | None = None) -> Run:
    """On the CPU; without `optimize` each operator runs as written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # idle threads would slow others' turns
    # Else it rewrites int8 activations as uint8, and from opset 21 on fails where a Q/DQ pair was
    # copied across a pool.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def in_openvino(model: str | bytes, optimize: bool = True, threads: int | None = None) -> Run:
    """On the CPU, in float32 where the file is; its plugin always optimizes."""
    import openvino

    core = openvino.Core()
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
