"""Instruction sets: one file run by processes that stop at each one that this machine can show.

OpenVINO's kernels stop at what ONEDNN_MAX_CPU_ISA names. ONNX Runtime's cannot be told; where
qemu's user mode emulation (qemu-x86_64) is installed, they run on older processors that it
emulates."""

from __future__ import annotations

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

# As oneDNN calls them, oldest first, with the capability of the CPU that each takes.
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
    """`name`, and how a process is made to stop there: by `variables` of its environment or a
    command before its own.
    """

    name: str
    variables: tuple[tuple[str, str], ...] = ()
    emulator: tuple[str, ...] = ()

    def run(
        self, runtime: str, files: Sequence[onnx.ModelProto], inputs: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """What the files give, all in one process. Raises CheckError where it ends without a
        result.
        """
        return self.run_all(runtime, [(file, inputs) for file in files])

    def run_all(
        self, runtime: str, tasks: Sequence[tuple[onnx.ModelProto, Sequence[Tensor]]]
    ) -> list[list[Tensor]]:
        """The same with inputs for each file."""
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
    """The instruction sets that the runtime can be made to stop at on this machine, oldest first;
    perhaps none.
    """
    if runtime == "openvino":
        able = torch.cpu.get_capabilities()
        return [
            Isa(name, (("ONEDNN_MAX_CPU_ISA", name),))
            for name, needs in _ONEDNN.items()
            if able.get(needs)
        ]
    qemu = shutil.which("qemu-x86_64")
    return (
        [Isa(name, emulator=(qemu, "-cpu", cpu)) for name, cpu in _EMULATED.items()] if qemu else []
    )


def chosen(runtime: str, wanted: str) -> list[Isa]:
    """Those of a comma-separated list, or of "all". Raises InputError naming the ones there are."""
    there = {isa.name: isa for isa in isas(runtime)}
    if not there:
        raise InputError(
            "ONNX Runtime cannot be told to stop at an instruction set; qemu-user emulates some"
        )
    if wanted == "all":
        return list(there.values())
    for name in wanted.split(","):
        if name not in there:
            raise unknown("instruction set", name, there)
    return [there[name] for name in wanted.split(",")]


def running() -> str:
    """What this process runs on: the newest instruction set of the CPU, and where it was told to
    stop.
    """
    able = torch.cpu.get_capabilities()
    newest = next(
        (name for name, needs in reversed(_ONEDNN.items()) if able.get(needs)), "none of these"
    )
    told = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{able.get('cpu_name', 'CPU')}, {newest}" + (
        f", ONEDNN_MAX_CPU_ISA={told}" if told else ""
    )
