"""TensorRT for RTX: builds engines on any machine, without a GPU, for the GPUs that are named.

The build runs in a process of its own (`builder`): a bad file can end that process, and Ctrl-C ends
it at once."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from repfx.errors import CheckError, InputError, MissingPart
from repfx.lowering.tensorrt import builder
from repfx.lowering.tensorrt.bindings import joined
from repfx.lowering.tensorrt.plan import Plan, plan_from

NAME = "TensorRT for RTX"
OLDEST = (1, 7)  # older ones refuse convolutions between Q and DQ
MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
# Compute capabilities that it builds for, and its names for them.
CAPABILITIES = {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121"}


def module() -> str | None:
    """The name of the module, or None where TensorRT for RTX is not installed."""
    return next((name for name in MODULES if importlib.util.find_spec(name) is not None), None)


def capabilities(names: Sequence[str]) -> list[str]:
    """The builder's names for compute capabilities. Raises InputError for one it does not know."""
    unknown = [name for name in names if name not in CAPABILITIES]
    if unknown:
        raise InputError(
            f"{NAME} builds for compute capability {', '.join(CAPABILITIES)}, not {unknown[0]!r}"
        )
    return [CAPABILITIES[name] for name in names]


@dataclass
class Job:
    """What to build. `cache` is a timing cache, `shapes` are the sizes of the dynamic inputs."""

    onnx: Path
    shapes: builder.Shapes
    workspace_gib: float
    capabilities: list[str]
    cache: bytes | None = None
    progress: bool = False


@dataclass
class Built:
    """What came of it: the engine, the timing cache, what the engine is made of, and by whom."""

    engine: bytes
    cache: bytes
    plan: Plan
    version: str


def build(job: Job) -> Built:
    """Builds the engine in a process of its own.

    Raises MissingPart where it is not installed or too old, InputError where the parser refuses the
    file, CheckError where no engine is built, KeyboardInterrupt on Ctrl-C."""
    name = module()
    if name is None:
        raise MissingPart(f"{NAME} is not installed: pip install 'repfx[rtx]'")
    with tempfile.TemporaryDirectory() as folder:
        engine, cache = Path(folder) / "engine", Path(folder) / "cache"
        cache.write_bytes(job.cache or b"")
        order = {
            "module": name,
            "onnx": str(job.onnx),
            "plan": str(engine),
            "cache": None if job.cache is None else str(cache),
            "shapes": job.shapes,
            "workspace_mib": int(job.workspace_gib * 1024),
            "compute_capability": job.capabilities,
        }
        heard = _Heard(job.progress)
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(order))
        with _process(file) as process:
            code = heard.listen(process)
        heard.check(job.onnx, code)
        return Built(
            engine.read_bytes(), cache.read_bytes(), plan_from(heard.layers), heard.version
        )


@contextmanager
def _process(job: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that builds. It is ended if this one is interrupted."""
    command = [sys.executable, "-P", builder.__file__, str(job)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@dataclass
class _Heard:
    """What the building process says, shown as progress and kept."""

    progress: bool
    version: str = ""
    errors: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    failed: list[str] | None = None
    layers: list[str] = field(default_factory=list)
    done: bool = False
    other: list[str] = field(default_factory=list)  # lines that are not ours, such as a traceback

    def listen(self, process: subprocess.Popen[str]) -> int:
        """Reads to the end. Returns the exit code of the process, negative for a signal."""
        tasks: dict[str, TaskID] = {}
        with Progress(disable=not self.progress) as bars:
            for line in process.stdout or ():
                event = _event(line)
                if event is None:
                    self.other = [*self.other[-19:], line.rstrip()]
                elif "phase" in event:
                    _show(bars, tasks, event)
                else:
                    self._note(event)
        return process.wait()

    def _note(self, event: dict[str, Any]) -> None:
        self.version = event.get("version", self.version)
        self.refused = event.get("refused", self.refused)
        self.failed = event.get("failed", self.failed)
        if "error" in event:
            self.errors.append(event["error"])
        if "layers" in event:
            self.layers, self.done = event["layers"], True

    def check(self, onnx: Path, code: int) -> None:
        """Raises the error that says why there is no engine, if there is none."""
        who = f"{NAME} {self.version}".strip()
        numbers = tuple(int(n) for n in re.findall(r"\d+", self.version)[:2])
        if numbers and numbers < OLDEST:
            least = ".".join(map(str, OLDEST))
            raise MissingPart(f"{who} is too old: pip install 'repfx[rtx]' for {least} or later")
        if self.refused:
            raise InputError(f"{who} cannot read {onnx}:{listed(self.refused)}")
        if self.failed is not None:
            why = joined([*self.failed, *self.errors])
            raise CheckError(f"{who} built no engine from {onnx}: {why}")
        if not self.done:
            how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
            why = joined([*self.errors, *self.other[-1:]])
            raise CheckError(f"{who} {how} while it built an engine from {onnx}: {why}")


def _event(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _show(bars: Progress, tasks: dict[str, TaskID], event: dict[str, Any]) -> None:
    phase = event["phase"]
    if "total" in event:
        tasks[phase] = bars.add_task(phase, total=event["total"])
    elif phase in tasks and event["step"] is None:
        bars.remove_task(tasks.pop(phase))
    elif phase in tasks:
        bars.update(tasks[phase], completed=event["step"])


def listed(found: Sequence[str], most: int = 10) -> str:
    """The first of several messages, each on a line of its own."""
    more = f"\n  and {len(found) - most} more" if len(found) > most else ""
    return "".join(f"\n  {text}" for text in found[:most]) + more
