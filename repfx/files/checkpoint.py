"""Checkpoints: an unfinished model and the state of its run, as plain tensors, numbers and dicts.

    {"format": "repfx.fit 1", "model": state_dict, "flags": {quantizer: has a scale}, ...}

A checkpoint is written completely or not at all, and reading one runs no code. `kind` names the
function that wrote it, such as repfx.fit."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repfx.errors import InputError
from repfx.files.store import write_whole
from repfx.quant import quantizers_of

VERSION = 1


def write(
    path: str | os.PathLike[str], kind: str, model: nn.Module, content: dict[str, Any]
) -> None:
    """Writes the model and the state of the run, `content`.

    Raises InputError if the path cannot be written."""
    flags = {name: m.calibrated for name, m in quantizers_of(model).items()}
    whole = {
        "format": f"{kind} {VERSION}",
        "model": dict(model.state_dict()),
        "flags": flags,
        **content,
    }
    write_whole(path, lambda part: torch.save(whole, part))


def read(path: str | os.PathLike[str], kind: str, keys: Collection[str]) -> dict[str, Any]:
    """Reads what `write` wrote, with at least these keys.

    Raises InputError for a file that is damaged, is not a checkpoint, or is one of another kind or
    version."""
    try:
        found = torch.load(Path(path), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises all kinds of errors on strange bytes
        raise InputError(f"{path} is not a checkpoint of {kind}, or it is damaged") from error
    name, _, version = str(found.get("format") if isinstance(found, dict) else "").rpartition(" ")
    if name != kind:
        other = f"; it is one of {name}" if name.startswith("repfx.") else ""
        raise InputError(f"{path} is not a checkpoint of {kind}{other}")
    if version != str(VERSION):
        raise InputError(
            f"{path} is a checkpoint of {kind} in version {version}; this repfx reads {VERSION}"
        )
    missing = sorted({"model", "flags", *keys} - set(found))
    if missing:
        raise InputError(f"{path} is damaged: it has no {missing[0]}")
    content: dict[str, Any] = found
    return content


def load_model(path: str | os.PathLike[str], model: nn.Module, found: dict[str, Any]) -> None:
    """Loads the tensors of a checkpoint into the model.

    Raises InputError if they do not fit, and names the first keys that differ."""
    here: dict[str, Tensor] = model.state_dict()
    there: dict[str, Tensor] = found["model"]
    for name, quant in quantizers_of(model).items():
        quant.complete(there, f"{name}.")
    wrong = [f"{k} is not in the checkpoint" for k in here if k not in there]
    wrong += [f"{k} is not in the model" for k in there if k not in here]
    wrong += [
        f"{k} is {tuple(there[k].shape)} in the checkpoint, {tuple(here[k].shape)} in the model"
        for k in here
        if k in there and there[k].shape != here[k].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path} is a checkpoint of another model: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(there)
    for name, quant in quantizers_of(model).items():
        quant.calibrated = found["flags"].get(name, quant.calibrated)
