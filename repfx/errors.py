"""Errors a person can act on, and `Declined`: a value, because leaving a graph alone is no
failure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class RepfxError(Exception):
    """Base of every error raised on purpose. `exit_code` is what the command line returns for
    it."""

    exit_code = 1


class InputError(RepfxError):
    """The caller's input cannot be used: a file, a name, a shape, a batch."""

    exit_code = 2


class CheckError(RepfxError):
    """A result was computed and is wrong: a trace, a merge or a lowered file that does not equal
    its source.
    """

    exit_code = 1


class MissingPart(RepfxError):
    """An optional part is not installed. The message names the extra that brings it."""

    exit_code = 3


class Inexact(RepfxError):
    """Raised inside the algebra where a composition is not exactly one convolution; `cure` says
    what would make it so.
    """

    def __init__(self, reason: str, cure: str = "") -> None:
        super().__init__(reason)
        self.reason, self.cure = reason, cure


@dataclass(frozen=True)
class Declined:
    """A part of a model that was left alone: where it is, why, and what would make it mergeable
    (may be empty).
    """

    where: str
    reason: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.cure})" if self.cure else "")


def unknown(kind: str, given: str, valid: Iterable[str]) -> InputError:
    """The error for a name that is none of the valid ones.

    >>> str(unknown("method", "mad", ["max", "mae"]))
    "unknown method 'mad'; choose one of: mae, max"
    """
    return InputError(f"unknown {kind} {given!r}; choose one of: {', '.join(sorted(valid))}")
