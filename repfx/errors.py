"""Errors the caller can act on, and `Declined`, a value: leaving a graph alone is not a failure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class RepfxError(Exception):
    """Base class of every error raised on purpose. The command line exits with `exit_code`."""

    exit_code = 1


class InputError(RepfxError):
    """The caller's input cannot be used: a file, a name, a shape, a batch."""

    exit_code = 2


class CheckError(RepfxError):
    """A result is wrong: a trace, merge or lowered file does not compute what its source does."""

    exit_code = 1


class MissingPart(RepfxError):
    """An optional dependency is not installed. The message names the extra to install."""

    exit_code = 3


class OutOfTime(RepfxError):
    """Work was stopped at its deadline; what was finished before is kept."""

    exit_code = 1


class Inexact(RepfxError):
    """Raised inside the algebra if a composition is not exactly one convolution.

    `cure` is a hint: what would make it one. It may be empty."""

    def __init__(self, reason: str, cure: str = "") -> None:
        super().__init__(reason)
        self.reason, self.cure = reason, cure


@dataclass(frozen=True)
class Declined:
    """A part of a model that was not changed: where it is, and why.

    `cure` is a hint: what would make the part mergeable. It may be empty."""

    where: str
    reason: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.cure})" if self.cure else "")


def unknown(kind: str, given: str, valid: Iterable[str]) -> InputError:
    """The error for an unknown name. Its message lists the valid names.

    >>> str(unknown("method", "mad", ["max", "mae"]))
    "unknown method 'mad'; choose one of: mae, max"
    """
    return InputError(f"unknown {kind} {given!r}; choose one of: {', '.join(sorted(valid))}")
