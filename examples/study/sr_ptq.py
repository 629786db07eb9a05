"""Study (f): ECBSR-m4c8 x2 quantized after training, PSNR on Set5 and Set14.

python examples/study/sr.py --data sr.zip          trains it
python examples/study/sr_ptq.py --data sr.zip
"""

from __future__ import annotations

from typing import Any

import torch
from common import Results, command
from ptq import LEARNED
from sr import ECBSR
from torch import nn
from torch.utils.data import DataLoader

import repfx
from repfx.blocks import ECB
from repfx.data import Pairs
from repfx.passes import Ptq
from repfx.training import SuperResolution

# Where a block may end; the skip connection runs alongside each of them.
LAYERS = ["body.1", "body.3", "body.5", "body.7", "body.9"]
# Only at 6 bits: the net cut into blocks, and uncut with the same number of steps in total.
MORE = {
    "repapq, a block a layer": (["qprep"], {"blocks": LAYERS}),
    "repapq, 1200 steps": (["qprep"], {"iterations": 1200}),
}


@torch.no_grad()
def psnr(model: nn.Module, test: DataLoader) -> float:
    score = SuperResolution().metric()
    for pair in test:
        score.update(model.eval(), pair)
    return float(score.compute()["psnr"])


def main() -> None:
    parser = command(__doc__, "sr_ptq")
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = ECBSR(ECB)
    net.load_state_dict(torch.load(args.runs / "sr-ecb-0.ck", weights_only=True)["model"])
    tests = {name: DataLoader(Pairs(args.data, f"test/{name}"), 1) for name in ("set5", "set14")}
    patches = Pairs(args.data, "train", patch=64, repeat=3)
    batches = [low for low, _ in DataLoader(patches, 64)]
    results = Results(args.results)
    for bits in (8, 6):
        learned = LEARNED | (MORE if bits == 6 else {})
        for method in ("max", "mse", "mae", *learned):
            if results.has(bits=bits, method=method):
                continue
            passes, options = learned.get(method, ([], {}))
            quantized = repfx.transform(net.eval(), [Ptq(bits, weights="mse"), *passes])
            if method in learned:
                chosen: dict[str, Any] = {"iterations": args.iterations, "batch": 32}
                chosen.update(options)
                repfx.reconstruct(quantized, batches, **chosen)
                quantized = repfx.transform(quantized, ["fuse"])
            else:
                repfx.calibrate(quantized, batches, method=method)
            results.add(
                bits=bits,
                method=method,
                **{name: psnr(quantized, test) for name, test in tests.items()},
            )


if __name__ == "__main__":
    main()
