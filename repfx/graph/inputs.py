"""What a model's inputs are, kept with the model: their sizes, and how images become inputs.

The sizes on which it was transformed or calibrated stand in `model.meta["repfx_inputs"]`, a list of
[dtype, size] without the batch, such as ["float32", [3, 224, 224]].
`model.meta["repfx_preprocessing"]` is a record of `Preprocessing`. `save` keeps both, so that a
saved model can be lowered and quantized as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repfx.data.preprocessing import Preprocessing

KEY = "repfx_inputs"  # a model may have a `meta` of its own
IMAGES = "repfx_preprocessing"


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


def note_preprocessing(model: nn.Module, how: Preprocessing | None) -> None:
    """Records how images become inputs of the model.

    None, for data that does not say, leaves what was recorded before, unless it has another size
    than the inputs that are noted now."""
    meta = getattr(model, "meta", None)
    if not isinstance(meta, dict):
        return
    if how is not None:
        meta[IMAGES] = json.loads(how.json())
        return
    before, noted = noted_preprocessing(model), noted_inputs(model)
    sizes = [size[1:] for _, size in noted if len(size) == 3]
    if before is not None and before.size is not None and sizes and before.size not in sizes:
        del meta[IMAGES]


def noted_preprocessing(model: object) -> Preprocessing | None:
    """How images become inputs of the model, if that was recorded."""
    meta = getattr(model, "meta", None)
    found = meta.get(IMAGES) if isinstance(meta, dict) else None
    return None if found is None else Preprocessing.read(found)
