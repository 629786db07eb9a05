"""The engine inspector's report, counted. Its schema differs between TensorRT versions, so nothing
in it is relied on.
"""

from __future__ import annotations

import json
import re
from typing import Any

UNKNOWN = "?"

# The longer words first: "uint8" holds "int8", "bfloat16" holds "float16".
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
    """The layers of an engine by precision, and how many more only change the layout of a tensor
    (reformats).

    `report`: what EngineInspector.get_engine_information gives as JSON. A layer whose precision is
    not told counts as "?"; a report that cannot be read gives ({}, 0). Never raises.

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
    # an engine built without details lists names only
    words = (
        [layer]
        if not isinstance(layer, dict)
        else [_entry(layer, k) for k in ("layertype", "origin", "name")]
    )
    return any(isinstance(w, str) and w.lower().startswith("reformat") for w in words)


def _precision(layer: Any) -> str:
    """By what the layer says itself, else by its weights (an INT8 convolution may give floats),
    else by its output.
    """
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
        kind = _type(_entry(holder, key))
        if kind != UNKNOWN:
            return kind
    return _type(_entry(first, "format"))


def _type(text: Any) -> str:
    if isinstance(text, str):
        for name, pattern in _TYPES:
            if re.search(pattern, text.lower()):
                return name
    return UNKNOWN


def _entry(holder: Any, key: str) -> Any:
    """The value under a key in any spelling: DataType, Datatype, datatype."""
    if not isinstance(holder, dict):
        return None
    return next((value for name, value in holder.items() if str(name).lower() == key), None)
