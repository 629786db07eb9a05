"""What the metrics and losses of the tasks share: torchmetrics, and a batch of two tensors."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from repfx.data.vision import torchvision
from repfx.errors import InputError, MissingPart


def pair(batch: Any) -> tuple[Tensor, Tensor]:
    """The (x, y) of a batch. Raises InputError if the batch is not a pair of tensors."""
    if (
        not isinstance(batch, (tuple, list))
        or len(batch) != 2
        or not all(isinstance(t, Tensor) for t in batch)
    ):
        raise InputError("this task takes batches (x, y) of two tensors")
    return batch[0], batch[1]


def torchmetrics() -> Any:
    """The package torchmetrics. Raises MissingPart if it is not installed."""
    with contextlib.suppress(MissingPart):
        torchvision()  # torchmetrics imports it where it is installed
    try:
        import torchmetrics as package
    except ImportError as error:
        raise MissingPart("training needs torchmetrics: pip install repfx[train]") from error
    except RuntimeError as error:  # for example, a torchvision built for another torch
        raise MissingPart(
            f"torchmetrics is installed but cannot be imported: {error}; pip install repfx[train]"
        ) from error
    return package
