"""OREPA (Hu et al., 2022): branches are added as kernels, so training runs one convolution too.

    y = B[ W * x ],    W = sum_i s_i W_i,    s_i a scale per channel, in place of a batch norm

    W_i:  K                        k x k
          A M                      1x1, then the k x k average
          D_o M                    1x1, then a fixed cosine of the output channel (frequency prior)
          K (I + M)                1x1 that starts as the identity, then k x k
          M                        1x1 on the centre tap
          M Kdw                    depthwise k x k, then 1x1

and for 1x1 convolutions W = s_0 M + s_1 M (I + M).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.blocks.frame import Block, Frame, Pair


def uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """A random kernel, initialised as in nn.Conv2d."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def cosines(channels: int, kernel: Pair) -> Tensor:
    """D[o, 0, h, w] = cos(pi u (h + 1/2) / kh) cos(pi v (w + 1/2) / kw): (channels, 1, kh, kw).

    From channel to channel, (u, v) goes through the frequencies of a kh x kw patch, except (0, 0),
    which is the average."""
    (rows, columns), channel = kernel, torch.arange(channels)
    frequency = 1 + channel % (rows * columns - 1)

    def wave(size: int, turns: Tensor) -> Tensor:
        return torch.cos(math.pi / size * turns[:, None] * (torch.arange(size) + 0.5))

    return torch.einsum(
        "oh,ow->ohw", wave(rows, frequency // columns), wave(columns, frequency % columns)
    )[:, None]


class OREPA(Block):
    """y = B[W * x], W = sum_i s_i W_i.

    (N, in, H, W) -> (N, out, H', W'), as nn.Conv2d with these arguments. W is (out, in / groups,
    kh, kw); with kernel_size 1 it has two 1x1 branches only. Each input channel has `expand`
    depthwise kernels. Raises ValueError if `expand` is below 1."""

    kernel: ClassVar[str] = "full"
    shift: ClassVar[str] = "norm.bias"
    eye: Tensor
    prior: Tensor

    def build(self, frame: Frame, expand: int = 8) -> None:
        if expand < 1:
            raise ValueError(f"expand={expand} must be at least 1")
        self.frame = frame
        ins, outs, (rows, columns) = (
            frame.inputs // frame.groups,
            frame.outputs // frame.groups,
            frame.kernel,
        )
        taps = rows * columns
        # Kernels that are composed have a separate axis for the groups.
        self.full = uniform((frame.outputs, ins, rows, columns), ins * taps)
        self.deep = uniform((frame.groups, outs, ins, rows, columns), ins * taps)
        self.deep_point = nn.Parameter(torch.zeros(frame.groups, ins, ins))
        self.register_buffer("eye", torch.eye(ins), persistent=False)
        starts = [0.25, 0.5]
        if taps > 1:
            self.average_point, self.prior_point, self.point = (
                uniform((frame.outputs, ins, 1, 1), ins) for _ in range(3)
            )
            self.register_buffer("prior", cosines(frame.outputs, frame.kernel), persistent=False)
            self.depthwise = uniform((frame.groups, ins, expand, rows, columns), taps)
            self.depthwise_point = uniform((frame.groups, outs, ins, expand), ins * expand)
            starts += [0.25, 0.25, 1.0, 0.5]
        self.scales = nn.Parameter(
            torch.tensor(starts)[:, None, None, None, None].repeat(1, frame.outputs, 1, 1, 1)
        )
        self.norm = nn.BatchNorm2d(frame.outputs)

    def weight(self) -> Tensor:
        """W: (out, in / groups, kh, kw)."""
        deep = torch.einsum("gomhw,gmi->goihw", self.deep, self.deep_point + self.eye).flatten(0, 1)
        weight = self.scales[0] * self.full + self.scales[1] * deep
        if self.frame.kernel == (1, 1):
            return weight
        rows, columns = self.frame.kernel
        average = self.average_point.expand(-1, -1, rows, columns) / (rows * columns)
        point = F.pad(self.point, ((columns - 1) // 2, columns // 2, (rows - 1) // 2, rows // 2))
        separable = torch.einsum("goie,giehw->goihw", self.depthwise_point, self.depthwise).flatten(
            0, 1
        )
        weight = (
            weight + self.scales[2] * average + self.scales[3] * (self.prior_point * self.prior)
        )
        return weight + self.scales[4] * point + self.scales[5] * separable

    def forward(self, x: Tensor) -> Tensor:
        f = self.frame
        y = F.conv2d(x, self.weight(), None, f.stride, f.padding, f.dilation, f.groups)
        normed: Tensor = self.norm(y)
        return normed
