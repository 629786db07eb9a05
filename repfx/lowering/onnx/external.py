"""Weights that an ONNX file keeps in other files beside it."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import external_data_helper

from repfx.errors import InputError


def elsewhere(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """The names of tensors kept in other files, each with its file, subgraphs included."""
    kept = (
        t
        for t in external_data_helper._get_all_tensors(model)
        if external_data_helper.uses_external_data(t)
    )
    return [
        (t.name, next((e.value for e in t.external_data if e.key == "location"), "")) for t in kept
    ]


def require(model: onnx.ModelProto, path: Path) -> None:
    """Raises InputError where a file that holds weights of the ONNX file at `path` is missing."""
    for tensor, location in elsewhere(model):
        if not (path.parent / location).is_file():
            raise InputError(
                f"{path} keeps {tensor or 'a constant'} in "
                f"{location or 'an unnamed file'}, which is not beside it"
            )
