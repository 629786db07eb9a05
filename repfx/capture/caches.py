"""Caches of functions, which a trace must not see.

    @functools.lru_cache
    def grid(height, width): ...        # is called once for each size, and not while it is traced

What such a function returns from its cache would be a constant of the size that came first."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

_Cached = type(functools.lru_cache(len))


def is_cached(value: Any) -> bool:
    return isinstance(value, _Cached)


def cached_again(value: Any, function: Any) -> Any:
    """A cache like `value`, for another function."""
    return functools.lru_cache(**value.cache_parameters())(function)


@contextlib.contextmanager
def uncached(modules: list[nn.Module]) -> Iterator[None]:
    """Meanwhile cached functions run: attributes of modules, methods, and functions beside them.

    A method may have its cache in a decorator."""
    found = list(_places(modules))
    for put, value in found:
        put(value.__wrapped__)
    try:
        yield
    finally:
        for put, value in found:
            put(value)


def _places(modules: list[nn.Module]) -> Iterator[tuple[Callable[[Any], None], Any]]:
    """Each cached function, with what puts another value in its place."""
    for names in [m.__dict__ for m in modules]:
        cached = [(k, v) for k, v in names.items() if is_cached(v)]
        yield from ((partial(names.__setitem__, k), v) for k, v in cached)
    classes = {c: None for cls in {type(m) for m in modules} for c in cls.__mro__}
    for names, name in _beside({c.__module__ for c in classes}):
        if is_cached(names.get(name)):
            yield partial(names.__setitem__, name), names[name]
    for cls in classes:
        if cls.__module__.partition(".")[0] in _OTHERS:
            continue
        for name, value in list(vars(cls).items()):
            kind = type(value) if isinstance(value, (staticmethod, classmethod)) else None
            value = value if kind is None else value.__func__
            if is_cached(value):
                yield partial(_set, cls, name, kind), value
            for cell in getattr(value, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # it is empty
                    if is_cached(cell.cell_contents):
                        yield partial(setattr, cell, "cell_contents"), cell.cell_contents


# They have caches of their own, which are not of sizes.
_OTHERS = frozenset([*sys.stdlib_module_names, "torch", "numpy", "sympy", "networkx", "repfx"])
_found: dict[str, list[tuple[dict[str, Any], str]]] = {}


def _beside(own: set[str]) -> list[tuple[dict[str, Any], str]]:
    """The cached functions of all modules that are loaded.

    Each module is looked through once, but those of the model's `own` classes every time."""
    for name in (set(sys.modules) - _found.keys()) | own:
        names = getattr(sys.modules.get(name), "__dict__", {})
        other = name.partition(".")[0] in _OTHERS
        _found[name] = [] if other else [(names, k) for k, v in names.items() if is_cached(v)]
    return [place for places in _found.values() for place in places]


def _set(cls: type, name: str, kind: Any, value: Any) -> None:
    setattr(cls, name, value if kind is None else kind(value))
