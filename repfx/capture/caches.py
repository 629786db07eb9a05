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
    found = [(put, value) for put, value in _places(modules) if is_cached(value)]
    for put, value in found:
        put(value.__wrapped__)
    try:
        yield
    finally:
        for put, value in found:
            put(value)


Put = Callable[[Any], None]


def _places(modules: list[nn.Module]) -> Iterator[tuple[Put, Any]]:
    """What may be a cached function, with what puts another value in its place."""
    classes = {c: None for cls in {type(m) for m in modules} for c in cls.__mro__}
    own = [c for c in classes if not c.__module__.startswith(("torch.", "builtins"))]
    for names in [m.__dict__ for m in modules] + [
        vars(sys.modules[name]) for name in {c.__module__ for c in own} if name in sys.modules
    ]:
        yield from ((partial(names.__setitem__, name), v) for name, v in list(names.items()))
    for cls in own:
        for name, value in list(vars(cls).items()):
            kind = type(value) if isinstance(value, (staticmethod, classmethod)) else None
            value = value if kind is None else value.__func__
            yield partial(_set, cls, name, kind), value
            for cell in getattr(value, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # it is empty
                    yield partial(setattr, cell, "cell_contents"), cell.cell_contents


def _set(cls: type, name: str, kind: Any, value: Any) -> None:
    setattr(cls, name, value if kind is None else kind(value))
