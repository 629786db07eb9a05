"""Study (c), RepQ on super-resolution: ECBSR-m4c8 x2 at 8, 4 and 2 bits, PSNR on Set5 and Set14.

    python examples/study/sr.py --data sr.zip

The zip holds train/t91/*.png and test/set5|set14/{hr,lr_x2}/*.png.
"""

from __future__ import annotations

import torch
from common import Results, command, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader

import repfx
from repfx.blocks import ECB
from repfx.data import Pairs
from repfx.passes import RepQ
from repfx.training import SuperResolution


class Plain(nn.Conv2d):
    """The convolution that an ECB becomes."""


class ECBSR(nn.Module):
    """ECBSR (Zhang et al., 2021): blocks with PReLU, and the image added to each of scale^2 phases.

    (N, 1, H, W) -> (N, 1, scale H, scale W)"""

    def __init__(
        self, block: type[nn.Module], depth: int = 4, width: int = 8, scale: int = 2
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth + 1):
            layers += [block(1 if i == 0 else width, width, 3, padding=1), nn.PReLU(width)]
        self.body = nn.Sequential(*layers, block(width, scale * scale, 3, padding=1))
        self.up = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.body(x) + x)


def main() -> None:
    parser = command(__doc__, "sr", seeds=[0])
    parser.add_argument(
        "--epochs", type=int, default=160, help="float epochs, each of 16 patches per image"
    )
    parser.add_argument("--qat-epochs", type=int, default=25)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--patch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train = Pairs(args.data, "train", patch=args.patch, repeat=16, cache=True)
    tests = {name: DataLoader(Pairs(args.data, f"test/{name}"), 1) for name in ("set5", "set14")}
    results = Results(args.results)

    @torch.no_grad()
    def psnr(model: nn.Module) -> dict[str, float]:
        found = {}
        for name, test in tests.items():
            score = SuperResolution().metric()
            for pair in test:
                score.update(model.eval(), pair)
            found[name] = float(score.compute()["psnr"])
        return found

    for seed in args.seeds:
        floats = {
            name: trained(
                args.runs,
                f"sr-{name}",
                lambda b=block: ECBSR(b),
                "super-resolution",
                train,
                seed,
                epochs=args.epochs,
                preset="ecbsr",
                batch=32,
                schedule="cosine",
            )
            for name, block in (("plain", Plain), ("ecb", ECB))
        }
        for name, net in floats.items():
            if not results.has(net=name, seed=seed, bits=32):
                results.add(net=name, seed=seed, bits=32, strategy="float", **psnr(net))
        for bits in args.bits:
            for strategy in ("Plain", "Merged", "RepQ"):
                if results.has(seed=seed, bits=bits, strategy=strategy):
                    continue
                net = floats["plain" if strategy == "Plain" else "ecb"]
                passes = [*(["fuse"] if strategy == "Merged" else []), RepQ(bits=bits)]
                quantized = trained(
                    args.runs,
                    f"sr-{strategy}-{bits}",
                    lambda n=net, p=passes: repfx.transform(n, p),
                    "super-resolution",
                    train,
                    seed,
                    epochs=args.qat_epochs,
                    preset="ecbsr",
                    batch=32,
                    lr=1e-4,
                    schedule="cosine",
                )
                results.add(
                    seed=seed,
                    bits=bits,
                    strategy=strategy,
                    **psnr(repfx.transform(quantized, ["fuse"])),
                )


if __name__ == "__main__":
    main()
