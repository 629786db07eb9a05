"""The one place that imports `tensorrt`: the module, the GPU, the log and the progress bars."""

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
    """The tensorrt module, and the name and compute capability of the GPU.

    Raises MissingPart where one of them is missing; its message ends with `elsewhere`."""
    return tensorrt(elsewhere), gpu_for(elsewhere)


def gpu_for(elsewhere: str) -> dict[str, str]:
    """The name and compute capability of the GPU.

    Raises MissingPart where torch sees none; its message ends with `elsewhere`."""
    gpu = _gpu()
    if gpu is None:
        raise MissingPart(f"torch sees no CUDA device, and TensorRT needs one{elsewhere}")
    return gpu


def tensorrt(elsewhere: str = "") -> Any:
    """The tensorrt module.

    Raises MissingPart where it is missing or older than 10; its message ends with `elsewhere`."""
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


def usable() -> bool:
    """Whether TensorRT 10 or later and a GPU are here."""
    try:
        tensorrt()
    except MissingPart:
        return False
    return _gpu() is not None


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    return _gpu() is not None


def _gpu() -> dict[str, str] | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}


@functools.cache
def log_of(trt: Any) -> Any:
    """The one logger of the process; `errors` are the messages since they were last cleared.

    TensorRT keeps using the first logger it is given and never frees it, so there is only one."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log()


def joined(errors: Iterable[str]) -> str:
    """The logged errors as the end of a sentence.

    >>> joined([])
    'it gives no reason'
    """
    return "; ".join(dict.fromkeys(errors)) or "it gives no reason"


@contextlib.contextmanager
def watched(trt: Any, progress: bool) -> Iterator[Any]:
    """A progress monitor: after Ctrl-C TensorRT stops at its next step, and `stopped` is true.

    `progress`: show bars on the terminal. An exception must not pass through TensorRT, so the
    signal handler only sets `stopped`. Signals can be caught in the main thread only."""

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
