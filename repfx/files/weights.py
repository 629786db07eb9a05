"""Weights of checkpoints as people have them, loaded into a model.

A checkpoint is a state_dict, or a dict with one somewhere inside: {"state_dict": ...}, {"model":
..., "epoch": 3}, {"ema": ...}. DataParallel, torch.compile and trainers put a prefix before its
keys.

    keys of the model     conv.weight   conv.bias
    keys of the file      module.conv.weight   module.conv.bias   loss.weight

What has all the model's parameters is taken. Of several such places an average of weights goes
first, and an optimizer, a teacher or a start last; if that leaves two, the caller says which."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from repfx.errors import InputError
from repfx.files.kinds import stranger

COMPILED = "_orig_mod."  # torch.compile puts it before the keys of the part it compiled
DEPTH = 3
AVERAGES = {"ema", "swa", "average", "averaged", "avg"}  # words in the place of weights
LAST = {"optimizer", "optim", "opt", "grad", "grads", "gradients", "init", "initial", "teacher"}
# Data of trainers beside the weights; making one of these runs no code of the file.
HARMLESS = (
    *(argparse.Namespace, types.SimpleNamespace, collections.defaultdict, dict, list, set),
    *(pathlib.PosixPath, pathlib.PurePosixPath, np.dtype, np.ndarray),
    *(getattr(import_module("numpy._core.multiarray"), n) for n in ("scalar", "_reconstruct")),
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
)
State = dict[str, Tensor]


@dataclass(frozen=True)
class _Place:
    """Weights in a file by the model's keys: `state`. `prefix` was before them in the file.

    `left`: the file's other keys there. `wrong`: those of another shape or type."""

    name: str
    prefix: str
    state: State
    left: list[str]
    wrong: dict[str, Tensor]

    @property
    def shown(self) -> str:
        return ".".join(part for part in (self.name, self.prefix.rstrip(".")) if part)

    @property
    def rank(self) -> int:
        words = set(re.split(r"[._]", self.shown.lower()))
        return 2 if words & LAST else 0 if words & AVERAGES else 1

    def same(self, other: _Place) -> bool:
        """Whether the weights are those of another place."""
        both = self.state.keys() & other.state.keys()
        pairs = ((self.state[k].nan_to_num(), other.state[k].nan_to_num()) for k in both)
        return all(torch.equal(a, b) for a, b in pairs)


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], key: str | None = None, trust: bool = False
) -> str:
    """Loads the weights of a file into the model, in place. Returns what was taken, in words.

    `key`: where in the file they are, such as "ema" or "checkpoint.model". `trust` unpickles
    everything, which runs code of the file.

    Raises InputError, and leaves the model as it was, for a file that cannot be read, that is a
    pickle and not trusted, whose weights do not fit, or that has several that do; the message names
    the keys."""
    content = _read(Path(path), trust)
    wanted = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    states = [(name, state) for name, state in _states(content, "") if state]
    if not states:
        raise InputError(f"{path} holds no state_dict, but {_described(content)}")
    places = [place for name, state in states for place in _places(name, state, wanted)]
    if key is not None:
        places = [p for p in places if key in (p.shown, p.name)]
        if not places:
            names = dict.fromkeys(name for name, _ in states)
            raise InputError(f"{path} has no weights at {key!r}; it has {_listed(names)}")
    parameters = {k for k in wanted if k in dict(model.named_parameters(remove_duplicate=False))}
    whole = [p for p in places if parameters <= _covered(p.state, wanted)]
    best = min(whole, key=lambda p: p.rank, default=None)
    if best is None:
        raise InputError(_misfit(path, max(places, key=lambda p: len(p.state)), wanted))
    rivals = [p for p in whole if p.rank == best.rank and not p.same(best)]
    if rivals:
        raise InputError(
            f"{path} has several weights that fit: {_listed(p.shown for p in (best, *rivals))}; "
            f"say which, as in --weights {path}#{best.shown or rivals[0].shown}"
        )
    others = [p for p in whole if p is not best and not p.same(best)]
    state = dict(best.state)
    for p in sorted(others, key=lambda p: p.rank):  # an average may have no statistics
        state = {**p.state, **state} if wanted.keys() - _covered(state, wanted) else state
    missing = _missing(state, wanted)
    if missing:
        raise InputError(_misfit(path, best, wanted))
    model.load_state_dict(state, strict=False)
    return _said(best, others, len(state) > len(best.state))


