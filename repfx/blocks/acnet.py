"""ACNet (Ding et al., 2019): a square kernel, plus a column and a row through its centre.

y = B[C(kh,kw) x] + B[C(kh,1) x] + B[C(1,kw) x]
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from repfx.blocks.frame import Block, ConvNorm, Frame


class ACNet(Block):
    """y = B[C(kh,kw) x] + B[C(kh,1) x] + B[C(1,kw) x].

    (N, in, H, W) -> (N, out, H', W'), as nn.Conv2d with these arguments."""

    kernel: ClassVar[str] = "main.conv.weight"
    shift: ClassVar[str] = "main.norm.bias"

    def build(self, frame: Frame) -> None:
        self.main = ConvNorm(frame)
        self.column = ConvNorm(frame, (frame.kernel[0], 1))
        self.row = ConvNorm(frame, (1, frame.kernel[1]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x) + self.column(x) + self.row(x)
        return y
