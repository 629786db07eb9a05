"""Warnings a person can act on, from the numbers alone."""

from __future__ import annotations

from repfx.reporting.numbers import Layer, Numbers, Warning

LOST = 20.0  # dB: a tenth of the output's magnitude is noise
REACH = 25.0  # standard deviations
CLIPPED = 0.01
AMPLIFIED = 30.0  # a batch norm that multiplies by this blows up what was rounded before it


def advice(numbers: Numbers) -> tuple[Warning, ...]:
    """The worst first: layers that lose much, whose range few channels or values take up, that
    clip, or that amplify.
    """
    found: list[tuple[float, Warning]] = []
    for layer in numbers.layers:
        for weight, warning in _of(layer, numbers.bits):
            found.append((weight, warning))
    return tuple(w for _, w in sorted(found, key=lambda pair: -pair[0]))


def _of(layer: Layer, bits: int) -> list[tuple[float, Warning]]:
    found = []
    if layer.alone is not None and layer.alone < LOST:
        cure = f'keep it wide: ptq(bits={bits}, wide="{layer.name}"), or train it: repq'
        found.append(
            (
                100 - layer.alone,
                Warning(layer.name, f"loses its output to {layer.alone:.1f} dB by itself", cure),
            )
        )
    a = layer.input
    if a is not None and few(a.wide, a.channels, a.median):
        what = (
            f"its input spends its range on {a.wide} of {a.channels} channels; the median "
            f"channel has {a.median:.1%}"
        )
        found.append(
            (
                60 - 100 * a.median,
                Warning(layer.name, what, "even the channels out: qarep and train, or qprep"),
            )
        )
    wide, channels, median = layer.rows
    if few(wide, channels, median):
        what = (
            f"its weight spends its range on {wide} of {channels} channels; the median "
            f"channel has {median:.1%}"
        )
        found.append(
            (
                40 - 100 * median,
                Warning(layer.name, what, "quantize weights per channel; qarep, or qprep"),
            )
        )
    if layer.weight.reach > REACH:
        what = f"its largest weight is {layer.weight.reach:.0f} standard deviations out"
        found.append(
            (
                30.0,
                Warning(
                    layer.name,
                    what,
                    "an identity's or a small branch's batch norm does that: qarep",
                ),
            )
        )
    if a is not None and a.clipped > CLIPPED:
        what = f"{a.clipped:.1%} of its input is cut off"
        found.append(
            (100 * a.clipped, Warning(layer.name, what, 'calibrate with method="max" or "mse"'))
        )
    for norm in layer.norms:
        if norm.high > AMPLIFIED * max(norm.median, 1e-12):
            what = (
                f"{norm.name} multiplies one channel by {norm.high:.3g}, the median one by "
                f"{norm.median:.3g}"
            )
            found.append(
                (
                    20.0,
                    Warning(
                        layer.name,
                        what,
                        "its input hardly varies there: qarep, or custom L2 in training",
                    ),
                )
            )
    return found


def few(wide: int, channels: int, median: float) -> bool:
    """Whether a range belongs to a few channels, and the most of them hardly use it."""
    return channels >= 8 and 0 < wide <= max(1, channels // 8) and median < 0.25
