"""`import repfx` costs next to nothing: what is heavy is imported when it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import repfx

HOMES: dict[str, tuple[str, ...]] = vars(repfx)["_HOMES"]
ROOMS: tuple[str, ...] = vars(repfx)["_ROOMS"]
HEAVY = {"networkx", "onnx", "onnxruntime", "onnxscript", "safetensors", "rich", "typer"}
SMALL = "torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()"


def loaded(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after this code."""
    code += "\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_repfx_loads_nothing_heavy() -> None:
    found = loaded("import repfx")
    assert "repfx" in found and not found & (HEAVY | {"torch", "numpy"})


def test_a_merge_needs_no_file_formats_and_no_printing() -> None:
    found = loaded(f"import torch, repfx\nrepfx.transform({SMALL}, ['fuse'])")
    assert "networkx" in found and not found & (HEAVY - {"networkx"})


def test_lint_needs_no_runtime() -> None:
    found = loaded("from repfx import lint")
    assert "onnx" in found and not found & {"onnxruntime", "onnxscript", "rich", "typer"}


def test_every_public_name_is_found() -> None:
    names = ", ".join([*repfx.__all__, *ROOMS])
    loaded(f"from repfx import {names}\nimport repfx\nassert repfx.lower is lower")


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse(Path(repfx.__file__).read_text())
    (choice,) = [n for n in tree.body if isinstance(n, ast.If)]
    typed = {
        (n.module, a.name) for n in choice.body if isinstance(n, ast.ImportFrom) for a in n.names
    }
    homes = {(home, name) for home, names in HOMES.items() for name in names}
    assert typed == homes | {("repfx", room) for room in ROOMS}


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        repfx.__getattr__("fuse")
    assert {*repfx.__all__, "passes", "__version__"} <= set(dir(repfx))


@pytest.mark.parametrize("command", [["-m", "repfx"], ["-c", "from repfx.cli import main; main()"]])
def test_the_version(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"repfx {repfx.__version__}\n")
