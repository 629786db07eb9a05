"""Study (h), detection: QARepVGG's Table 8 and RepAPQ's detector, on a small net of the same form.

python examples/study/detection.py                    # scikit-learn's digits on textures, 64 x 64
python examples/study/detection.py --data bccd.zip    # blood cells, 256 x 320

The net is that of examples/detector. Each variant is trained in float, then merged and quantized:
after training by ranges and by RepAPQ, or by two more epochs of RepQ. (S1 is S0 with plain weight
decay. YOLOv6 has that anyway, so here they are one.) `Plain` is the net of one
convolution and norm each, `Merged` the S0 net, merged before the two epochs. AP is COCO's, in
percent. `--peers` adds other tools at W8A8, on the merged nets (see peers.py), and what repfx
writes for the same runtime."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import REPAPQ, Results, command, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader

import repfx
from repfx.blocks import QARepVGG
from repfx.data.boxes import Boxes, train_and_valid
from repfx.data.packaged import digit_scenes
from repfx.passes import Ptq, RepQ
from repfx.training import Detection

sys.path.insert(0, str(Path(__file__).parents[1] / "detector"))
from net import Detector, plain

VARIANTS = ("S0", "S4", "S2", "Plain")
RANGES = ((8, "max"), (6, "max"), (5, "max"), (8, "mse"), (6, "mse"), (5, "mse"))
FLOAT: dict[str, Any] = {"optimizer": "adamw", "lr": 0.004, "weight_decay": 0.01, "warmup": 1}
FINE: dict[str, Any] = {**FLOAT, "lr": 0.0005, "warmup": 0, "epochs": 2}


class Data:
    """What a study trains on, tests with and calibrates on: 512 training images, not augmented."""

    def __init__(self, path: Path | None) -> None:
        self.task = Detection(flip=path is not None)
        self.train: Any
        self.test: Any
        if path is None:
            self.train, self.test = digit_scenes(images=(3000, 500))
            self.classes, self.down, self.batch, self.epochs = 10, 2, 32, 10
            self.images = list(self.train[0][:512].split(64))
        else:
            same: dict[str, Any] = {"size": (256, 320), "cache": True}
            self.train, self.test = train_and_valid(path, **same)
            self.classes, self.down, self.batch, self.epochs = len(self.train.classes), 4, 16, 30
            still = Boxes(path, "train.json", **same)
            self.images = [x for x, _ in DataLoader(still, 32)]

    def tests(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.test, tuple):
            return zip(*(t.split(50) for t in self.test), strict=True)
        return iter(DataLoader(self.test, 24))

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        metric = self.task.metric()
        model.eval()
        for batch in self.tests():
            metric.update(model, batch)
        return {name: round(100 * float(v), 2) for name, v in metric.compute().items()}


def tuned(model: Any, data: Data, args: Any, name: str, seed: int) -> nn.Module:
    """Two more epochs at an eighth of the rate."""
    options = {"batch": data.batch, **FINE}
    return trained(args.runs, name, lambda: model, data.task, data.train, seed, **options)


def ways(net: nn.Module, data: Data, args: Any, of: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The quantized nets of one trained net, by name."""
    example, name, seed = data.images[0][:2], of["variant"], of["seed"]

    def ranged(bits: int, method: str, bias: bool = False) -> Any:
        model = repfx.transform(net, [Ptq(bits=bits)], example=example)
        return repfx.calibrate(model, data.images, method=method, bias=bias)

    def learned(bits: int, paper: bool) -> Any:
        passes = [Ptq(bits=bits, weights="mse"), *(["qprep"] if paper else [])]
        model = repfx.transform(net, passes, example=example)
        how: dict[str, Any] = REPAPQ if paper else {"loss": "mse", "stage": 0.0, "batch": 64}
        repfx.reconstruct(model, data.images, iterations=args.iterations, seed=seed, **how)
        return repfx.transform(model, ["fuse"])

    def trained_at(bits: int, bn: str) -> Any:
        passes: list[Any] = ["fuse", RepQ(bits=bits)] if bn == "merged" else [RepQ(bits, bn=bn)]
        model = repfx.transform(net, passes, example=example)
        return tuned(model.train(), data, args, f"{data.classes}-{name}-{bn}{bits}", seed)

    found: dict[str, Callable[[], Any]] = {f"{m} {b}": partial(ranged, b, m) for b, m in RANGES}
    found |= {f"mse, bias {b}": partial(ranged, b, "mse", True) for b in (8, 6, 5)}
    found |= {f"RepAPQ {b}": partial(learned, b, True) for b in (8, 6)}
    found |= {f"block mse {b}": partial(learned, b, False) for b in (8, 6)}
    for bn in ("running", "estimate"):
        found |= {f"RepQ {bn} {b}": partial(trained_at, b, bn) for b in (8, 6, 4)}
    if name == "S0":
        found |= {f"Merged {b}": partial(trained_at, b, "merged") for b in (8, 6, 4)}
    return found


def peers(net: nn.Module, data: Data, args: Any, seed: int) -> dict[str, Callable[[], Any]]:
    """The nets of other tools that are installed, and ours for ONNX Runtime, by name."""
    from peers import PEERS, in_runtime, ours

    folder = args.runs
    merged = repfx.transform(net, ["fuse"], example=data.images[0][:2])

    def ranged() -> Any:
        same: dict[str, Any] = {"example": data.images[0][:2], "target": "onnxruntime"}
        model = repfx.transform(net, ["fuse", "ptq"], **same)
        repfx.calibrate(model, data.images, method="mse")
        return in_runtime(repfx.lower(model, folder / "mse.onnx", **same).onnx)

    found: dict[str, Callable[[], Any]] = {
        name: partial(run, merged, data.images, folder) for name, run in PEERS.items()
    }
    found["repfx mse"] = ranged
    found["repfx repapq"] = partial(ours, seed, args.iterations, net, data.images, folder)
    return found


def main() -> None:
    parser = command(__doc__, "detection", seeds=[0, 1, 2])
    parser.set_defaults(data=None)
    for action in parser._actions:
        action.required = False
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--iterations", type=int, default=200, help="RepAPQ's, for each block")
    parser.add_argument("--epochs", type=int, help="in float; by default 10, cells 30")
    parser.add_argument("--ways", nargs="+", help="only those that begin so, such as RepQ")
    parser.add_argument("--peers", action="store_true", help="other tools, in place of ours")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, results = Data(args.data), Results(args.results)
    where = "digits" if args.data is None else args.data.stem
    for seed, variant in [(s, v) for s in args.seeds for v in args.variants]:
        of: dict[str, Any] = {"data": where, "variant": variant, "seed": seed}
        block = plain if variant == "Plain" else partial(QARepVGG, variant=variant)
        net = trained(
            args.runs,
            f"{where}-{variant}",
            lambda block=block: Detector(block, data.classes, down=data.down),
            data.task,
            data.train,
            seed,
            batch=data.batch,
            epochs=args.epochs or data.epochs,
            **FLOAT,
        )
        if not results.has(**of, way="float"):
            results.add(**of, way="float", **data.score(net))
        tried = peers(net, data, args, seed) if args.peers else ways(net, data, args, of)
        for way, make in tried.items():
            if results.has(**of, way=way) or (args.ways and not way.startswith(tuple(args.ways))):
                continue
            try:
                results.add(**of, way=way, **data.score(make()))
            except ImportError as error:
                print(f"{way} is left out: {error}")


if __name__ == "__main__":
    main()
