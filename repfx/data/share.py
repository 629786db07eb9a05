"""Share: the part of the batches that this process works on, if there are several.

Processes that are given the same batches split them: of n processes each takes every n-th batch.
Those that are given different ones, as by a `DistributedSampler`, each take all of their own. So a
program need not change to run in several processes, and no image is left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from repfx.data.batches import Batch, Batches
from repfx.errors import InputError
from repfx.processes import agreed, gathered, place


class Share:
    """The batches for this process, each with its place in the order of all batches.

    Iterating raises what iterating over `batches` raises. Call `check` afterwards, in every
    process."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self._same, self._seen = False, hashlib.sha256()

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        rank, world = place()
        at = 0
        if world == 1:
            for batch in self.batches:
                yield at, batch
                at += 1  # enumerate would keep the first batch in memory
            return
        rest = iter(self.batches)
        with agreed():
            first = next(rest)
            digest = b"".join(_bytes(x) for x in first.tensors)
        self._same = len({*gathered(hashlib.sha256(digest).hexdigest())}) == 1
        for i, batch in enumerate(chain([first], rest)):
            if not self._same:
                yield i * world + rank, batch
                continue
            self._seen.update(b"".join(_bytes(x[:1]) for x in batch.tensors))
            if i % world == rank:
                yield i, batch

    def check(self) -> None:
        """Raises InputError if processes split batches that only began alike."""
        if len({*gathered((self._same, self._seen.hexdigest()))}) > 1:
            raise InputError(
                "the processes were given batches that begin with the same one and then differ: "
                "give all of them the same batches, or each its own from the first on"
            )


def _bytes(x: Tensor) -> bytes:
    values = x.detach().cpu().contiguous()
    head = f"{x.dtype} {tuple(x.shape)}".encode()
    return head + values.reshape(-1).view(torch.uint8).numpy().tobytes()
