"""The numbers behind a report: plain records, the same in the page, in JSON and in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """How values lie. `quantiles`: evenly spaced ones, the smallest first; enough to draw the
    distribution.
    """

    low: float
    high: float
    mean: float
    std: float
    quantiles: tuple[float, ...] = ()

    @property
    def reach(self) -> float:
        """The largest magnitude in standard deviations: what a quantizer's range is spent on."""
        return max(abs(self.low), abs(self.high)) / self.std if self.std else 0.0


@dataclass(frozen=True)
class Branch:
    """One kernel of a region as it is trained."""

    name: str
    weight: Spread


@dataclass(frozen=True)
class Norm:
    """gamma / sqrt(var + eps) of a batch norm over its channels, magnitudes."""

    name: str
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Activation:
    """The input of a layer over the data. `wide`: channels of `channels` that reach over half of
    the tensor's range, where the median channel reaches `median` of it. `clipped` and `used`:
    shares of values cut off, of codes in use."""

    values: Spread
    channels: int
    wide: int
    median: float
    clipped: float
    used: float


@dataclass(frozen=True)
class Layer:
    """A layer of the deployed net. `rows`: `wide` of `channels` output channels reach over half of
    the weight's range. `weight_sqnr`, `weight_used`: of its rounded weight, None where it stays in
    float. `alone`, `together`: SQNR of its output in dB, quantized by itself on float inputs, and
    with all before it; None without data."""

    name: str
    what: str
    macs: float
    params: int
    weight: Spread
    rows: tuple[int, int, float]
    weight_sqnr: float | None
    weight_used: float | None
    branches: tuple[Branch, ...] = ()
    norms: tuple[Norm, ...] = ()
    input: Activation | None = None
    alone: float | None = None
    together: float | None = None


@dataclass(frozen=True)
class Region:
    """A block: its operators, what it became or why it was left alone, and the program that
    computes its weight.
    """

    name: str
    ops: tuple[str, ...]
    kinds: tuple[str, ...]
    becomes: str
    reason: str
    cure: str
    macs_before: float
    macs_after: float
    params_before: int
    params_after: int
    program: str = ""


@dataclass(frozen=True)
class Form:
    """The model after some passes. `macs` for one input; `size` in bytes; `sqnr` in dB against the
    model as it was.
    """

    name: str
    convs: int
    params: int
    macs: float
    size: int
    sqnr: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Drawing:
    """A graph: for each node its name, what it is, its place, and the region it belongs to (-1:
    none); edges by index.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    places: tuple[tuple[float, float], ...]
    regions: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Warning:
    """Something to act on: the layer, what was seen, what to do."""

    layer: str
    what: str
    cure: str


@dataclass(frozen=True)
class Numbers:
    """All that is known of one model."""

    title: str
    bits: int
    forms: tuple[Form, ...]
    regions: tuple[Region, ...]
    layers: tuple[Layer, ...]
    before: Drawing
    after: Drawing
    warnings: tuple[Warning, ...] = ()
    notes: tuple[str, ...] = field(default=())


def plain(value: Any) -> Any:
    """A record as JSON knows it; what is not finite becomes a word."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else "nan"
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_json(models: tuple[Numbers, ...]) -> str:
    return json.dumps({"format": "repfx.report 1", "models": [plain(asdict(m)) for m in models]})
