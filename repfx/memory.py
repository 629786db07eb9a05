"""Keeps freed memory in the process during long work, instead of mapping it anew for each batch.

glibc gives a large buffer back to the system when it is freed, and every page of the next one has
to be mapped and cleared again. In `reconstruct` that took a quarter of the time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# malloc.h of glibc: what mallopt sets, the value for long work, and the value afterwards. Those are
# what glibc settles on by itself; once anything is set it stops adapting.
_MMAP_MAX, _TRIM, _MMAP_FROM = -4, -1, -3
_DURING = {_MMAP_MAX: 0, _TRIM: 2**31 - 1}
_AFTER = {_MMAP_MAX: 65536, _TRIM: 2**26, _MMAP_FROM: 2**25}

_inside = 0


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, memory that is freed stays in the process. Afterwards it goes back to the system.

    Does nothing where the C library is not glibc."""
    global _inside
    libc = _glibc()
    if libc is None:
        yield
        return
    try:
        _inside += 1
        if _inside == 1:
            _set(libc, _DURING)
        yield
    finally:
        _inside -= 1
        if not _inside:
            _set(libc, _AFTER)
            libc.malloc_trim(0)


def _glibc() -> Any:
    try:
        libc = ctypes.CDLL(None)
        return libc if all(hasattr(libc, f) for f in ("mallopt", "malloc_trim")) else None
    except (OSError, TypeError):  # TypeError: Windows needs a name
        return None


def _set(libc: Any, values: dict[int, int]) -> None:
    for name, value in values.items():
        libc.mallopt(name, value)
