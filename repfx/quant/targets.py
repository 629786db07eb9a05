"""Targets: the number formats that a runtime runs fast, and without overflow on any of its CPUs.

A CPU without VNNI multiplies unsigned bytes by signed ones and adds pairs of products in 16 bits,
and these sums saturate:

    255 * 127 + 255 * 127 = 64770 > 32767 >= 32640 = 255 * 64 + 255 * 64

So `onnxruntime` and `openvino` keep the weights of convolutions and linear layers within +-64,
which is safe on SSE4.1, AVX2, AVX-512, VNNI and AMX. Depthwise convolutions add no such pairs and
use +-127. `onnxruntime-vnni` and `openvino-vnni` use +-127 everywhere. That saves up to 6 dB of
rounding noise in the weights, but gives wrong numbers on CPUs without VNNI (Intel before Cascade
Lake, AMD before Zen 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from repfx.errors import unknown
from repfx.quant.grid import Grid


@dataclass(frozen=True)
class Target:
    """The number formats for one runtime.

    `runtime`: what runs the file: tensorrt, onnxruntime or openvino.

    `unsigned_after_relu`: whether values that cannot be negative use the unsigned grid. CPU
    runtimes want this.

    `offset`: which signed values are written as unsigned codes with zero point 128. The numbers
    stay the same. `all`: every signed value, because the runtime's kernels are fast on unsigned
    codes. `joined`: only the values that are part of a concatenation. `none`: no value.
    (OpenVINO rounds the inputs of a concatenation. On CPUs without AMX it turns signed codes into
    unsigned ones, and loses their scale when it does so at a concatenation.)

    `between`: what runs in integers between layers, provided that its inputs are quantized.
    `sums`: averages, and sums that follow a convolution, also if they are permuted for a norm.
    `joins`: averages, sums that follow a convolution, concatenations and products.
    `all`: everything. The operators of such a runtime take integers to integers only, so the output
    of a convolution is rounded at once, and so are the sums and products between convolutions.

    `reduced`: whether weights use half of their range only, for CPUs without VNNI.
    """

    name: str
    runtime: str
    unsigned_after_relu: bool
    offset: Literal["none", "joined", "all"]
    between: Literal["sums", "joins", "all"]
    reduced: bool = False

    def weight(
        self,
        bits: int = 8,
        per_channel: bool = True,
        depthwise: bool = False,
        every_code: bool = False,
    ) -> Grid:
        """The grid of a layer's weights. It is never reduced for a depthwise convolution.

        `every_code`: below 8 bits it has the code -2^(bits - 1) too."""
        return Grid(
            bits,
            axis=0 if per_channel else None,
            reduced=self.reduced and bits == 8 and not depthwise,
            full=every_code and bits < 8,
        )

    def activation(
        self, bits: int = 8, non_negative: bool = False, every_code: bool = False
    ) -> Grid:
        """The grid of an activation. A signed one has the code -2^(bits - 1) too.

        `every_code`: below 8 bits, which no runtime takes anyway, values that cannot be negative
        are unsigned, whatever the runtime wants at 8 bits."""
        unsigned = self.unsigned_after_relu or (every_code and bits < 8)
        signed = not (non_negative and unsigned)
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
    """The target with this name. Raises InputError for an unknown name and lists the valid ones."""
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]
