"""A checkpoint is everything a run's next step depends on, as plain tensors, numbers and dicts: no
code comes back.

Model, quantizers' flags, optimizer, average, gradient scaler, every process's random states, the
place in the epoch and the rows so far. It appears whole or not at all."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from repfx.errors import CheckError, InputError
from repfx.files.store import write_whole
from repfx.quant import FakeQuant

FORMAT = "repfx.fit 1"


def random_state() -> dict[str, Any]:
    """The states of the global generators of torch, Python and numpy, and of the accelerators where
    there are any.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, inner, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(inner), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if (
        state["cuda"]
        and torch.cuda.is_available()
        and len(state["cuda"]) == torch.cuda.device_count()
    ):
        torch.cuda.set_rng_state_all(state["cuda"])
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def flags(model: nn.Module) -> dict[str, bool]:
    """Which quantizers have their scale."""
    return {name: m.calibrated for name, m in model.named_modules() if isinstance(m, FakeQuant)}


def set_flags(model: nn.Module, found: dict[str, bool]) -> None:
    """Puts back what `flags` gave."""
    for name, m in model.named_modules():
        if isinstance(m, FakeQuant):
            m.calibrated = found.get(name, m.calibrated)


def check_finite(path: str | os.PathLike[str] | None, model: nn.Module) -> None:
    """Raises CheckError where a parameter is not finite."""
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            kept = f"; the last good checkpoint is {path}" if path and Path(path).exists() else ""
            raise CheckError(f"parameter {name} is not finite any more{kept}")


def write(path: str | os.PathLike[str], model: nn.Module, content: dict[str, Any]) -> None:
    """Writes the model and what else the run needs. Raises InputError where the path cannot be
    written.
    """
    whole = {"format": FORMAT, "model": dict(model.state_dict()), "flags": flags(model), **content}
    write_whole(path, lambda part: torch.save(whole, part))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write` wrote. Raises InputError for a damaged or foreign file."""
    try:
        found = torch.load(Path(path), map_location="cpu", weights_only=True)
    except Exception as error:  # what the unpickler raises on strange bytes has no common class
        raise InputError(f"{path} is not a checkpoint of repfx.fit, or it is damaged") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of repfx.fit")
    return found


def load_weights(path: str | os.PathLike[str], model: nn.Module, found: dict[str, Any]) -> None:
    """Puts the checkpoint's tensors into the model. Raises InputError, naming the first keys, where
    they do not fit.
    """
    here, there = model.state_dict(), found["model"]
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
    set_flags(model, found["flags"])


def check_same_run(path: str | os.PathLike[str], now: dict[str, Any], then: dict[str, Any]) -> None:
    """Raises InputError where a run cannot go on from a checkpoint because its steps would be other
    ones.
    """
    for name, value in now.items():
        if then.get(name) != value:
            raise InputError(
                f"{path} was written with {name}={then.get(name)!r}, this run has "
                f"{value!r}; or resume=False"
            )
