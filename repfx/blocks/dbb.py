"""Diverse Branch Block (Ding et al., 2021): branches of several scales and depths.

    y = B[Ck x] + B[C1 x] + B[A P(B[C1 x])] + B[Ck P(B[(C1 + I) x])]

A is the k x k average, and C1 + I a 1x1 kernel that starts as the identity. The batch norm before P
is B[u] = a u + c, and P pads with its value for a zero, the shift c = beta - mean a. Only then is
the sequence one convolution at the borders too, because it equals B[C1 .] of the zero-padded
input."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.blocks.frame import Block, ConvNorm, Frame


def shift_of(norm: nn.BatchNorm2d) -> Tensor:
    """beta - mean gamma / sqrt(var + eps), the output for a zero in eval mode: (channels,)."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None
    # The division comes first, so that backward does not need the statistics. The next forward in
    # training mode changes these in place.
    return norm.bias - norm.weight * (mean / torch.sqrt(var + norm.eps))


class PointNorm(nn.Module):
    """P(B[W x]) with a 1x1 kernel W, or W + I with `identity`.

    (N, in, H, W) -> (N, width, H + 2 ph, W + 2 pw), padded with the shift. The shift follows from
    the running statistics, also in training.
    """

    eye: Tensor | None

    def __init__(self, frame: Frame, width: int, identity: bool) -> None:
        super().__init__()
        self.groups, self.border = frame.groups, frame.border
        self.conv = nn.Conv2d(frame.inputs, width, 1, groups=frame.groups, bias=False)
        self.norm = nn.BatchNorm2d(width)
        eye = (
            torch.eye(width // frame.groups).repeat(frame.groups, 1)[:, :, None, None]
            if identity
            else None
        )
        self.register_buffer("eye", eye, persistent=False)
        if identity:
            nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight if self.eye is None else self.conv.weight + self.eye
        y: Tensor = self.norm(F.conv2d(x, weight, groups=self.groups))
        if not any(self.border):
            return y
        shift = shift_of(self.norm)[:, None, None]
        return F.pad(y - shift, self.border) + shift


class Average(nn.Module):
    """The average over the frame's kernel in each channel, without padding.

    (N, out, H, W) -> (N, out, H', W')."""

    ones: Tensor

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame, self.taps = frame, frame.kernel[0] * frame.kernel[1]
        # A convolution, because average pools have no dilation. Its weights are ones, because 1/9
        # is not exact in any precision.
        self.register_buffer("ones", torch.ones(frame.outputs, 1, *frame.kernel), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(
            x, self.ones, None, self.frame.stride, 0, self.frame.dilation, self.frame.outputs
        )
        return y / self.taps


class DBB(Block):
    """y = B[Ck x] + B[C1 x] + B[A P(B[C1 x])] + B[Ck P(B[(C1 + I) x])].

    (N, in, H, W) -> (N, out, H', W'), as nn.Conv2d with these arguments. `internal` is the number
    of channels between the 1x1 and the k x k of the last branch. By default it is in_channels, or
    2 in_channels for a depthwise block. The + I is left out if it differs from in_channels.

    A depthwise 1x1 is only a scale, so a depthwise block has one in the last branch only. With P0,
    which pads with zeros, it is

        y = B[Ck x] + B[A P0 x] + B[Ck P(B[C1 x])]

    Raises ValueError if groups does not divide `internal`."""

    kernel: ClassVar[str] = "main.conv.weight"
    shift: ClassVar[str] = "main.norm.bias"

    def build(self, frame: Frame, internal: int | None = None) -> None:
        width = (2 if frame.depthwise else 1) * frame.inputs if internal is None else internal
        if width < 1 or width % frame.groups:
            raise ValueError(f"groups={frame.groups} must divide internal={width}")
        self.main = ConvNorm(frame)
        self.point = None if frame.depthwise else ConvNorm(frame, 1)
        self.before_average = (
            nn.ZeroPad2d(frame.border)
            if frame.depthwise
            else PointNorm(frame, frame.outputs, False)
        )
        self.average, self.average_norm = Average(frame), nn.BatchNorm2d(frame.outputs)
        self.before_deep = PointNorm(frame, width, identity=width == frame.inputs)
        self.deep = nn.Conv2d(
            width,
            frame.outputs,
            frame.kernel,
            frame.stride,
            0,
            frame.dilation,
            frame.groups,
            bias=False,
        )
        self.deep_norm = nn.BatchNorm2d(frame.outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x) + self.average_norm(self.average(self.before_average(x)))
        y = y + self.deep_norm(self.deep(self.before_deep(x)))
        total: Tensor = y if self.point is None else y + self.point(x)
        return total
