"""Lints the ONNX files that other tools write of a net of RepVGG blocks, as trained and merged.

    pip install nvidia-modelopt requests torchao brevitas onnxoptimizer aimet-torch nncf
    python examples/peers_lint.py

A tool that is not installed, or whose export fails, is named and left out.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import repfx
from repfx.blocks import RepVGG
from repfx.data.vision import torchvision
from repfx.testing import randomise


def net() -> nn.Module:
    layers = [
        RepVGG(3, 8, 3, 1, 1),
        nn.ReLU(),
        RepVGG(8, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
    ]
    return randomise(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    )


def legacy(model: nn.Module, x: Tensor, path: Path, opset: int = 17) -> None:
    torch.onnx.export(
        model, (x,), str(path), dynamo=False, opset_version=opset, do_constant_folding=True
    )


def modelopt(model: nn.Module, x: Tensor, path: Path) -> None:
    import modelopt.torch.quantization as mtq

    legacy(
        mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, forward_loop=lambda m: m(x)),
        x,
        path,
    )


def torchao(quantizer: Callable[[], Any], model: nn.Module, x: Tensor, path: Path) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(model, (x,), strict=True).module(), quantizer())
    prepared(x)
    # The weights stay operators of the graph. With folding, the default, the files fail the same
    # rules except Q09.
    torch.onnx.export(
        convert_pt2e(prepared, fold_quantize=False),
        (x,),
        str(path),
        dynamo=True,
        opset_version=20,
        external_data=False,
    )


def x86() -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())


def xnnpack() -> Any:
    from torchao.testing.pt2e._xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def brevitas(model: nn.Module, x: Tensor, path: Path) -> None:
    from brevitas.export import export_onnx_qcdq
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    quantized = quantize(preprocess_for_quantize(copy.deepcopy(model), trace_model=True))
    quantized(x)
    export_onnx_qcdq(quantized, x, export_path=str(path), opset_version=17, dynamo=False)


def aimet(model: nn.Module, x: Tensor, path: Path) -> None:
    import aimet_torch.onnx
    from aimet_torch.quantsim import QuantizationSimModel

    sim = QuantizationSimModel(
        copy.deepcopy(model), dummy_input=x, default_param_bw=8, default_output_bw=8
    )
    sim.compute_encodings(lambda m, _: m(x), None)
    aimet_torch.onnx.export(sim, (x,), str(path), dynamo=False, opset_version=17)


class Once(CalibrationDataReader):
    def __init__(self, x: Tensor) -> None:
        self.feeds = iter([{"x": x.numpy()}])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def onnxruntime(model: nn.Module, x: Tensor, path: Path) -> None:
    plain = path.with_suffix(".float.onnx")
    torch.onnx.export(model, (x,), str(plain), dynamo=False, opset_version=17, input_names=["x"])
    quantize_static(
        str(plain),
        str(path),
        Once(x),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True},
    )


def nncf(model: nn.Module, x: Tensor, path: Path) -> None:
    import nncf
    import onnx

    plain = path.with_suffix(".float.onnx")
    torch.onnx.export(model, (x,), str(plain), dynamo=False, opset_version=17, input_names=["x"])
    onnx.save(nncf.quantize(onnx.load(plain), nncf.Dataset([{"x": x.numpy()}])), path)


def ours(model: nn.Module, x: Tensor, path: Path) -> None:
    int8 = repfx.calibrate(repfx.transform(model, ["ptq"], example=x), [x])
    repfx.lower(int8, path, example=x)


TOOLS: dict[str, Callable[[nn.Module, Tensor, Path], None]] = {
    "repfx": ours,
    "onnxruntime": onnxruntime,
    "modelopt": modelopt,
    "torchao pt2e, X86": partial(torchao, x86),
    "torchao pt2e, XNNPACK": partial(torchao, xnnpack),
    "brevitas": brevitas,
    "aimet": aimet,
    "nncf": nncf,
}


def main() -> None:
    torchvision()  # AIMET imports torchvision
    x = torch.randn(2, 3, 16, 16)
    table = Table("tool", "net", "errors and warnings (how often)")
    for tool, export in TOOLS.items():
        for form in ("trained", "merged"):
            model = net() if form == "trained" else repfx.transform(net(), ["fuse"], example=x)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model.onnx"
                    export(model, x, path)
                    found = Counter(
                        f"{f.severity} {f.rule}" for f in repfx.lint(path) if f.severity in "EW"
                    )
                text = ", ".join(f"{name} ({n})" for name, n in sorted(found.items())) or "none"
            except Exception as error:  # another tool may raise any error
                text = (
                    f"left out: {type(error).__name__}: "
                    f"{str(error).strip().splitlines()[0][:80] if str(error) else ''}"
                )
            table.add_row(tool, form, text)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
