"""A deadline for long work, which checks it between two batches or steps.

with within(60):
    repfx.reconstruct(model, batches)   # raises OutOfTime after 60 seconds
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from repfx.errors import OutOfTime

_ends: ContextVar[float] = ContextVar("deadline", default=float("inf"))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Inside, work that takes longer raises OutOfTime. An earlier deadline outside still holds."""
    before = _ends.set(min(_ends.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _ends.reset(before)


def check_time() -> None:
    """Raises OutOfTime after the deadline. Call it where work can stop without harm."""
    if time.monotonic() > _ends.get():
        raise OutOfTime("the time is used up")
