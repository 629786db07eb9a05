"""The pass contract: what a pass says of itself, and what the runner then checks.

A pass is a frozen dataclass whose fields are its options. It declares where it belongs (`stage`),
which passes it builds on (`requires`) and what it promises; the runner orders, runs and proves, and
says which promise was broken by whom."""

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
    """Passes run in this order, whatever order they are named in."""

    EXPAND = 0
    STRUCTURE = 1
    TRAIN = 2
    MERGE = 3
    QUANTIZE = 4
    ADJUST = 5


class Promise(Enum):
    """REGIONS: every merged region computes what it did. The verbs of `Work` prove that as they
    merge; a pass that rewrites the graph by itself is held to the model's output on the example.
    NAMES: every key of the state_dict stays.
    """

    REGIONS = "each merged region computes what it did"
    NAMES = "every key of the state_dict stays"


class Pass(ABC):
    """Base of every pass."""

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
    """The pass of this name, from here or from another package's entry point in the group
    "repfx.passes".
    """
    for entry in entry_points(group="repfx.passes", name=name) if name not in REGISTRY else ():
        try:
            cls = entry.load()
        except Exception as error:  # anybody's module, anybody's error
            raise InputError(
                f"the pass {name!r} of a package does not load, {entry.value}: {error}"
            ) from error
        if not (
            isinstance(cls, type) and issubclass(cls, Pass) and getattr(cls, "name", None) == name
        ):
            raise InputError(
                f"{entry.value} is no subclass of repfx.passes.Pass with the name {name!r}"
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
            f"the pass {cls.__name__} has to say its name, a string, and its stage, one of {known}"
        )
    if not is_dataclass(cls):
        raise InputError(
            f"the pass {cls.__name__} is no dataclass: its fields are the options of the pass"
        )


def resolve(passes: Iterable[str | Pass]) -> list[Pass]:
    """Names, specs such as "ptq(bits=6)" and pass objects, with what they require, in order of
    stage.

    Raises InputError for an unknown pass or option, naming the known ones.
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
    return sorted(
        ordered, key=lambda p: p.stage
    )  # stable: what is required stays before what requires it


def parse(spec: str) -> Pass:
    """A pass from its spec.

    >>> import repfx.passes
    >>> parse("ptq(bits=6, per_channel=False)")
    Ptq(bits=6, weight_bits=None, per_channel=False, weights='max', wide=(), wide_bits=8)
    >>> parse("fues")
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
