"""Copies that share storage with the original model until something may write into them.

Most weights are only read and then replaced by merged ones, so copying them would waste time and
memory. A copy therefore shares the storage of the original at first. `Copy.separate` ends the
sharing before any code that might write gets a tensor."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from repfx.capture.caches import cached_again, is_cached
from repfx.errors import InputError

_TABLES = set(nn.Module().__dict__)
_VALUES = {type(None), bool, int, float, str, torch.dtype, torch.device}


@dataclass
class Copy:
    """A copy of a model, and the addresses of the storage that both share, if any."""

    model: nn.Module
    shared: set[int]

    def separate(self, model: nn.Module) -> None:
        """Gives `model`, which was made from this copy, storage of its own.

        Tensors that are tied to each other stay tied."""
        done: set[int] = set()
        for tensor in _tensors(model) if self.shared else ():
            if id(tensor) not in done and tensor.untyped_storage().data_ptr() in self.shared:
                tensor.data = tensor.data.clone()
                done.add(id(tensor))
        self.shared.clear()


def alias(model: nn.Module) -> Copy:
    """A copy of a model that shares the storage of its parameters, but no Python object.

    So tracing cannot change the model. It is like copy.deepcopy, but skips the dozen empty hook
    tables and the plain values of every module. Raises InputError if the model cannot be copied."""
    memo: dict[int, Any] = {}
    shared: set[int] = set()
    for tensor in _tensors(model):
        if id(tensor) not in memo:
            if tensor.is_inference():
                own = tensor.detach().clone()
                parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if parameter else own
            elif isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
                shared.add(tensor.untyped_storage().data_ptr())
            else:  # small, and a forward may write into it even in eval mode
                memo[id(tensor)] = tensor.detach().clone()
    plain: list[tuple[nn.Module, nn.Module]] = []
    modules = list(model.modules())
    inner = {
        id(module): inside for module in modules if (inside := unwrapped(module)) is not module
    }
    try:
        for module in modules:
            if (isinstance(module, fx.GraphModule) or hasattr(type(module), "__deepcopy__")) and id(
                module
            ) not in memo:
                copy.deepcopy(module, memo)
        for module in modules:
            if id(module) not in memo and id(module) not in inner:
                memo[id(module)] = object.__new__(type(module))
                plain.append((module, memo[id(module)]))
        for key, inside in inner.items():  # a part that was compiled: the copy has the part itself
            memo[key] = memo[id(inside)]
        for module, twin in plain:
            twin.__dict__.update({k: _alias_value(v, memo) for k, v in module.__dict__.items()})
        copied: nn.Module = memo[id(model)]
        return Copy(copied, shared)
    except Exception as error:
        raise InputError(f"the model cannot be copied: {error}") from error


def unwrapped(module: Any) -> Any:
    """The model inside the wrappers of torch: torch.compile, DistributedDataParallel and others."""
    while True:
        name = type(module).__module__
        inner: Any = None
        if name.startswith("torch._dynamo."):
            inner = module._modules.get("_orig_mod")
        elif name.startswith("torch.nn.parallel."):
            inner = module._modules.get("module")
        if inner is None:
            return module
        module = inner


def _alias_value(value: Any, memo: dict[int, Any]) -> Any:
    if _is_plain(value):
        return value
    kind = type(value)
    if id(value) in memo:
        return memo[id(value)]
    if is_cached(value) and isinstance(value.__wrapped__, types.MethodType):
        return cached_again(value, copy.deepcopy(value.__wrapped__, memo))
    if kind is dict or kind is OrderedDict:
        return kind((k, _alias_value(v, memo)) for k, v in value.items()) if value else kind()
    return copy.deepcopy(value, memo)


def _is_plain(value: Any) -> bool:
    """Whether it is a plain value or a tuple of these, such as a stride. Most attributes are."""
    kind = type(value)
    return kind in _VALUES or (kind is tuple and all(type(v) in _VALUES for v in value))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor of a model: parameters, buffers and attributes, also in lists and dicts."""
    for module in model.modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            for name, value in store.items():
                if isinstance(value, Tensor):
                    found: list[Any] = [value]
                elif name in _TABLES or _is_plain(value):
                    continue
                elif isinstance(value, (list, tuple, dict)):
                    found = tree_leaves(value)
                else:
                    continue
                yield from (t for t in found if isinstance(t, Tensor) and not t.is_meta)
