"""Quantizes one net with NVIDIA's ModelOpt; `rtx_peers.py` runs it with the Python that has it.

    python examples/rtx_modelopt.py onnx  net.onnx  images.npy  int8.onnx
    python examples/rtx_modelopt.py torch net.pt    images.npy  int8.onnx

Both use its default INT8 recipe. ModelOpt pins other versions of ONNX and ONNX Runtime than repfx
is tested with, so it needs an environment of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np


def by_onnx(plain: str, images: Any, goal: str) -> None:
    from modelopt.onnx.quantization import quantize

    quantize(
        plain,
        quantize_mode="int8",
        calibration_data=images,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=goal,
    )


def by_torch(saved: str, images: Any, goal: str) -> None:
    import modelopt.torch.quantization as mtq
    import torch

    import repfx

    model, x = repfx.load(saved).eval(), torch.from_numpy(images)
    quantized = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda net: net(x))
    names, free = ["x"], {"x": {0: "batch"}}
    plain = torch.nn.Sequential(quantized)  # the exporter takes .graph for TorchScript's
    with torch.no_grad():
        torch.onnx.export(
            plain,
            (x,),
            goal,
            dynamo=False,
            opset_version=17,
            input_names=names,
            dynamic_axes=free,
        )


if __name__ == "__main__":
    form, source, images, goal = sys.argv[1:]
    {"onnx": by_onnx, "torch": by_torch}[form](source, np.load(images), goal)
    if not Path(goal).is_file():
        sys.exit(f"ModelOpt wrote no {goal}")
