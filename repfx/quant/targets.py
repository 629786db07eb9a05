"""Targets: the number formats that a runtime runs fast, and right on every CPU that it runs on.

A CPU without VNNI multiplies unsigned by signed bytes and adds neighbours in 16 bits that saturate:

    255 * 127 + 255 * 127 = 64770 > 32767 >= 32640 = 255 * 64 + 255 * 64

So `onnxruntime` and `openvino` keep the weights of convolutions and linear layers within +-64,
which is right on all of SSE4.1, AVX2, AVX-512, VNNI and AMX. Depthwise convolutions add no
neighbours and keep +-127. `onnxruntime-vnni` and `openvino-vnni` use +-127 everywhere: up to 6 dB
less rounding noise of the weights, and wrong numbers on CPUs without VNNI (Intel before Cascade
Lake, AMD before Zen 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from repfx.errors import unknown
from repfx.quant.grid import Grid


@dataclass(frozen=True)
class Target:
    """`runtime`: what runs the file: tensorrt, onnxruntime or openvino.

    `unsigned_after_relu`: whether values that cannot be negative take the unsigned grid, as CPU
    runtimes want.

    `offset`: which signed values are written as unsigned codes around 128, the same numbers: `all`,
    for kernels that are fast on those; `joined`, those of concatenations; or none. (Of a
    concatenation OpenVINO rounds what goes into it. On CPUs without AMX it writes signed codes as
    unsigned ones, and for a concatenation loses their scale in doing so.)

    `between`: what runs in integers between layers where what it reads is rounded: `sums` after a
    convolution and averages; `joins`, concatenations and products too; `all`, as its operators take
    integers to integers only, so that what convolutions give is to be rounded at once, and sums,
    products and the like between them.

    `reduced`: whether weights keep to half of their range, for CPUs without VNNI.
    """

    name: str
    runtime: str
    unsigned_after_relu: bool
    offset: Literal["none", "joined", "all"]
    between: Literal["sums", "joins", "all"]
    reduced: bool = False

    def weight(self, bits: int = 8, per_channel: bool = True, depthwise: bool = False) -> Grid:
        """The grid of a layer's weights; those of a depthwise convolution are never reduced."""
        return Grid(
            bits,
            axis=0 if per_channel else None,
            reduced=self.reduced and bits == 8 and not depthwise,
        )

    def activation(self, bits: int = 8, non_negative: bool = False) -> Grid:
        """Signed activations use the whole range, as QuantizeLinear saturates; weights stay
        symmetric.
        """
        signed = not (non_negative and self.unsigned_after_relu)
        return Grid(bits, signed, full=signed)


_TRT = Target("tensorrt", "tensorrt", unsigned_after_relu=False, offset="none", between="sums")
_ORT = Target(
    "onnxruntime-vnni", "onnxruntime", unsigned_after_relu=True, offset="all", between="all"
)
_OV = Target(
    "openvino-vnni", "openvino", unsigned_after_relu=True, offset="joined", between="joins"
)
_ALL = (
    _TRT,
    replace(_ORT, name="onnxruntime", reduced=True),
    _ORT,
    replace(_OV, name="openvino", reduced=True),
    _OV,
)
TARGETS = {target.name: target for target in _ALL}


def target_named(name: str) -> Target:
    """The target of this name. Raises InputError naming the known ones."""
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]
