"""Running a model on a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from repfx.capture.running import in_order, quiet
from repfx.data.batches import Batch
from repfx.deadline import check_time
from repfx.errors import InputError


def device_of(model: nn.Module) -> torch.device:
    """Where the model's tensors are."""
    return next(iter([*model.parameters(), *model.buffers()])).device


def feed(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch.

    A dict is the model's arguments by name if it has arguments of these names, else its one
    argument. The model gets a copy of the batch on its own device, because some models overwrite
    their input. Raises InputError for a batch that the model does not take.
    """
    check_time()
    inputs = batch.to(device_of(model), copy=True).inputs
    try:
        with quiet():
            if isinstance(inputs, Mapping) and in_order(model, (), dict(inputs)) is not None:
                return model(**inputs)
            return model(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in batch.tensors)
        raise InputError(f"the model does not take a batch of shape {shapes}: {error}") from error


def arguments(model: nn.Module, inputs: Any) -> tuple[Any, ...]:
    """The inputs of a batch as the arguments of the model, in order."""
    ordered = in_order(model, (), dict(inputs)) if isinstance(inputs, Mapping) else None
    return (inputs,) if ordered is None else ordered
