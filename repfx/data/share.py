"""share_of: the part of the batches that this process works on, if there are several.

Processes that are given the same batches split them: of n processes each takes every n-th batch.
Those that are given different ones, as by a `DistributedSampler`, each take all of their own. So a
program need not change to run in several processes, and no image is left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

from repfx.data.batches import Batch, Batches
from repfx.processes import agreed, gathered, place


def share_of(batches: Batches) -> Iterator[tuple[int, Batch]]:
    """The batches for this process, each with its place in the order of all batches.

    Raises what iterating over `batches` raises."""
    rank, world = place()
    if world == 1:
        at = 0
        for batch in batches:
            yield at, batch
            at += 1  # noqa: SIM113 (enumerate would keep the first batch in memory)
        return
    rest = iter(batches)
    with agreed():
        first = next(rest)
    same = len({*gathered(_digest(first))}) == 1
    for i, batch in enumerate(chain([first], rest)):
        if not same:
            yield i * world + rank, batch
        elif i % world == rank:
            yield i, batch


def _digest(batch: Batch) -> str:
    found = hashlib.sha256()
    for x in batch.tensors:
        found.update(f"{x.dtype} {tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
