"""Warnings that a reader can act on, and verdicts by the same rules, from the numbers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from repfx.reporting.numbers import Condition, Layer, Numbers, Warning

LOST = 20.0  # dB: a tenth of the output's magnitude is noise
REACH = 25.0  # standard deviations
CLIPPED = 0.01
AMPLIFIED = 30.0  # a batch norm that multiplies by this amplifies the rounding errors before it


Found = Iterator[tuple[float, str, str]]  # how severe, what, and a hint


def advice(numbers: Numbers) -> tuple[Warning, ...]:
    """Warnings about layers, the worst first.

    They name layers that lose accuracy, whose range is used by few channels or values, that
    saturate, or that amplify rounding errors."""
    found = [
        (weight, Warning(layer.name, what, cure))
        for layer in numbers.layers
        for look in (_loss, _input, _weight, _clipping, _norms)
        for weight, what, cure in look(layer, numbers.bits)
    ]
    return tuple(w for _, w in sorted(found, key=lambda pair: -pair[0]))


def judged(layer: Layer, bits: int) -> Layer:
    """The layer with verdicts on both conditions of QARepVGG.

    C1 holds if no warning is about its weight, C2 if none is about its input. Without data nothing
    is known about the input."""
    c1 = _condition(_weight(layer, bits))
    if layer.input is None:
        return replace(layer, c1=c1)
    return replace(layer, c1=c1, c2=_condition([*_input(layer, bits), *_clipping(layer, bits)]))


def _condition(found: Iterable[tuple[float, str, str]]) -> Condition:
    told = list(found)
    because, cures = "; it ".join(what for _, what, _ in told), (cure for _, _, cure in told)
    return Condition(not told, because, "; ".join(dict.fromkeys(cures)))


def _loss(layer: Layer, bits: int) -> Found:
    if layer.alone is not None and layer.alone < LOST:
        what = f"has an SQNR of only {layer.alone:.1f} dB with just this layer quantized"
        cure = f'keep it wide with ptq(bits={bits}, wide="{layer.name}"), or train it with repq'
        yield 100 - layer.alone, what, cure


def _input(layer: Layer, bits: int) -> Found:
    a = layer.input
    if a is not None and few(a.wide, a.channels, a.median):
        what = _spent("input", a.wide, a.channels, a.median)
        yield 60 - 100 * a.median, what, "balance the channels: use qarep and train, or use qprep"
    if a is not None and a.values.reach > REACH:
        what = f"has a largest input of {a.values.reach:.0f} standard deviations"
        yield 30.0, what, 'clip the few values that large: calibrate with method="mse"'


def _weight(layer: Layer, bits: int) -> Found:
    if few(*layer.rows):
        cure = "quantize weights per channel, or use qarep or qprep"
        yield 40 - 100 * layer.rows[2], _spent("weight", *layer.rows), cure
    if layer.weight.reach > REACH:
        what = f"has a largest weight of {layer.weight.reach:.0f} standard deviations"
        yield 30.0, what, "use qarep; the batch norm of an identity or small branch causes this"


def _clipping(layer: Layer, bits: int) -> Found:
    a = layer.input
    if a is not None and a.clipped > CLIPPED:
        cure = 'calibrate with method="max" or "mse"'
        yield 100 * a.clipped, f"saturates on {a.clipped:.1%} of its input", cure


def _norms(layer: Layer, bits: int) -> Found:
    for norm in layer.norms:
        if norm.high > AMPLIFIED * max(norm.median, 1e-12):
            what = (
                f"has a batch norm, {norm.name}, that multiplies one channel by {norm.high:.3g} "
                f"and the median one by {norm.median:.3g}"
            )
            yield 20.0, what, "use qarep, or custom L2 in training; its input hardly varies there"


def _spent(what: str, wide: int, channels: int, median: float) -> str:
    return (
        f"spends the range of its {what} on {wide} of {channels} channels; the median channel "
        f"uses {median:.1%} of it"
    )


def few(wide: int, channels: int, median: float) -> bool:
    """Whether a few channels take up the range while most channels hardly use it."""
    return channels >= 8 and 0 < wide <= max(1, channels // 8) and median < 0.25
