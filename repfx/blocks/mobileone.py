"""MobileOne (Vasu et al., 2023) and FastViT's RepMixer (Vasu et al., 2023).

    MobileOne:  y = sum_{i < n} B[Ck_i x] + B[C1 x] + B[x]
    RepMixer:   y = x + l (M(x) - B[x]),    M a depthwise MobileOne, l a scale per channel

MobileOne has the 1x1 branch if k > 1, and the identity branch if in == out, the stride is 1 and
sizes are kept.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import ClassVar

import torch
from torch import Tensor, nn

from repfx.blocks.frame import Block, ConvNorm, Frame


class MobileOne(Block):
    """y = sum_{i < branches} B[Ck_i x] + B[C1 x] + B[x].

    (N, in, H, W) -> (N, out, H', W'), as nn.Conv2d with these arguments. Raises ValueError if
    `branches` is below 1.
    """

    kernel: ClassVar[str] = "main.conv.weight"
    shift: ClassVar[str] = "main.norm.bias"

    def build(self, frame: Frame, branches: int = 1) -> None:
        if branches < 1:
            raise ValueError(f"branches={branches} must be at least 1")
        self.main = ConvNorm(frame)
        self.others = nn.ModuleList(ConvNorm(frame) for _ in range(branches - 1))
        if frame.kernel != (1, 1):
            self.others.append(ConvNorm(frame, 1))
        if frame.holds_identity:
            self.others.append(nn.BatchNorm2d(frame.outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum((branch(x) for branch in self.others), start=self.main(x))
        return y


class RepMixer(Block):
    """y = x + l (M(x) - B[x]), M a depthwise MobileOne: (N, C, H, W) -> (N, C, H, W).

    `branches` is that of M. `layer_scale` is the initial value of l. The default is 1, so that the
    block can take over a trained convolution. The paper has 1e-5, with which the block is almost
    the identity. Raises ValueError if the convolution is not depthwise or does not keep sizes."""

    kernel: ClassVar[str] = "mixer.main.conv.weight"
    shift: ClassVar[str] = "mixer.main.norm.bias"

    def build(self, frame: Frame, branches: int = 1, layer_scale: float = 1.0) -> None:
        if not frame.depthwise:
            raise ValueError(
                f"RepMixer is depthwise: in_channels={frame.inputs}, "
                f"out_channels={frame.outputs}, groups={frame.groups}"
            )
        if not frame.holds_identity:
            raise ValueError(
                "RepMixer adds its input: stride must be 1, the kernel odd and the padding "
                "dilation * (kernel - 1) / 2"
            )
        self.mixer = MobileOne(*astuple(frame), branches=branches)
        self.norm = nn.BatchNorm2d(frame.outputs)
        self.scale = nn.Parameter(torch.full((frame.outputs, 1, 1), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.scale * (self.mixer(x) - self.norm(x))
        return y
