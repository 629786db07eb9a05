"""The house: floors, sizes, packages, and no code for one model."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
import warnings
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import repfx

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"errors", "tolerances"},
    {"processes", "deadline", "memory"},
    {"algebra", "quant", "blocks", "data"},
    {"graph"},
    {"files"},
    {"capture"},
    {"rewrite", "placement"},
    {"passes", "training", "calibration", "lowering"},
    {"reporting"},
    {"api", "testing", "ladder"},
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


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["repfx", *parts] if parts[0] == "passes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Nor inside a function, nor for its types alone."""
    files = {module_name(p): p for p in FILES}
    reads: dict[str, set[str]] = {}
    for name, path in files.items():
        reads[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                below = {f"{node.module}.{a.name}" for a in node.names}
                reads[name] |= (below & set(files)) or ({node.module} & set(files))
            elif isinstance(node, ast.Import):
                reads[name] |= {a.name for a in node.names} & set(files)
    try:
        TopologicalSorter(reads).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


LINES, PARAMETERS = 50, 6


def torch_arguments() -> set[str]:
    """What torch calls the arguments of its layers and operators: a function that takes these takes
    them all, in torch's order."""
    found: set[str] = set()
    for kind in (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.AvgPool2d):
        found |= set(inspect.signature(kind).parameters)
    aten = torch.ops.aten
    for op in (aten.convolution, aten.batch_norm, aten.avg_pool2d):
        found |= {a.name for a in op.default._schema.arguments}
    return found


def public_functions(path: Path) -> set[str]:
    """Of this file, the functions that it, its package or repfx itself names in `__all__`."""
    mine = module_name(path)
    found = set()
    for name in {"repfx", mine.rpartition(".")[0] or mine, mine}:
        if name.endswith("__main__"):  # to import it is to run it
            continue
        module = import_module(name)
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            if inspect.isfunction(thing) and thing.__module__ == mine:
                found.add(public)
    return found


def oversized(path: Path) -> Iterator[str]:
    """The functions of a file that are too long, or take too much. The signature of a command, of a
    public function and of a class that its package offers is its documentation, and is not counted.
    """
    torchs = torch_arguments() | {"self", "cls"}
    tree, public = ast.parse(path.read_text()), public_functions(path)
    room = module_name(path).rpartition(".")[0] or "repfx"
    offered = getattr(import_module(room), "__all__", ())
    makers = [
        f for c in tree.body if isinstance(c, ast.ClassDef) and c.name in offered for f in c.body
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        a = node.args
        taken = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in torchs]
        command = any(ast.unparse(d).startswith("app.command(") for d in node.decorator_list)
        open_ = node.name in public or (node.name == "__init__" and node in makers)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        first = body[0].lineno if command or open_ else node.lineno
        text = 0
        if ast.get_docstring(node) and not (command or open_):
            text = node.body[0].end_lineno - node.body[0].lineno + 1  # type: ignore[operator]
        long = (node.end_lineno or 0) - first + 1 - text > LINES if body else False
        if long or (len(taken) > PARAMETERS and not command and not open_):
            yield f"{path.relative_to(ROOT)}: {node.name}"


def test_functions_are_short_and_take_few_things() -> None:
    found = [name for path in FILES for name in oversized(path)]
    assert not found, f"too long, or takes too much: {found}"


def test_the_page_on_architecture_has_these_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    told = {
        (int(n), room) for n, room in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)
    }
    assert told == {(i, room) for i, rooms in enumerate(FLOORS) for room in rooms}


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_what_we_call_is_not_deprecated(kind: type[Warning]) -> None:
    """A warning charged to our code is an error, one charged to a library's is not."""
    warnings.warn_explicit("old", kind, "there.py", 1, module="torch.export")
    with pytest.raises(kind):
        warnings.warn_explicit("old", kind, "here.py", 1, module="repfx.lowering.onnx.exporter")
