"""Reads archives of torch.export without running code from them.

`torch.export.load` trusts its file: it unpickles some entries, evaluates size expressions as
Python, compiles guards, and looks operators up by dotted names. So an archive is checked here
first, and loaded only if each of these is harmless."""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from repfx.errors import InputError
from repfx.files.allowed import is_computation

_ENTRIES = re.compile(
    r"(archive_format|archive_version|byteorder|version|\.data/\w+|models/\w+\.json"
    r"|data/(weights/(weight_\d+|\w+_config\.json)|constants/(tensor_\d+|\w+_config\.json)|sample_inputs/\w+\.pt))"
)
_TARGETS = re.compile(
    r"torch\.ops\.aten\.\w+(\.\w+)?|_operator\.(?!attrgetter|itemgetter|methodcaller|call)\w+|math\.\w+"
)
_NAMES = re.compile(r"L|[suz]\d+|[suz]f?\d+")
_CALLS = {
    "FloorDiv",
    "CeilDiv",
    "Mod",
    "PythonMod",
    "ModularIndexing",
    "Max",
    "Min",
    "Integer",
    "Add",
    "Mul",
    "Pow",
}
_CALLS |= {"Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "IntInfinity"}
_READS = {"size", "stride", "storage_offset", "shape", "ndim", "dtype", "device"}


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether the file is an archive of torch.export, judged by its content."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(
            name.endswith("/archive_format") or name == "archive_format"
            for name in archive.namelist()
        )


def load_exported(
    path: str | os.PathLike[str], trust: bool = False
) -> torch.export.ExportedProgram:
    """Loads an archive written by `torch.export.save`.

    Raises InputError if it is damaged, or if loading it would run code from it. `trust` skips the
    second check."""
    if not trust:
        try:
            with zipfile.ZipFile(path) as archive:
                for why in _dangers(archive):
                    raise InputError(
                        f"{path} {why}; loading it would run code from it (--trust-pickle does so)"
                    )
        except (zipfile.BadZipFile, ValueError, KeyError) as error:
            raise InputError(f"{path} is damaged: {error}") from error
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    try:
        if not trust:
            os.environ[key] = "1"
        return torch.export.load(Path(path))
    except Exception as error:
        raise InputError(
            f"torch.export cannot load {path}: {str(error).strip().splitlines()[0][:200]}"
        ) from error
    finally:
        if not trust:
            os.environ.pop(key, None) if before is None else os.environ.__setitem__(key, before)


def from_exported(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module with its original names, without the guards that export adds."""
    module = program.module()
    for node in list(module.graph.nodes):
        if node.op == "call_module" and not node.users and str(node.target).startswith("_guards"):
            module.graph.erase_node(node)
            delattr(module, str(node.target))
    result = fx.GraphModule(module, module.graph)
    for name in ("_parameters", "_buffers", "_modules"):
        result.__dict__[name] = module.__dict__[name]
    # Constants of the forward are plain attributes.
    result.__dict__.update({k: v for k, v in vars(module).items() if isinstance(v, Tensor)})
    return result


def _dangers(archive: zipfile.ZipFile) -> Iterator[str]:
    root = archive.namelist()[0].split("/")[0] + "/"
    for name in archive.namelist():
        short = name.removeprefix(root)
        if not _ENTRIES.fullmatch(short):
            yield f"contains {short!r}, which is not plain data"
        elif short.endswith(".json"):
            yield from _in_json(json.loads(archive.read(name)), "")


def _in_json(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _in_json(v, k)
    elif isinstance(value, list):
        for v in value:
            yield from _in_json(v, key)
    elif key == "use_pickle" and value:
        yield "contains pickled tensors"
    elif isinstance(value, str):
        if key in ("expr_str", "guards_code") and not _is_arithmetic(value):
            yield f"contains the expression {value[:60]!r}"
        elif key == "target" and not (_TARGETS.fullmatch(value) and _computes(value)):
            yield f"calls {value[:60]!r}"
        elif (key == "name" or key.endswith("_name")) and not re.fullmatch(r"[\w.]*", value):
            yield f"contains the name {value[:60]!r}"


def _computes(target: str) -> bool:
    """Whether a target computes from tensors, if it is an aten operator.

    The pattern of the other targets allows arithmetic only."""
    if not target.startswith("torch.ops.aten."):
        return True
    op, _, overload = target.removeprefix("torch.ops.aten.").partition(".")
    found = getattr(getattr(torch.ops.aten, op, None), overload or "default", None)
    return is_computation(found)


def _is_arithmetic(text: str) -> bool:
    """Whether an expression has sizes, integers and arithmetic only, so evaluating it is safe."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return False
    return _plain(tree)


def _plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        # No strings: torch would evaluate them as expressions again.
        return isinstance(node.value, (int, float, bool))
    if isinstance(node, ast.Name):
        return bool(_NAMES.fullmatch(node.id))
    if isinstance(node, ast.Attribute):
        return node.attr in _READS and _plain(node.value)
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    ):
        return (
            isinstance(node.value, ast.Name)
            and node.value.id == "L"
            and node.slice.value.isidentifier()
        )
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "Symbol":
            named = [
                a.value
                for a in node.args
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
            flags = all(
                isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool)
                for k in node.keywords
            )
            return flags and len(node.args) == len(named) == 1 and bool(_NAMES.fullmatch(named[0]))
        known = isinstance(node.func, ast.Name) and node.func.id in _CALLS
        method = isinstance(node.func, ast.Attribute) and _plain(node.func)
        return (known or method) and not node.keywords and all(_plain(a) for a in node.args)
    allowed = (
        ast.BinOp,
        ast.UnaryOp,
        ast.Compare,
        ast.BoolOp,
        ast.Subscript,
        ast.operator,
        ast.unaryop,
        ast.cmpop,
    )
    if isinstance(node, (*allowed, ast.boolop, ast.expr_context, ast.Tuple)):
        return all(_plain(child) for child in ast.iter_child_nodes(node))
    return False
