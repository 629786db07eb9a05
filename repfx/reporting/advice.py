"""Warnings a person can act on, from the numbers alone."""

from __future__ import annotations

from collections.abc import Iterator

from repfx.reporting.numbers import Layer, Numbers, Warning

LOST = 20.0  # dB: a tenth of the output's magnitude is noise
REACH = 25.0  # standard deviations
CLIPPED = 0.01
AMPLIFIED = 30.0  # a batch norm that multiplies by this blows up what was rounded before it


Found = Iterator[tuple[float, str, str]]  # how bad, what, and what helps


def advice(numbers: Numbers) -> tuple[Warning, ...]:
    """The worst first: layers that lose much, whose range few channels or values take up, that
    clip, or that amplify.
    """
    found = [
        (weight, Warning(layer.name, what, cure))
        for layer in numbers.layers
        for look in (_loss, _input, _weight, _clipping, _norms)
        for weight, what, cure in look(layer, numbers.bits)
    ]
    return tuple(w for _, w in sorted(found, key=lambda pair: -pair[0]))


def _loss(layer: Layer, bits: int) -> Found:
    if layer.alone is not None and layer.alone < LOST:
        what = f"loses its output to {layer.alone:.1f} dB by itself"
        cure = f'keep it wide: ptq(bits={bits}, wide="{layer.name}"), or train it: repq'
        yield 100 - layer.alone, what, cure


def _input(layer: Layer, bits: int) -> Found:
    a = layer.input
    if a is not None and few(a.wide, a.channels, a.median):
        what = _spent("input", a.wide, a.channels, a.median)
        yield 60 - 100 * a.median, what, "even the channels out: qarep and train, or qprep"


def _weight(layer: Layer, bits: int) -> Found:
    if few(*layer.rows):
        cure = "quantize weights per channel; qarep, or qprep"
        yield 40 - 100 * layer.rows[2], _spent("weight", *layer.rows), cure
    if layer.weight.reach > REACH:
        what = f"its largest weight is {layer.weight.reach:.0f} standard deviations out"
        yield 30.0, what, "an identity's or a small branch's batch norm does that: qarep"


def _clipping(layer: Layer, bits: int) -> Found:
    a = layer.input
    if a is not None and a.clipped > CLIPPED:
        cure = 'calibrate with method="max" or "mse"'
        yield 100 * a.clipped, f"{a.clipped:.1%} of its input is cut off", cure


def _norms(layer: Layer, bits: int) -> Found:
    for norm in layer.norms:
        if norm.high > AMPLIFIED * max(norm.median, 1e-12):
            what = (
                f"{norm.name} multiplies one channel by {norm.high:.3g}, the median one by "
                f"{norm.median:.3g}"
            )
            yield 20.0, what, "its input hardly varies there: qarep, or custom L2 in training"


def _spent(what: str, wide: int, channels: int, median: float) -> str:
    return (
        f"its {what} spends its range on {wide} of {channels} channels; the median "
        f"channel has {median:.1%}"
    )


def few(wide: int, channels: int, median: float) -> bool:
    """Whether a range belongs to a few channels, and the most of them hardly use it."""
    return channels >= 8 and 0 < wide <= max(1, channels // 8) and median < 0.25
