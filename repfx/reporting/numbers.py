"""The numbers behind a report: plain records, the same on the page, in JSON and in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """How values are distributed. `quantiles`: evenly spaced, smallest first, to draw them."""

    low: float
    high: float
    mean: float
    std: float
    quantiles: tuple[float, ...] = ()

    @property
    def reach(self) -> float:
        """The largest magnitude in standard deviations, which sets the range of a quantizer."""
        return max(abs(self.low), abs(self.high)) / self.std if self.std else 0.0

    @property
    def median(self) -> float:
        return self.quantiles[(len(self.quantiles) - 1) // 2]


@dataclass(frozen=True)
class Branch:
    """One kernel of a region, as it was trained."""

    name: str
    weight: Spread


@dataclass(frozen=True)
class Norm:
    """Magnitudes of gamma / sqrt(var + eps) over the channels of a batch norm, and its beta.

    `beta` is what QARepVGG's Fig. 12 shows."""

    name: str
    low: float
    median: float
    high: float
    beta: Spread


@dataclass(frozen=True)
class Operand:
    """A value that a block adds, as a branch puts it out on data (QARepVGG, Fig. 5)."""

    name: str
    values: Spread


@dataclass(frozen=True)
class Clip:
    """What a layer's input would gain if its range were clipped (RepAPQ).

    `sqnr`: of the rounded input in dB, with its range at each of these `shares` of the largest
    magnitude. `best`: the share with the highest; `gain`: by how many dB it is above share 1."""

    shares: tuple[float, ...]
    sqnr: tuple[float, ...]
    best: float
    gain: float


@dataclass(frozen=True)
class Activation:
    """The input of a layer, measured over the data.

    `wide`: how many of its `channels` reach over half of the tensor's range. `median`: the share of
    the range that the median channel reaches. `clipped`: the share of values that saturate.
    `used`: the share of codes in use. `samples`, `tops`: the largest magnitude of each sample, and
    of each channel (RepAPQ, Figs. 1-4)."""

    values: Spread
    channels: int
    wide: int
    median: float
    clipped: float
    used: float
    samples: Spread | None = None
    tops: Spread | None = None
    clip: Clip | None = None


@dataclass(frozen=True)
class Condition:
    """Whether a condition holds for a layer; where it does not, why, and a hint."""

    holds: bool
    because: str = ""
    cure: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer of the deployed net.

    `rows`: how many output channels of its weight reach over half of the weight's range, how many
    there are, and the share that the median one reaches. `weight_sqnr`, `weight_used`: SQNR of the
    rounded weight in dB, and the share of codes in use; None where it stays in float. `alone`,
    `together`: SQNR of its output in dB, with only this layer quantized, on float inputs, and with
    all layers before it quantized too. `mse_alone`, `mse_together`: the mean squared errors of the
    same (QARepVGG, Fig. 6). `output`: its float output, before any activation function (Fig. 7).
    `operands`: what its block added before it was merged (Fig. 5). All None without data.

    `c1`, `c2`: the two conditions of QARepVGG, that the weight and the input quantize well."""

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
    mse_alone: float | None = None
    mse_together: float | None = None
    output: Spread | None = None
    operands: tuple[Operand, ...] | None = None
    c1: Condition | None = None
    c2: Condition | None = None


@dataclass(frozen=True)
class Region:
    """A block: its operators, what it became or why it was declined, and its weight's program."""

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
    """The model after some passes.

    `macs`: for one input. `size`: bytes. `sqnr`: in dB, against the model as written. `top1`: in
    percent."""

    name: str
    convs: int
    params: int
    macs: float
    size: int
    sqnr: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Drawing:
    """A graph: for each node its name, kind, place and region (-1 for none); edges by index."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    places: tuple[tuple[float, float], ...]
    regions: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Warning:
    """Something to act on: the layer, what was found, and what to do about it."""

    layer: str
    what: str
    cure: str


@dataclass(frozen=True)
class Numbers:
    """Everything a report shows about one model."""

    title: str
    bits: int
    forms: tuple[Form, ...]
    regions: tuple[Region, ...]
    layers: tuple[Layer, ...]
    before: Drawing
    after: Drawing
    warnings: tuple[Warning, ...] = ()
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Ratio:
    """MSE of a layer of one model over that of the same layer of another (QARepVGG, Fig. 6)."""

    layer: str
    against: str
    alone: float
    together: float


def ratios(models: Sequence[Numbers]) -> tuple[Ratio, ...]:
    """Layer by layer, for two models with equally many; () for others, and without data."""
    if len(models) != 2 or len(models[0].layers) != len(models[1].layers):
        return ()
    found = []
    for a, b in zip(models[0].layers, models[1].layers, strict=True):
        if a.mse_alone is None or a.mse_together is None:
            continue
        if b.mse_alone and b.mse_together:
            alone, together = a.mse_alone / b.mse_alone, a.mse_together / b.mse_together
            found.append(Ratio(a.name, b.name, alone, together))
    return tuple(found)


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): an SQNR from two sums of squares."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def plain(value: Any) -> Any:
    """A record as JSON values; numbers that are not finite become words."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else "nan"
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_json(models: tuple[Numbers, ...]) -> str:
    """The models in JSON, and the ratios of two of them."""
    told = {
        "format": "repfx.report 1",
        "models": [plain(asdict(m)) for m in models],
        "ratios": [plain(asdict(r)) for r in ratios(models)],
    }
    return json.dumps(told)
