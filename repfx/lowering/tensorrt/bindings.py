"""The `tensorrt` module and the GPU, where they are: the one place that imports it, its log and its
progress.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from rich.progress import Progress, TaskID

from repfx.errors import MissingPart

Place = str | os.PathLike[str]
OLDEST = 10


def present(elsewhere: str) -> tuple[Any, dict[str, str]]:
    """The tensorrt module and the GPU: its name and compute capability.

    Raises MissingPart where one of them is not there; its message ends in `elsewhere`.
    """
    trt = tensorrt(elsewhere)
    gpu = _gpu()
    if gpu is None:
        raise MissingPart(f"torch sees no CUDA device, and TensorRT needs one{elsewhere}")
    return trt, gpu


def tensorrt(elsewhere: str = "") -> Any:
    """The module. Raises MissingPart, its message ending in `elsewhere`, where it is missing or
    older than 10.
    """
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        raise MissingPart(
            f"TensorRT is not installed ({error}): pip install tensorrt{elsewhere}"
        ) from error
    if int(str(trt.__version__).split(".")[0]) < OLDEST:
        raise MissingPart(
            f"TensorRT {trt.__version__} is too old: pip install 'tensorrt>={OLDEST}'{elsewhere}"
        )
    return trt


def _gpu() -> dict[str, str] | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}


@functools.cache
def log_of(trt: Any) -> Any:
    """The one logger of the process, which keeps `errors`: TensorRT holds on to the first it is
    given and frees none.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log()


def joined(errors: Iterable[str]) -> str:
    """What the log holds, as the end of a sentence.

    >>> joined([])
    'it says no reason'
    """
    return "; ".join(dict.fromkeys(errors)) or "it says no reason"


@contextlib.contextmanager
def watched(trt: Any, progress: bool) -> Iterator[Any]:
    """A progress monitor that Ctrl-C stops: TensorRT then ends at its next step and `stopped` is
    true.

    `progress`: bars on the terminal. An exception must not pass through TensorRT, so the signal
    only sets the mark; it can be caught in the main thread alone."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.bars = Progress(disable=not progress)
            self.tasks: dict[str, TaskID] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.tasks[phase_name] = self.bars.add_task(phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.tasks:
                self.bars.update(self.tasks[phase_name], completed=step + 1)
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.tasks:
                self.bars.remove_task(self.tasks.pop(phase_name))

    monitor = Monitor()

    def stop(*_: Any) -> None:
        monitor.stopped = True

    listens = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, stop) if listens else None
    try:
        with monitor.bars:
            yield monitor
    finally:
        if listens:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)
