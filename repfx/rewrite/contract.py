"""The pass contract: what a pass declares about itself, and what the runner checks.

A pass is a frozen dataclass whose fields are its options. It declares its place in the order
(`stage`), the passes it needs (`requires`) and what it promises. The runner orders the passes, runs
them and checks each promise; if one is broken, the error names the pass and the promise."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum, IntEnum
from importlib.metadata import entry_points
from typing import Any, ClassVar

from repfx.errors import InputError, unknown
from repfx.rewrite.results import Result
from repfx.rewrite.work import Work


class Stage(IntEnum):
    """Passes run in this order, no matter in which order they are given."""

    EXPAND = 0
    STRUCTURE = 1
    TRAIN = 2
    MERGE = 3
    QUANTIZE = 4
    ADJUST = 5


class Promise(Enum):
    """What a pass can promise.

    REGIONS: every merged region computes the same as before. The methods of `Work` prove this as
    they merge; for a pass that edits the graph itself, the model's output on the example must not
    change. NAMES: every key of the state_dict stays.
    """

    REGIONS = "each merged region computes what it did"
    NAMES = "every key of the state_dict stays"


class Pass(ABC):
    """The base class of every pass."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    requires: ClassVar[tuple[str, ...]] = ()
    promises: ClassVar[frozenset[Promise]] = frozenset()

    @abstractmethod
    def run(self, work: Work) -> Result:
        """Rewrites `work.module` in place."""


REGISTRY: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    REGISTRY[cls.name] = cls
    return cls


def _registered(name: str) -> type[Pass]:
    """The pass of this name, from repfx or from an entry point in the group "repfx.passes"."""
    for entry in entry_points(group="repfx.passes", name=name) if name not in REGISTRY else ():
        try:
            cls = entry.load()
        except Exception as error:  # importing someone else's module can raise anything
            raise InputError(
                f"cannot load the pass {name!r} from {entry.value}: {error}"
            ) from error
        if not (
            isinstance(cls, type) and issubclass(cls, Pass) and getattr(cls, "name", None) == name
        ):
            raise InputError(
                f"{entry.value} is not a subclass of repfx.passes.Pass with the name {name!r}"
            )
        _check(cls)
        register(cls)
    if name not in REGISTRY:
        raise unknown(
            "pass", name, {*REGISTRY, *(e.name for e in entry_points(group="repfx.passes"))}
        )
    return REGISTRY[name]


def _check(cls: type[Pass]) -> None:
    if not isinstance(getattr(cls, "name", None), str) or not isinstance(
        getattr(cls, "stage", None), Stage
    ):
        known = ", ".join(f"Stage.{s.name}" for s in Stage)
        raise InputError(
            f"the pass {cls.__name__} must define `name`, a string, and `stage`, one of {known}"
        )
    if not is_dataclass(cls):
        raise InputError(
            f"the pass {cls.__name__} is not a dataclass: its fields are the options of the pass"
        )


def resolve(passes: Iterable[str | Pass]) -> list[Pass]:
    """The passes to run, with those they require, in order of stage.

    Each item is a name, a spec such as "ptq(bits=6)" or a pass object. Raises InputError for an
    unknown pass or option, naming the known ones.
    """
    if isinstance(passes, str):
        raise InputError(f"passes is a list: [{passes!r}]")
    try:
        passes = list(passes)
    except TypeError:
        raise InputError(f"passes is a list of names or passes, not {passes!r}") from None
    found = [parse(p) if isinstance(p, str) else p for p in passes]
    for p in found:
        if not isinstance(p, Pass):
            raise InputError(f"a pass is a name, a spec or a configured pass, not {p!r}")
        _check(type(p))
    given = {p.name: p for p in reversed(found)}
    ordered: list[Pass] = []

    def add(p: Pass) -> None:
        for name in p.requires:
            given.setdefault(name, _registered(name)())
            add(given[name])
        if all(p is not q for q in ordered):
            ordered.append(p)

    for p in found:
        add(p)
    # The sort is stable: a required pass stays before the pass that requires it.
    return sorted(ordered, key=lambda p: p.stage)


def parse(spec: str) -> Pass:
    """A pass from its spec.

    >>> import repfx.passes
    >>> parse("ptq(bits=6, per_channel=False)")  # doctest: +ELLIPSIS
    Ptq(bits=6, weight_bits=None, per_channel=False, ...)
    >>> parse("fues")  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
    ...
    repfx.errors.InputError: unknown pass 'fues'; choose one of: bnfold, expand, fuse, ptq, qarep,
    qprep, repq"""
    try:
        call = ast.parse(spec.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        call = None
    name = call.func if isinstance(call, ast.Call) else call
    if not isinstance(name, ast.Name):
        raise InputError(f"a pass is written name or name(option=value, ...), not {spec!r}")
    cls = _registered(name.id)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for unnamed in call.args if isinstance(call, ast.Call) else []:
        raise unknown(f"option of {name.id}", ast.unparse(unnamed), known or {"none"})
    for option in call.keywords if isinstance(call, ast.Call) else []:
        if option.arg not in known:
            raise unknown(f"option of {name.id}", str(option.arg), known or {"none"})
        try:
            # A bare word, as in bn=estimate, is a string.
            word = isinstance(option.value, ast.Name)
            options[option.arg] = option.value.id if word else ast.literal_eval(option.value)  # type: ignore[attr-defined]
        except ValueError:
            raise InputError(f"{option.arg} of {spec!r} is not a plain value") from None
    try:
        return cls(**options)
    except TypeError as error:
        raise InputError(f"{spec!r}: {error}") from error
