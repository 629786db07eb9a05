"""Weights of checkpoints as people have them, loaded into a model.

A checkpoint is a state_dict, or a dict with one somewhere inside: {"state_dict": ...}, {"model":
..., "epoch": 3}, {"ema": ...}. DataParallel, torch.compile and trainers put a prefix before its
keys. No name of a key or a prefix is known here: what has most of the model's keys is taken.

    keys of the model     conv.weight   conv.bias
    keys of the file      module.conv.weight   module.conv.bias   loss.weight"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import types
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from repfx.errors import InputError

COMPILED = "_orig_mod."  # torch.compile puts it before the keys of the part it compiled
DEPTH = 3
# Data of trainers beside the weights; making one of these runs no code of the file.
HARMLESS = (
    *(argparse.Namespace, types.SimpleNamespace, collections.defaultdict, dict, list, set),
    *(pathlib.PosixPath, pathlib.PurePosixPath, np.dtype, np.ndarray),
    *(getattr(import_module("numpy._core.multiarray"), n) for n in ("scalar", "_reconstruct")),
    *(type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
)
State = dict[str, Tensor]


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], key: str | None = None, trust: bool = False
) -> str:
    """Loads the weights of a file into the model, in place. Returns what was taken, in words.

    `key`: where in the file they are, such as "ema" or "checkpoint.model"; by default where most of
    the model's keys are, and of several such places an average of weights. `trust` unpickles
    everything, which runs code of the file.

    Raises InputError, and leaves the model as it was, for a file that cannot be read, that is a
    pickle and not trusted, or whose weights do not fit; the message names the keys."""
    content = _read(Path(path), trust)
    states = {name: state for name, state in _states(content, "") if state}
    if key is not None and key not in states:
        raise InputError(f"{path} has no weights at {key!r}; it has {_listed(states)}")
    if not states:
        raise InputError(f"{path} holds no state_dict, but {_described(content)}")
    tried = states if key is None else {key: states[key]}
    wanted = model.state_dict()
    found = {name: _matched(state, wanted) for name, state in tried.items()}
    most = max(len(fit.state) for fit in found.values())
    best = [name for name, fit in found.items() if len(fit.state) == most]
    name = next((n for n in best if "ema" in n.lower().replace(".", "_").split("_")), best[0])
    fit = found[name]
    _check(fit, wanted, path, name)
    model.load_state_dict(fit.state, strict=False)
    others = [n for n in best if n != name]
    return fit.said(name, others)


class _Fit:
    """The weights of a place, by the model's keys. `prefix`: what was before them in the file;
    `missing`: of the model, where the prefix is the model's own."""

    def __init__(self, state: State, prefix: str, own: str, left: list[str]) -> None:
        self.state, self.prefix, self.own, self.left = state, prefix, own, left

    def said(self, name: str, others: list[str]) -> str:
        where = f"the weights at {name!r}" if name else "the weights"
        if others:
            where += f" (also there: {_listed(others)})"
        if self.prefix:
            where += f", whose keys begin with {self.prefix!r}"
        if self.left:
            where += f"; {len(self.left)} others are not of the model, such as {self.left[0]}"
        return where


def _matched(given: State, wanted: Mapping[str, Tensor]) -> _Fit:
    """The weights with the prefix that makes most keys those of the model."""
    state = {k.replace(COMPILED, ""): v for k, v in given.items()}
    best = _Fit({k: v for k, v in state.items() if k in wanted}, "", "", [])
    for prefix, own in _prefixes(list(state), list(wanted)):
        fits = {own + k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        fits = {k: v for k, v in fits.items() if k in wanted}
        if len(fits) > len(best.state):
            best = _Fit(fits, prefix, own, [])
    taken = {best.prefix + k[len(best.own) :] for k in best.state}
    best.left = [k for k in state if k not in taken]
    return best


def _prefixes(given: list[str], wanted: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of what to take away and what to put before: one of them is empty.

    They follow from keys that end alike: of a few of the model's, as some may be missing."""
    found = {}
    for theirs, ours, swap in ((given, wanted, False), (wanted, given, True)):
        for key in ours[:: max(1, len(ours) // 8)]:
            for other in theirs:
                if other.endswith("." + key):
                    prefix = other[: -len(key)]
                    found[("", prefix) if swap else (prefix, "")] = True
    yield from found


def _check(fit: _Fit, wanted: Mapping[str, Tensor], path: Any, name: str) -> None:
    """Raises InputError if a weight is missing or has another shape."""
    where = f"{path} at {name!r}" if name else f"{path}"
    missing = [k for k in wanted if k not in fit.state and not k.endswith("num_batches_tracked")]
    if missing:
        tops = [k for k in fit.left if not fit.prefix or k.startswith(fit.prefix)]
        has = f"; it has {_listed(tops)} instead" if tops else ""
        raise InputError(
            f"{where} does not fit the model: {len(missing)} of {len(wanted)} weights are missing, "
            f"such as {_listed(missing)}{has}"
        )
    for k, v in fit.state.items():
        if v.shape != wanted[k].shape:
            raise InputError(
                f"{where} does not fit the model: {k} is {tuple(v.shape)}, the model needs "
                f"{tuple(wanted[k].shape)}"
            )


def _read(path: Path, trust: bool) -> Any:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is not a safetensors file, or it is damaged: {error}"
            ) from error
    try:
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as refused:
        if not trust:
            raise InputError(
                f"{path} cannot be read without running code from it: "
                f"{_reason(refused)}. If you trust its source, use --trust-pickle"
            ) from refused
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise InputError(f"{path} cannot be unpickled: {error}") from error


def _reason(error: Exception) -> str:
    """What weights_only has refused: the class, where it names one."""
    words = str(error).split("Unsupported global: GLOBAL ")
    if len(words) > 1:
        return f"it needs {words[1].split()[0]}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _states(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, State]]:
    """Every state_dict in a checkpoint, with where it is."""
    if isinstance(value, nn.Module):
        value = value.float().state_dict()
    if not isinstance(value, Mapping) or depth > DEPTH:
        return
    tensors = {str(k): v for k, v in value.items() if isinstance(v, Tensor)}
    yield name, tensors
    for k, v in value.items():
        yield from _states(v, f"{name}.{k}" if name else str(k), depth + 1)


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {_listed(map(str, value))}"
    return f"a {type(value).__name__}"


def _listed(names: Any, most: int = 3) -> str:
    names = [n or "its top" for n in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest
