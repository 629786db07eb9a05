"""Copies that share storage, so that a rewrite costs little memory and can never reach the model it
was given.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.errors import InputError

_VALUES = {type(None), bool, int, float, str, torch.dtype, torch.device}


def alias(model: nn.Module) -> nn.Module:
    """A structural copy that shares storage with the model but no Python object, so tracing cannot
    change the model.

    What copy.deepcopy does, without visiting the dozen empty hook tables and the plain values of
    every module."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        if id(tensor) not in memo:
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
            else:  # small, and what a forward may write to even in eval mode
                memo[id(tensor)] = tensor.detach().clone()
    plain: list[tuple[nn.Module, nn.Module]] = []
    try:
        for module in model.modules():
            if (isinstance(module, fx.GraphModule) or hasattr(type(module), "__deepcopy__")) and id(
                module
            ) not in memo:
                copy.deepcopy(module, memo)
        for module in model.modules():
            if id(module) not in memo:
                memo[id(module)] = type(module).__new__(type(module))
                plain.append((module, memo[id(module)]))
        for module, twin in plain:
            twin.__dict__.update({k: _alias_value(v, memo) for k, v in module.__dict__.items()})
        copied: nn.Module = memo[id(model)]
        return copied
    except Exception as error:
        raise InputError(f"the model cannot be copied: {error}") from error


def _alias_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _VALUES or (kind is tuple and all(type(v) in _VALUES for v in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict or kind is OrderedDict:
        return kind((k, _alias_value(v, memo)) for k, v in value.items()) if value else kind()
    return copy.deepcopy(value, memo)


def own_tensors(model: nn.Module, original: nn.Module | torch.export.ExportedProgram) -> None:
    """Gives every tensor that `model` still shares with `original` storage of its own, ties
    kept."""
    if isinstance(original, nn.Module):
        theirs = list(_tensors(original))
    else:
        theirs = [
            t
            for t in [*original.state_dict.values(), *original.constants.values()]
            if isinstance(t, Tensor)
        ]
    shared = {t.untyped_storage().data_ptr() for t in theirs}
    done = set()
    for tensor in _tensors(model):
        if id(tensor) not in done and tensor.untyped_storage().data_ptr() in shared:
            tensor.data = tensor.data.clone()
            done.add(id(tensor))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            yield from (t for t in store.values() if isinstance(t, Tensor) and not t.is_meta)
