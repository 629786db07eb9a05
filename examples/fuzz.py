"""Runs `fuse` on random graphs: python examples/fuzz.py --from 0 --to 5000 --jobs 2

Each seed makes a random net: linear or not, in one to three dimensions, with shared layers, values
changed in place and several outputs. Its rewrite must compute the same at every size it accepts,
cost no more, leave the given net and input unchanged and merge nothing on a second run. Seeds that
fail are printed. A run of a single seed also describes its net."""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from rich.progress import track
from torch import fx

import repfx
from repfx.testing import RandomBlock, assert_same, assert_same_elsewhere, random_block
from repfx.testing.random_block import RECIPES

TOLERANCE = 1e-10


@dataclass
class Outcome:
    """The result of one seed. `error` is empty where nothing failed."""

    seed: int
    operators: set[str] = field(default_factory=set)
    in_merges: set[str] = field(default_factory=set)
    merged: int = 0
    reasons: list[str] = field(default_factory=list)
    untraced: bool = False
    error: str = ""


def block_of(seed: int) -> tuple[RandomBlock, torch.Tensor]:
    """The net of a seed: every third is linear, one in ten is 1-D, one in ten is 3-D."""
    return random_block(seed, nonlinear=seed % 3 > 0, axes={3: 1, 7: 3}.get(seed % 10, 2))


def check(seed: int) -> Outcome:
    outcome = Outcome(seed)
    try:
        block, x = block_of(seed)
        outcome.operators = block.operators
        _check(block, x, outcome)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


def _check(block: RandomBlock, x: torch.Tensor, outcome: Outcome) -> None:
    """Raises where the rewrite is wrong."""
    kept, given = {k: v.clone() for k, v in block.state_dict().items()}, x.clone()
    result = _fused(block, x)
    if result is None:
        return
    report = result.meta["repfx"]
    outcome.merged, outcome.untraced = len(report.merged), bool(report.untraced)
    outcome.in_merges = {block.operator_at(name) for m in report.merged for name in m.ops}
    outcome.reasons = [d.reason.split(":")[0][:60] for d in report.declined]
    assert_same(block, result, x, TOLERANCE)
    assert_same_elsewhere(block, result, x, TOLERANCE)
    assert torch.equal(x, given), "the input changed"
    assert all(torch.equal(v, kept[k]) for k, v in block.state_dict().items()), (
        "the given net changed"
    )
    assert all(m.macs_after <= m.macs_before for m in report.merged), "costs more"
    again = _fused(result, x)
    assert again is None or not again.meta["repfx"].merged, "a second run merged"


def _fused(model: torch.nn.Module, x: torch.Tensor) -> fx.GraphModule | None:
    """The rewrite, or None where the model has no weights that could merge."""
    try:
        return repfx.transform(model, ["fuse"], example=x)
    except repfx.InputError as error:
        if "no convolution" in str(error):
            return None
        raise


def outcomes(seeds: range, jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        _one_thread()
        yield from map(check, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _one_thread) as pool:
        yield from pool.imap_unordered(check, seeds, chunksize=8)
        pool.close()
        pool.join()


def _one_thread() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", dest="last", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    seeds, started = range(args.first, args.last), time.monotonic()
    if len(seeds) == 1:
        print(block_of(seeds[0])[0].describe())
    found: list[Outcome] = []
    for outcome in track(outcomes(seeds, args.jobs), "graphs", total=len(seeds)):
        found.append(outcome)
        if outcome.error:
            print(f"seed {outcome.seed}: {outcome.error}")
    _summary(found, time.monotonic() - started)
    raise SystemExit(any(o.error for o in found))


def _summary(found: list[Outcome], seconds: float) -> None:
    operators: Counter[str] = Counter(dict.fromkeys(RECIPES, 0))
    operators.update(name for o in found for name in o.operators)
    in_merges = Counter(name for o in found for name in o.in_merges)
    reasons = Counter(reason for o in found for reason in o.reasons)
    failed = sorted(o.seed for o in found if o.error)
    with_merges, merges = sum(o.merged > 0 for o in found), sum(o.merged for o in found)
    untraced = sum(o.untraced for o in found)
    print(
        f"{len(found)} graphs, {len(found) / seconds:.1f} per second, "
        f"{with_merges} with merges, {merges} merges, "
        f"{untraced} with untraced parts, {len(failed)} failed {failed[:10]}"
    )
    for reason, n in reasons.most_common(12):
        print(f"{n:7d}  {reason}")
    print("number of graphs with an operator, and with a merge of that operator:")
    names = [f"{n:6d} {in_merges[name]:5d} {name}" for name, n in operators.most_common()]
    for i in range(0, len(names), 3):
        print("".join(f"{name:<40}" for name in names[i : i + 3]).rstrip())


if __name__ == "__main__":
    main()
