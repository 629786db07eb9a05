"""Instruction sets: runs a file in processes limited to older instruction sets of the CPU.

OpenVINO's kernels use nothing newer than ONEDNN_MAX_CPU_ISA names. ONNX Runtime's have no such
switch; where qemu's user mode emulation (qemu-x86_64) is installed, they run on older processors
that it emulates."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from repfx.errors import CheckError, InputError, unknown
from repfx.lowering.runtimes import sessions

# By oneDNN's names, oldest first, with the CPU capability that each needs.
_ONEDNN = {
    "SSE41": "sse4_1",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx_vnni",
    "AVX512_CORE": "avx512_bw",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_fp16",
    "AVX512_CORE_AMX": "amx_int8",
}
_EMULATED = {"SSE4.2 (emulated)": "Nehalem", "AVX2 (emulated)": "Haswell"}


@dataclass(frozen=True)
class Isa:
    """An instruction set that a process can be limited to.

    `variables`: environment variables that do it. `emulator`: a command before the process's own
    that does it."""

    name: str
    variables: tuple[tuple[str, str], ...] = ()
    emulator: tuple[str, ...] = ()

    def run(
        self, runtime: str, files: Sequence[onnx.ModelProto], inputs: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """The files' outputs, all from one process. Raises CheckError where the process fails."""
        return self.run_all(runtime, [(file, inputs) for file in files])

    def run_all(
        self, runtime: str, tasks: Sequence[tuple[onnx.ModelProto, Sequence[Tensor]]]
    ) -> list[list[Tensor]]:
        """The same, each file with inputs of its own."""
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            for i, (model, inputs) in enumerate(tasks):
                at = folder / str(i)
                at.mkdir()
                onnx.save(model, at / "model.onnx")
                np.savez(at / "inputs.npz", *(x.detach().cpu().numpy() for x in inputs))
            (folder / "task.json").write_text(json.dumps({"runtime": runtime, "files": len(tasks)}))
            command = [*self.emulator, sys.executable, str(Path(sessions.__file__)), text]
            ended = subprocess.run(
                command, env={**os.environ, **dict(self.variables)}, capture_output=True, text=True
            )
            if ended.returncode:
                said = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
                raise CheckError(
                    f"{runtime} on {self.name} does not run the file: {said[-1][:300]}"
                )
            return [_tensors(folder / str(i) / "outputs.npz") for i in range(len(tasks))]


def _tensors(path: Path) -> list[Tensor]:
    with np.load(path) as held:
        return [torch.from_numpy(held[name]) for name in held.files]


def isas(runtime: str) -> list[Isa]:
    """The instruction sets the runtime can be limited to here, oldest first; perhaps none."""
    if runtime == "openvino":
        able = torch.cpu.get_capabilities()
        return [
            Isa(name, (("ONEDNN_MAX_CPU_ISA", name),))
            for name, needs in _ONEDNN.items()
            if able.get(needs)
        ]
    qemu = shutil.which("qemu-x86_64")
    emulated = [Isa(name, emulator=(qemu, "-cpu", cpu)) for name, cpu in _EMULATED.items() if qemu]
    return [isa for isa in emulated if _starts(isa.emulator)]


@functools.cache
def _starts(emulator: tuple[str, ...]) -> bool:
    """Whether numpy and ONNX Runtime start on an emulated processor; newer builds need newer ones.

    It takes a few seconds."""
    command = [*emulator, sys.executable, "-c", "import numpy, onnxruntime"]
    return subprocess.run(command, capture_output=True).returncode == 0


def chosen(runtime: str, wanted: str) -> list[Isa]:
    """The named ones of a comma-separated list, or all for "all". Raises InputError for others."""
    there = {isa.name: isa for isa in isas(runtime)}
    if not there:
        raise InputError(
            "ONNX Runtime has no switch for the instruction set; install qemu-user to emulate "
            "older processors"
        )
    if wanted == "all":
        return list(there.values())
    for name in wanted.split(","):
        if name not in there:
            raise unknown("instruction set", name, there)
    return [there[name] for name in wanted.split(",")]


def running() -> str:
    """The CPU, its newest instruction set, and the limit set by ONEDNN_MAX_CPU_ISA, if any."""
    able = torch.cpu.get_capabilities()
    newest = next(
        (name for name, needs in reversed(_ONEDNN.items()) if able.get(needs)), "none of these"
    )
    told = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{able.get('cpu_name', 'CPU')}, {newest}" + (
        f", ONEDNN_MAX_CPU_ISA={told}" if told else ""
    )
