"""Other tools against repfx at W8A8, on the merged nets of study (e) and the same 1 024 images.

    pip install nvidia-modelopt requests torchao nncf openvino aimet-torch
    python examples/study/peers.py --data cifar10.zip

The nets of ONNX Runtime's quantizer and ours run in ONNX Runtime, NNCF's in OpenVINO, and the
others in the simulation that the tool makes in torch. A tool that is not installed is named and
left out."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from common import REPAPQ, Accuracy, Results, calibration, command, pictures, trained
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from ptq import NETS
from torch import Tensor, nn

import repfx
from repfx.lowering.runtimes.run import session
from repfx.passes import Ptq


class Reader(CalibrationDataReader):
    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self.feeds = iter([{name: x.numpy()} for x in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


class Call(nn.Module):
    """A module that calls a function. One output is returned alone, several as a list."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        found = self.function(x.contiguous())
        if isinstance(found, Tensor):
            return found
        outputs = [torch.from_numpy(v.copy()) if not isinstance(v, Tensor) else v for v in found]
        return outputs[0] if len(outputs) == 1 else outputs


def in_runtime(path: Path, runtime: str = "onnxruntime") -> nn.Module:
    run = session(runtime, path, threads=torch.get_num_threads())
    return Call(lambda x: run((x,)))


def onnxruntime(
    method: CalibrationMethod, merged: nn.Module, batches: list[Tensor], folder: Path
) -> nn.Module:
    plain = repfx.lower(merged, folder / "float.onnx", example=batches[0]).onnx
    source = onnx.load(plain).graph.input[0].name
    quantize_static(
        str(plain),
        str(folder / "theirs.onnx"),
        Reader(source, batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
    )
    return in_runtime(folder / "theirs.onnx")


def nncf(merged: nn.Module, batches: list[Tensor], folder: Path) -> nn.Module:
    import nncf
    import openvino

    plain = repfx.lower(merged, folder / "float.onnx", example=batches[0]).onnx
    model = openvino.Core().read_model(str(plain))
    quantized = nncf.quantize(
        model, nncf.Dataset([x.numpy() for b in batches for x in b.split(1)]), subset_size=1024
    )
    compiled = openvino.Core().compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return Call(lambda x: [*compiled([x.numpy()]).values()])


def modelopt(config: str, merged: nn.Module, batches: list[Tensor], folder: Path) -> nn.Module:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(
        copy.deepcopy(merged), getattr(mtq, config), forward_loop=lambda m: [m(x) for x in batches]
    )


def torchao(merged: nn.Module, batches: list[Tensor], folder: Path) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config()
    )
    shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
    merged = copy.deepcopy(merged).to(memory_format=torch.contiguous_format)
    # Strict, because the quantizer finds convolutions by notes that only a strict export makes.
    exported = torch.export.export(merged, (batches[0],), dynamic_shapes=shapes, strict=True)
    prepared = prepare_pt2e(exported.module(), quantizer)
    with torch.no_grad():
        for x in batches:
            prepared(x)
    converted = convert_pt2e(prepared)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in merged.modules())
    coded = sum("dequantize_per_channel" in str(n.target) for n in converted.graph.nodes)
    assert coded == layers, f"{coded} of {layers} layers were quantized"
    return Call(lambda x: converted(x))


def aimet(merged: nn.Module, batches: list[Tensor], folder: Path) -> nn.Module:
    from aimet_torch.quantsim import QuantizationSimModel

    sim = QuantizationSimModel(
        copy.deepcopy(merged), dummy_input=batches[0], default_param_bw=8, default_output_bw=8
    )
    sim.compute_encodings(lambda model, _: [model(x) for x in batches], None)
    return sim.model


def ours(
    seed: int, iterations: int, net: nn.Module, batches: list[Tensor], folder: Path
) -> nn.Module:
    model = repfx.transform(net, [Ptq(weights="mse"), "qprep"], target="onnxruntime")
    repfx.reconstruct(model, batches, iterations=iterations, seed=seed, **REPAPQ)
    model = repfx.transform(model, ["fuse"], target="onnxruntime")
    return in_runtime(
        repfx.lower(model, folder / "ours.onnx", example=batches[0], target="onnxruntime").onnx
    )


PEERS: dict[str, Callable[[nn.Module, list[Tensor], Path], nn.Module]] = {
    "onnxruntime minmax": partial(onnxruntime, CalibrationMethod.MinMax),
    "onnxruntime percentile": partial(onnxruntime, CalibrationMethod.Percentile),
    "onnxruntime entropy": partial(onnxruntime, CalibrationMethod.Entropy),
    "nncf": nncf,
    "modelopt max": partial(modelopt, "INT8_DEFAULT_CFG"),
    "modelopt smoothquant": partial(modelopt, "INT8_SMOOTHQUANT_CFG"),
    "torchao pt2e": torchao,
    "aimet": aimet,
}


def main() -> None:
    parser = command(__doc__, "peers", seeds=[0, 1, 2])
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = pictures(args.data)
    accuracy, batches, results = Accuracy(test), calibration(args.data), Results(args.results)
    for seed, name in [(s, n) for s in args.seeds for n in args.nets]:
        make, l2 = NETS[name]
        options: dict[str, Any] = {"epochs": args.epochs, "lr": 0.1, "batch": 128, "l2": l2}
        net = trained(args.runs / "mini", name, make, "classification", train, seed, **options)
        merged = repfx.transform(net, ["fuse"])
        methods = PEERS | {"repfx repapq": partial(ours, seed, args.iterations)}
        for method, run in methods.items():
            if results.has(net=name, seed=seed, method=method):
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:
                    top1 = accuracy(
                        run(
                            net if run is methods["repfx repapq"] else merged, batches, Path(folder)
                        )
                    )
            except ImportError as error:
                print(f"{method} is left out: {error}")
                continue
            results.add(net=name, seed=seed, method=method, top1=top1)


if __name__ == "__main__":
    main()
