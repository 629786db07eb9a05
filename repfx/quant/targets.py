"""Targets: the number formats that a runtime runs fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from repfx.errors import unknown
from repfx.quant.grid import Grid


@dataclass(frozen=True)
class Target:
    """`unsigned_after_relu`: whether values that cannot be negative take the unsigned grid, as CPU runtimes want.

    `offset`: whether signed grids are written as unsigned codes around 128, the same numbers, for kernels that are fast
    on those. (In OpenVINO, whose kernels take both, the offset is a subtraction that concatenations do not pass on.)

    `between`: what runs in integers between layers where what it reads is rounded: `sums` after a convolution and averages;
    `joins`, concatenations and products too; `all`, as its operators take integers to integers only, so that what
    convolutions give is to be rounded at once, and sums, products and the like between them.
    """

    name: str
    unsigned_after_relu: bool
    offset: bool
    between: Literal["sums", "joins", "all"]

    def weight(self, bits: int = 8, per_channel: bool = True) -> Grid:
        return Grid(bits, axis=0 if per_channel else None)

    def activation(self, bits: int = 8, non_negative: bool = False) -> Grid:
        """Signed activations use the whole range, as QuantizeLinear saturates; weights stay symmetric."""
        signed = not (non_negative and self.unsigned_after_relu)
        return Grid(bits, signed, full=signed)


TARGETS = {
    "tensorrt": Target("tensorrt", unsigned_after_relu=False, offset=False, between="sums"),
    "onnxruntime": Target("onnxruntime", unsigned_after_relu=True, offset=True, between="all"),
    "openvino": Target("openvino", unsigned_after_relu=True, offset=False, between="joins"),
}


def target_named(name: str) -> Target:
    """The target of this name. Raises InputError naming the known ones."""
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]
