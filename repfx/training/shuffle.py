"""The order of the data. It depends only on (seed, epoch), so a run can resume within an epoch.

    permutation(seed, epoch) = | step 0: micro 0 | micro 1 | step 1: ...
    a micro batch = | rank 0 | rank 1 | ...

Every sample has the same weight, for any number of processes and micro batches: the gradient of a
step is that of the mean loss over all its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from repfx.errors import InputError


class Arrays(Dataset[Any]):
    """Tensors (N, ...) with the same N, as a data set that reads a whole batch at once."""

    def __init__(self, *tensors: Tensor) -> None:
        sizes = [len(t) for t in tensors]
        if len(set(sizes)) != 1:
            raise InputError(f"the arrays have different lengths: {', '.join(map(str, sizes))}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(t[indices] for t in self.tensors)


def _as_read(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Source:
    """A data set, and how to cut it into batches.

    `batch`: samples per micro batch and process. `workers`: processes that read ahead.
    """

    dataset: Any
    batch: int
    shuffle: bool = True
    drop_last: bool = False
    collate: Callable[[list[Any]], Any] | None = None
    workers: int = 0

    def steps(
        self, epoch: int, seed: int, accumulate: int, world: int, rank: int
    ) -> list[list[tuple[list[int], float]]]:
        """The steps of an epoch for one process: for each micro batch its (indices, weight).

        The mean loss of a step is the mean over processes of the sum of weight * (mean loss of the
        micro batch). A last micro batch with fewer samples than processes is left out."""
        size, part = len(self.dataset), self.batch * world
        order = (
            np.random.default_rng((seed, epoch)).permutation(size)
            if self.shuffle
            else np.arange(size)
        )
        found = []
        for start in range(0, size, part * accumulate):
            chunk = order[start : start + part * accumulate]
            if self.drop_last and len(chunk) < part * accumulate:
                break
            parts = [chunk[at : at + part] for at in range(0, len(chunk), part)]
            parts = [p for p in parts if len(p) >= world]
            total = sum(map(len, parts))
            mine = [np.array_split(p, world)[rank] for p in parts]
            if mine:
                found.append([(m.tolist(), len(m) * world / total) for m in mine])
        return found

    def reader(self, batches: Sequence[list[int]], seed: int, epoch: int) -> Iterator[Any]:
        """Reads these batches in this order, with its own random generator, not the global ones."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(seed, epoch)
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(seed + epoch),
        )
        with torch.device("cpu"):  # the generator is on the CPU, whatever the default device is
            return iter(loader)


def source_of(data: Any, batch: int, workers: int = 0) -> Source:
    """The source for `fit`, from a pair of tensors (N, ...), a data set or a DataLoader.

    From a DataLoader it takes the data set, the batch size, the workers, the collate function and
    whether it shuffles. Raises InputError for a DataLoader with a custom sampler, and for a data
    set that is empty or has no length."""
    if isinstance(data, DataLoader):
        if type(data.sampler) not in (RandomSampler, SequentialSampler) or data.batch_size is None:
            raise InputError(
                "a run on a DataLoader with a custom sampler cannot be resumed; give its data "
                "set instead"
            )
        found = source_of(data.dataset, data.batch_size, data.num_workers)
        shuffle = isinstance(data.sampler, RandomSampler)
        collate = found.collate or data.collate_fn
        return replace(found, shuffle=shuffle, drop_last=data.drop_last, collate=collate)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and data and all(isinstance(t, Tensor) for t in data):
        data = Arrays(*data)
    if isinstance(data, IterableDataset) or not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__")
    ):
        raise InputError(
            f"data is tensors (x, y), a data set with a length or a DataLoader, not {type(data)}"
        )
    if not len(data):
        raise InputError("the data set is empty")
    return Source(
        data, batch, collate=_as_read if isinstance(data, Arrays) else None, workers=workers
    )
