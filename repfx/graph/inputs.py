"""The sizes of the inputs that a model was transformed or calibrated on, kept with the model.

They stand in `model.meta["repfx_inputs"]`, a list of [dtype, size] without the batch, such as
["float32", [3, 224, 224]]. `save` keeps them, so that a saved model can be lowered as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

KEY = "repfx_inputs"  # a model may have a `meta` of its own


def note_inputs(model: nn.Module, given: Sequence[Any]) -> None:
    """Records the inputs (N, ...). If one is not a tensor with a batch, none is recorded."""
    meta = getattr(model, "meta", None)
    if not isinstance(meta, dict):
        return
    meta.pop(KEY, None)
    if given and all(isinstance(x, Tensor) and x.dim() > 0 for x in given):
        meta[KEY] = [[str(x.dtype).removeprefix("torch."), list(x.shape[1:])] for x in given]


def noted_inputs(model: object) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """The type and size of each recorded input, without its batch; none if there is no record."""
    meta = getattr(model, "meta", None)
    found = meta.get(KEY, ()) if isinstance(meta, dict) else ()
    return [(getattr(torch, kind), tuple(size)) for kind, size in found]
