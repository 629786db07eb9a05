"""Loads MODEL of the command line: a file, judged by its content, or package.module:factory."""

from __future__ import annotations

import ast
import importlib
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repfx.capture.exported import is_exported, load_exported
from repfx.cli.options import say
from repfx.data.vision import torchvision
from repfx.errors import InputError
from repfx.files.kinds import stranger
from repfx.files.store import load
from repfx.files.weights import load_weights

_SAFE = (
    "Safe ways: repfx.save(model, path) after repfx.transform, torch.export.save, or "
    "package.module:factory with --weights for a state_dict. If you trust its source, "
    "--trust-pickle loads it"
)


def load_model(name: str, weights: str | None = None, trust_pickle: bool = False) -> Any:
    """The model that MODEL names.

    Raises InputError for a missing, damaged or pickled file, for one of another program, and for a
    factory that fails."""
    if ":" in name and not os.path.exists(name):
        return _from_factory(name, weights, trust_pickle)
    if weights is not None:
        raise InputError(
            "--weights is for package.module:factory; a model file has its own weights"
        )
    if not os.path.exists(name):
        raise InputError(f"no such file: {name}")
    other = stranger(Path(name))
    if other:
        raise InputError(f"{name} {other}")
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


def _from_factory(name: str, weights: str | None, trust: bool) -> nn.Module:
    module_name, _, call = name.partition(":")
    attribute, args, kwargs = _call(name, call)
    factory = _found(name, module_name, attribute)
    shown = name if name.endswith(")") else f"{name}()"
    try:
        model = factory(*args, **kwargs)
    except Exception as error:
        raise InputError(f"{shown} failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{shown} returned a {type(model)}, not an nn.Module")
    if weights is not None:
        file, _, key = (weights, "", "") if os.path.exists(weights) else weights.partition("#")
        say(f"loaded {load_weights(model, file, key or None, trust)}")
    return model


def imported(name: str) -> Any:
    """The function that package.module:function names. Raises InputError if there is none."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{name} is not package.module:function")
    return _found(name, module_name, attribute)


def _found(name: str, module_name: str, attribute: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = _imported(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"cannot import {name}: {error}") from error
    return found


def _call(name: str, text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """The attribute and the arguments of `factory` or `factory('a', classes=3)`.

    >>> _call("", "models.net('s', width=(8, 16))")
    ('models.net', ['s'], {'width': (8, 16)})
    """
    try:
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Call):
            kwargs = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords if k.arg}
            if len(kwargs) == len(tree.keywords):
                args = [ast.literal_eval(a) for a in tree.args]
                return ast.unparse(tree.func), args, kwargs
        elif isinstance(tree, ast.Name | ast.Attribute):
            return ast.unparse(tree), [], {}
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"{name}: arguments are plain values, such as 'text', 3 or (3, 4)"
        ) from error
    raise InputError(f"{name} is not package.module:factory or package.module:factory(arguments)")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except RuntimeError as error:  # a torchvision built for another torch, see data.vision
        if "torchvision" not in str(error):
            raise
        torchvision()
        return importlib.import_module(name)
