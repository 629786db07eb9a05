"""Holders: modules of the user's classes that a graph has taken the forward of.

A traced model is one graph. The modules it was made of stay in its tree, with their names, classes
and attributes, so that `model.model[-1].stride` and `isinstance` work; but the graph calls their
layers, and they do not run by themselves any more.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from repfx.errors import InputError

TABLES = frozenset(nn.Module().__dict__)


class Holder:
    """What a holder has besides the class of the module it stands for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            f"this {type(self).__name__} is a part of a traced graph and does not run by itself: "
            "call the model, with the same kind of arguments that it was traced with"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self).__mro__[2],), self.__dict__


def is_holder(module: nn.Module | None) -> bool:
    return type(module) is nn.Module or isinstance(module, Holder)


def holder_of(module: nn.Module) -> nn.Module:
    """An empty module that stands for this one: its class and plain attributes.

    Layers of torch.nn get a plain nn.Module: the batch norms that one finds are those that run.
    """
    own = not type(module).__module__.startswith("torch.nn.") or isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )
    if not own or type(module) is nn.Module or isinstance(module, Holder):
        return nn.Module()
    base: Any = type(module)
    made: nn.Module = object.__new__(_class(base))
    made.__dict__.update(nn.Module().__dict__)
    made.__dict__.update(attributes_of(module))
    return made


def _new(base: Any) -> Any:
    return object.__new__(_class(base))


@cache
def _class(base: Any) -> type[Any]:
    return types.new_class(
        base.__name__, (Holder, base), exec_body=lambda ns: ns.update(__module__=base.__module__)
    )


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are no tables, and hold no modules."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in TABLES and not any(isinstance(v, nn.Module) for v in tree_leaves(value))
    }
