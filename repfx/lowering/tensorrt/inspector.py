"""Counts the layers in the engine inspector's report.

The schema of the report differs between TensorRT versions, so no entry is taken for granted."""

from __future__ import annotations

import json
import re
from typing import Any

UNKNOWN = "?"

# Longer words first, because "uint8" contains "int8" and "bfloat16" contains "float16".
_TYPES = (
    ("BF16", r"bf16|bfloat16"),
    ("UINT8", r"uint8"),
    ("INT8", r"int8"),
    ("INT4", r"int4"),
    ("FP8", r"fp8|float8|e4m3"),
    ("FP4", r"fp4|float4|e2m1"),
    ("FP16", r"fp16|half|float16"),
    ("INT64", r"int64"),
    ("INT32", r"int32"),
    ("BOOL", r"bool"),
    ("FP32", r"fp32|float32|float\b"),
)


def count_layers(report: str) -> tuple[dict[str, int], int]:
    """The number of layers of an engine by precision, and the number of reformats beside them.

    A reformat is a layer that only changes the layout of a tensor. `report`: the JSON from
    EngineInspector.get_engine_information. A layer whose precision is not reported counts as "?",
    and a report that cannot be read gives ({}, 0). Never raises.

    >>> conv = '{"LayerType": "Conv", "Weights": {"Type": "Int8"}}'
    >>> count_layers('{"Layers": [' + conv + ', {"LayerType": "Reformat"}]}')
    ({'INT8': 1}, 1)
    """
    counted: dict[str, int] = {}
    reformats = 0
    for layer in _layers(report):
        if _is_reformat(layer):
            reformats += 1
        else:
            kind = _precision(layer)
            counted[kind] = counted.get(kind, 0) + 1
    return dict(sorted(counted.items())), reformats


def _layers(report: str) -> list[Any]:
    try:
        parsed = json.loads(report)
    except ValueError:
        return []
    layers = _entry(parsed, "layers") if isinstance(parsed, dict) else parsed
    return layers if isinstance(layers, list) else []


def _is_reformat(layer: Any) -> bool:
    # An engine built without details lists only names.
    words = (
        [layer]
        if not isinstance(layer, dict)
        else [_entry(layer, k) for k in ("layertype", "origin", "name")]
    )
    return any(isinstance(w, str) and w.lower().startswith("reformat") for w in words)


def _precision(layer: Any) -> str:
    """The precision a layer reports, else that of its weights, else that of its output.

    Weights come before the output because an INT8 convolution may give floats."""
    if not isinstance(layer, dict):
        return UNKNOWN
    weights, outputs = _entry(layer, "weights"), _entry(layer, "outputs")
    first = outputs[0] if isinstance(outputs, list) and outputs else outputs
    for holder, key in (
        (layer, "precision"),
        (weights, "type"),
        (first, "datatype"),
        (first, "format/datatype"),
    ):
        kind = precision_named(_entry(holder, key))
        if kind != UNKNOWN:
            return kind
    return precision_named(_entry(first, "format"))


def precision_named(text: Any) -> str:
    """FP32, INT8 and so on, as TensorRT's word for a type says; "?" where it says none."""
    if isinstance(text, str):
        for name, pattern in _TYPES:
            if re.search(pattern, text.lower()):
                return name
    return UNKNOWN


def _entry(holder: Any, key: str) -> Any:
    """The value under a key in any case: DataType, Datatype, datatype."""
    if not isinstance(holder, dict):
        return None
    return next((value for name, value in holder.items() if str(name).lower() == key), None)
