"""Structures: what a forward takes and returns, down to its tensors.

Lists, tuples, dicts and dataclasses, nested in any way; outputs of transformers are dataclasses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def parts(value: Any) -> Iterator[tuple[Any, Any, Callable[..., Any]]]:
    """The parts of a structure: (key, part, the function that reads the part by its key)."""
    if isinstance(value, (list, tuple)):
        yield from ((i, v, operator.getitem) for i, v in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name), getattr) for f in fields(value))
    elif isinstance(value, dict):
        yield from ((k, v, operator.getitem) for k, v in value.items())


def leaves(value: Any) -> list[Any]:
    """Everything in a structure that has no parts.

    >>> leaves({"boxes": [1, (2,)], "names": []})
    [1, 2]
    """
    if isinstance(value, (list, tuple, dict)) or (
        is_dataclass(value) and not isinstance(value, type)
    ):
        return [leaf for _, part, _ in parts(value) for leaf in leaves(part)]
    return [value]


def tensors_in(value: Any) -> list[Tensor]:
    return [v for v in leaves(value) if isinstance(v, Tensor)]


CONTAINERS = frozenset([list, dict, tuple])


def has_contents(value: Any) -> bool:
    """Whether it is, or holds, a list or a dict that a forward could write into."""
    if type(value) is tuple:
        return any(type(v) in CONTAINERS and has_contents(v) for v in value)
    return type(value) in CONTAINERS


class Contents:
    """The contents of lists and dicts, at any depth, so that what a forward changed can be undone.

    >>> given = ([1, 2], {"a": []})
    >>> before = Contents(given)
    >>> given[0].append(3); given[1]["a"].append(4); before.restore(); given
    ([1, 2], {'a': []})
    """

    def __init__(self, value: Any) -> None:
        self._held: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        self._note(value)

    def _note(self, value: Any) -> None:
        if type(value) in (list, dict) and id(value) not in self._seen:
            self._seen.add(id(value))
            self._held.append((value, value.copy()))
        elif type(value) is not tuple:
            return
        for part in value.values() if isinstance(value, dict) else value:
            self._note(part)

    def restore(self) -> None:
        for container, held in self._held:
            container.clear()
            container.update(held) if isinstance(held, dict) else container.extend(held)
