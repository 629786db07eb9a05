"""The house: floors, sizes, packages, and no code for one model."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import repfx

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"errors"},
    {"algebra", "quant", "blocks", "data"},
    {"graph"},
    {"files"},
    {"capture"},
    {"rewrite", "placement"},
    {"passes", "training", "calibration", "lowering"},
    {"reporting"},
    {"api", "testing"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(
    p
    for p in [*ROOT.glob("repfx/**/*.py"), *ROOT.glob("passes/*.py")]
    if "repfx/passes" not in str(p)
)


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "passes":
        return "passes"
    return parts[1].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names]
    return found


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name != "__init__.py" or room_of(p) in LEVEL], ids=str
)
def test_a_file_imports_lower_floors_only(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL, f"{room} has no floor"
    for name in imports(path):
        if not name.startswith("repfx."):
            continue
        other = name.split(".")[1]
        allowed = other == room and (room != "passes" or path.name == "__init__.py")
        # testing is built on the public functions, as another project's tests would be
        allowed |= room == "testing" and other == "api"
        assert allowed or LEVEL[other] < LEVEL[room], (
            f"{path.name} (floor {LEVEL[room]}) imports {name}"
        )


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_says_its_one_idea_and_algebra_knows_no_graph(path: Path) -> None:
    text = path.read_text()
    if LEVEL.get(room_of(path)) == 1:
        assert "torch.fx" not in text and "import fx" not in text
    assert ast.get_docstring(ast.parse(text)), f"{path.name} does not say its one idea"


def test_no_code_for_one_model() -> None:
    zoo = re.compile(
        r"timm|torchvision\.models|__class__\.__name__|type\(\w+\)\.__name__ ==", re.IGNORECASE
    )
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not zoo.search(line), f"{path.name}:{number}: {line}"


def test_every_package_is_listed() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in FILES if p.name == "__init__.py"}
    assert listed == {name if name != "passes" else "repfx.passes" for name in found}


def test_passes_has_one_name() -> None:
    assert (ROOT / "repfx" / "passes").is_symlink()
    with pytest.raises(ImportError, match=r"import repfx\.passes"):
        exec(
            compile((ROOT / "passes" / "__init__.py").read_text(), "passes", "exec"),
            {"__name__": "passes"},
        )


def test_public_functions_are_documented() -> None:
    for name in repfx.__all__:
        assert getattr(repfx, name).__doc__, name
