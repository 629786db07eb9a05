"""processes: the processes of one job, as `torchrun` or `accelerate launch` starts them.

Each runs the same program. What they find is put together with `gathered`, so that all continue
with the same result. Alone, a process gathers its own value only."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from repfx.errors import InputError


def joined() -> bool:
    """Whether this process is in a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def place() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are.

    Joins the others first if a launcher has started several and nobody has joined them yet."""
    if torch.distributed.is_available() and not joined() and _launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.distributed.init_process_group()
        atexit.register(leave)
    if not joined():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gathered(value: Any) -> list[Any]:
    """The value of each process, in their order. Every process must call it."""
    _, world = place()
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, value)
    return found


def add_up(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes."""
    if place()[1] > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


@contextmanager
def agreed() -> Iterator[None]:
    """An error inside, in any process, is an error in all of them, and not an endless wait."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    others = gathered(None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    for number, message in enumerate(others):
        if message is not None:
            raise InputError(f"process {number} has failed: {message}")


def leave() -> None:
    """Leaves the process group, and gives its threads time to finish.

    A thread of gloo needs the interpreter to let go of the tensors of its last collective. It
    waits up to 5 ms for its turn, and the process aborts if the interpreter has ended by then.
    The threads live on after the group is destroyed (torch 2.13), so they cannot be joined.
    """
    if joined():
        torch.distributed.destroy_process_group()
    time.sleep(0.5)  # also where the caller has left the group: the threads are still there


def _launched() -> bool:
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in variables) and int(os.environ["WORLD_SIZE"]) > 1
