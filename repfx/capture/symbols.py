"""Symbols: the sizes of traced values, as numbers that know where they come from.

    h = x.shape[2]                 224, and the node x.size(2)
    h // 32                        7, and the node x.size(2) // 32
    if h % 32: raise ...           the fact x.size(2) % 32 == 0

A symbol is an int or a float, so the model's Python runs as usual. What is computed from symbols is
a symbol. A decision needs the number itself: then a fact is recorded, which the graph checks at
every call. Python's own `range` takes the number without asking, so a trace has one that asks.
"""

from __future__ import annotations

import builtins
import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import fx


class Recording(Protocol):
    """What a symbol needs of the recorder."""

    def operation(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node: ...

    def fact(self, left: Any, relation: str, right: Any) -> None: ...


class Symbol:
    """What integers and floats that are traced have in common."""

    recorder: Recording
    make: Callable[[], fx.Node]
    _node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        """The node of this number. It is made when something first needs it."""
        if self._node is None or self._node._erased:
            self._node = self.make()
        return self._node


def symbol(value: Any, recorder: Recording, make: Callable[[], fx.Node]) -> Any:
    """The number as a symbol. Anything else, such as a bool, as it is."""
    kind = {int: Integer, float: Real}.get(type(value))
    if kind is None:
        return value
    made: Any = kind(value)
    made.recorder, made.make = recorder, make
    return made


def plain(value: Any) -> Any:
    """The number without its source."""
    if isinstance(value, Integer):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, Real) else value


def _binary(function: Callable[..., Any], reflected: bool = False) -> Any:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            if function is operator.mul and isinstance(other, (list, tuple, str, bytes)):
                self.recorder.fact(self, "==", plain(self))  # so many copies of a list
            return NotImplemented
        pair = (other, self) if reflected else (self, other)
        return _computed(self, function, pair)

    return method


def _unary(function: Callable[..., Any]) -> Any:
    def method(self: Any, *rest: Any) -> Any:
        return _computed(self, function, (self, *rest))

    return method


def _computed(of: Symbol, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    value = function(*map(plain, args))
    recorder = of.recorder
    return symbol(value, recorder, lambda: recorder.operation(function, args))


def _compared(relation: str, function: Callable[..., bool], otherwise: str) -> Any:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        found = function(plain(self), plain(other))
        self.recorder.fact(self, relation if found else otherwise, other)
        return found

    return method


def _fixed(convert: Callable[[Any], Any]) -> Any:
    """The plain number: from here on the graph is right for this size only."""

    def method(self: Any) -> Any:
        value = plain(self)
        self.recorder.fact(self, "==", value)
        return convert(value)

    return method


_METHODS: dict[str, Any] = {
    "__lt__": _compared("<", operator.lt, ">="),
    "__le__": _compared("<=", operator.le, ">"),
    "__gt__": _compared(">", operator.gt, "<="),
    "__ge__": _compared(">=", operator.ge, "<"),
    "__eq__": _compared("==", operator.eq, "!="),
    "__ne__": _compared("!=", operator.ne, "=="),
    "__hash__": lambda self: hash(plain(self)),
    "__repr__": lambda self: repr(plain(self)),
    "__str__": lambda self: str(plain(self)),
    "__format__": lambda self, spec: format(plain(self), spec),
    "__bool__": lambda self: self != 0,
    "__int__": _fixed(int),
    "__float__": _fixed(float),
    "__neg__": _unary(operator.neg),
    "__pos__": lambda self: self,
    "__abs__": _unary(operator.abs),
    "__round__": _unary(builtins.round),
    "__ceil__": _unary(math.ceil),
    "__floor__": _unary(math.floor),
    "__trunc__": _unary(math.trunc),
    "__divmod__": lambda self, other: (self // other, self % other),
    "__rdivmod__": lambda self, other: (other // self, other % self),
    "__reduce_ex__": lambda self, protocol: (type(plain(self)), (plain(self),)),
    "__deepcopy__": lambda self, memo: self,
    "__copy__": lambda self: self,
}
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _METHODS[f"__{_name}__"] = _binary(getattr(operator, _name))
    _METHODS[f"__r{_name}__"] = _binary(getattr(operator, _name), reflected=True)

Integer: Any = type("Integer", (Symbol, int), {**_METHODS, "__index__": _fixed(int)})
Real: Any = type("Real", (Symbol, float), dict(_METHODS))


class _IsRange(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _RANGE)


class _Range(metaclass=_IsRange):
    """range, which records as facts the sizes that say how often a loop runs."""

    def __new__(cls, *args: Any) -> Any:
        for number in args:
            if isinstance(number, Integer):
                number.recorder.fact(number, "==", plain(number))
        return _RANGE(*map(plain, args))


_RANGE = range


@contextlib.contextmanager
def ranges_ask() -> Iterator[None]:
    """Meanwhile a `range` of a size records what it rests on."""
    before = builtins.range
    builtins.range = _Range  # type: ignore[misc]
    try:
        yield
    finally:
        builtins.range = before  # type: ignore[misc]
