"""Random graphs through `fuse`, in numbers: python examples/fuzz.py --from 0 --to 5000

Each seed makes a random net (linear or not, layers shared, several outputs). Its rewrite must compute the same, cost no
more, keep the given net as it was and find nothing on a second run. A seed that fails is printed.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from rich.progress import track

import repfx
from repfx.testing import assert_same, random_block


def check(seed: int, reasons: Counter[str]) -> int:
    """Raises where the rewrite is wrong; returns how many regions merged."""
    block, x = random_block(seed, nonlinear=seed % 3 > 0)
    kept = {k: v.clone() for k, v in block.state_dict().items()}
    try:
        result = repfx.transform(block, ["fuse"], example=x)
    except repfx.InputError as error:
        if "no convolution" in str(error):
            return 0
        raise
    assert_same(block, result, x, 1e-10)
    assert all(torch.equal(v, kept[k]) for k, v in block.state_dict().items()), "the given net changed"
    report = result.meta["repfx"]
    assert all(m.macs_after <= m.macs_before for m in report.merged), "costs more"
    assert not repfx.transform(result, ["fuse"], example=x).meta["repfx"].merged, "a second run merged"
    reasons.update(d.reason.split(":")[0][:60] for d in report.declined)
    return len(report.merged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", dest="last", type=int, default=5000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed, merges, graphs = [], 0, 0
    reasons: Counter[str] = Counter()
    for seed in track(range(args.first, args.last), "graphs"):
        try:
            merged = check(seed, reasons)
            merges, graphs = merges + merged, graphs + bool(merged)
        except Exception as error:
            failed.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {error}")
    print(f"{args.last - args.first} graphs, {graphs} with merges, {merges} merges, {len(failed)} failed {failed[:10]}")
    for reason, n in reasons.most_common(12):
        print(f"{n:7d}  {reason}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
