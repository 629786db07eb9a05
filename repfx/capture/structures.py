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
