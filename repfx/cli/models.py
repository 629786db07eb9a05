"""Loads MODEL of the command line: a file, judged by its content, or package.module:factory."""

from __future__ import annotations

import importlib
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repfx.capture.exported import is_exported, load_exported
from repfx.errors import InputError
from repfx.files.store import load

_SAFE = (
    "Safe ways: repfx.save(model, path) after repfx.transform, torch.export.save, or "
    "package.module:factory with --weights for a state_dict. If you trust its source, "
    "--trust-pickle loads it"
)


def load_model(name: str, weights: str | None = None, trust_pickle: bool = False) -> Any:
    """The model that MODEL names.

    Raises InputError for a missing, damaged or pickled file and for a factory that fails."""
    if ":" in name and not os.path.exists(name):
        return _from_factory(name, weights)
    if weights is not None:
        raise InputError(
            "--weights is for package.module:factory; a model file has its own weights"
        )
    if not os.path.isfile(name):
        raise InputError(
            f"no such file: {name}"
            if not os.path.isdir(name)
            else f"{name} is a folder, not a model"
        )
    if is_exported(name):
        return load_exported(name, trust_pickle)
    with open(name, "rb") as file:
        head = file.read(9)
    # A file of repfx.save starts with the length of its header, whose first byte may look like that
    # of a pickle.
    saved = head[8:] == b"{"
    pickled = head[:1] == b"\x80" and not saved
    if zipfile.is_zipfile(name) or pickled or head[:4] == b"PK\x03\x04":
        return _from_pickle(name, trust_pickle)
    return load(name)


def _from_pickle(name: str, trust: bool) -> nn.Module:
    if not zipfile.is_zipfile(name) and Path(name).read_bytes()[:4] == b"PK\x03\x04":
        raise InputError(f"{name} is damaged: the archive is incomplete")
    if not trust:
        try:
            found = torch.load(name, map_location="cpu", weights_only=True)
        except Exception:
            raise InputError(
                f"{name} is a pickle: loading it would run code from it. {_SAFE}"
            ) from None
        if isinstance(found, dict):
            raise InputError(
                f"{name} is a state_dict, not a model: use package.module:factory --weights {name}"
            )
        raise InputError(f"{name} holds a {type(found)}, not a model. {_SAFE}")
    try:
        found = torch.load(name, map_location="cpu", weights_only=False)
    except Exception as error:
        raise InputError(f"{name} cannot be unpickled: {error}") from error
    if not isinstance(found, nn.Module):
        raise InputError(f"{name} holds a {type(found)}, not a model")
    return found


def _from_factory(name: str, weights: str | None) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"cannot import {name}: {error}") from error
    try:
        model = factory()
    except Exception as error:
        raise InputError(f"{name}() failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() returned a {type(model)}, not an nn.Module")
    if weights is not None:
        if not os.path.isfile(weights):
            raise InputError(f"no such file: {weights}")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(
                f"{weights} is not a plain state_dict: {str(error).splitlines()[0]}"
            ) from error
        try:
            model.load_state_dict(
                state.get("state_dict", state) if isinstance(state, dict) else state
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"{weights} does not fit {name}: {error}") from error
    return model