def _places(name: str, given: State, wanted: State) -> list[_Place]:
    """The weights in one state_dict, with each prefix that makes most keys those of the model."""
    state = {k.replace(COMPILED, ""): v for k, v in given.items()}
    found = [_place(name, state, wanted, *pair) for pair in _prefixes(list(state), list(wanted))]
    most = max(len(p.state) + len(p.wrong) for p in found)
    return [p for p in found if len(p.state) + len(p.wrong) == most]


def _place(name: str, state: State, wanted: State, prefix: str, own: str) -> _Place:
    keys = {own + k[len(prefix) :]: k for k in state if k.startswith(prefix)}
    keys = {ours: theirs for ours, theirs in keys.items() if ours in wanted}
    fits = {k: state[v] for k, v in keys.items() if _fits(state[v], wanted[k])}
    wrong = {k: state[v] for k, v in keys.items() if k not in fits}
    taken = set(keys.values())
    return _Place(name, prefix, fits, [k for k in state if k not in taken], wrong)


def _fits(given: Tensor, wanted: Tensor) -> bool:
    same = given.is_floating_point() == wanted.is_floating_point()
    return same and given.is_complex() == wanted.is_complex() and given.shape == wanted.shape


def _prefixes(given: list[str], wanted: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of what to take away and what to put before: one of them is empty.

    They follow from keys that end alike: of a few of the model's, as some may be missing."""
    found = {("", ""): True}
    for theirs, ours, swap in ((given, wanted, False), (wanted, given, True)):
        for key in ours[:: max(1, len(ours) // 8)]:
            for other in theirs:
                if other.endswith("." + key):
                    prefix = other[: -len(key)]
                    found[("", prefix) if swap else (prefix, "")] = True
    yield from found


def _covered(state: State, wanted: State) -> set[str]:
    """The model's keys that the state fills, tied weights by any of their names."""
    filled = {(wanted[k].data_ptr(), wanted[k].shape) for k in state if wanted[k].numel()}
    tied = {k for k, v in wanted.items() if v.numel() and (v.data_ptr(), v.shape) in filled}
    return {*state, *tied}


def _missing(state: State, wanted: State) -> list[str]:
    covered = _covered(state, wanted)
    return [k for k in wanted if k not in covered and not k.endswith("num_batches_tracked")]


def _misfit(path: Any, place: _Place, wanted: State) -> str:
    """Why the weights at a place do not fit the model, in words."""
    where = f"{path} at {place.shown!r}" if place.shown else f"{path}"
    for k, v in place.wrong.items():
        return (
            f"{where} does not fit the model: {k} is {tuple(v.shape)}, {v.dtype}; the model needs "
            f"{tuple(wanted[k].shape)}, {wanted[k].dtype}"
        )
    missing = _missing(place.state, wanted)
    tops = [k for k in place.left if k.startswith(place.prefix)]
    has = f"; it has {_listed(tops)} instead" if tops else ""
    return (
        f"{where} does not fit the model: {len(missing)} of {len(wanted)} weights are missing, "
        f"such as {_listed(missing)}{has}"
    )


def _said(place: _Place, others: list[_Place], more: bool) -> str:
    where = f"the weights at {place.name!r}" if place.name else "the weights"
    if others:
        where += f" (also there: {_listed(p.shown for p in others)})"
    if place.prefix:
        where += f", whose keys begin with {place.prefix!r}"
    if more:
        where += ", and what it lacks from the others"
    if place.left:
        where += f"; {len(place.left)} others are not of the model, such as {place.left[0]}"
    return where


def _read(path: Path, trust: bool) -> Any:
    if not path.is_file():
        raise InputError(f"no such file: {path}" if not path.exists() else f"{path} is a folder")
    other = stranger(path)
    if other:
        raise InputError(f"{path} {other}")
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix.lower() == ".safetensors" or head[8:] == b"{":
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
    if isinstance(value, (list, tuple)) and len(value) < 100:
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or depth > DEPTH:
        return
    yield name, {str(k): v for k, v in value.items() if _is_plain(v)}
    for k, v in value.items():
        yield from _states(v, f"{name}.{k}" if name else str(k), depth + 1)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {_listed(map(str, value))}"
    return f"a {type(value).__name__}"


def _listed(names: Any, most: int = 3) -> str:
    names = [str(n) or "its top" for n in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest
