"""Targets: the number formats that a runtime runs fast."""

from __future__ import annotations

from dataclasses import dataclass

from repfx.errors import unknown
from repfx.quant.grid import Grid


@dataclass(frozen=True)
class Target:
    """`unsigned_after_relu`: whether values that cannot be negative take the unsigned grid, as CPU runtimes want.

    `sums`: what of a residual sum wants integers: "" nothing, "skip" what is added to a layer's own output, "all" that
    output too. `averages`: whether the input of an average pool does.
    """

    name: str
    unsigned_after_relu: bool
    sums: str
    averages: bool

    def weight(self, bits: int = 8, per_channel: bool = True) -> Grid:
        return Grid(bits, axis=0 if per_channel else None)

    def activation(self, bits: int = 8, non_negative: bool = False) -> Grid:
        """Signed activations use the whole range, as QuantizeLinear saturates; weights stay symmetric."""
        signed = not (non_negative and self.unsigned_after_relu)
        return Grid(bits, signed, full=signed)


TARGETS = {
    "tensorrt": Target("tensorrt", unsigned_after_relu=False, sums="skip", averages=True),
    "onnxruntime": Target("onnxruntime", unsigned_after_relu=True, sums="all", averages=True),
    "openvino": Target("openvino", unsigned_after_relu=True, sums="skip", averages=True),
}


def target_named(name: str) -> Target:
    """The target of this name. Raises InputError naming the known ones."""
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]
