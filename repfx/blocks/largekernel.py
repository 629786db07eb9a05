"""Large kernels beside small ones: RepLKNet (Ding et al., 2022) and, with dilated ones, UniRepLKNet
(Ding et al., 2024).

    y = B[CK x] + sum_i B[C(k_i, dilation r_i) x],    r_i (k_i - 1) + 1 <= K

A kernel with dilation r is a larger one with r - 1 zeros between its taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from repfx.blocks.frame import Block, ConvNorm, Frame, Size

SMALL = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def small_kernels(size: int) -> tuple[tuple[int, int], ...]:
    """UniRepLKNet's (kernel, dilation) pairs for the largest K that is not above size; below its
    smallest, one 1x1.
    """
    return SMALL[max(k for k in SMALL if k <= size)] if size >= min(SMALL) else ((1, 1),)


class LargeKernel(Block):
    """y = B[CK x] + sum_i B[C(k_i, dilation r_i) x]: (N, in, H, W) -> (N, out, H', W') as nn.Conv2d
    of these arguments.

    `small` lists the (k_i, r_i), an int or a pair each, r_i in taps of the large kernel:
    UniRepLKNet's for the kernel's shorter side if not given; RepLKNet's is ((5, 1),). `outer` puts
    a batch norm around the sum. Raises ValueError where a small kernel spans more taps than the
    large one has."""

    kernel: ClassVar[str] = "main.conv.weight"
    shift: ClassVar[str] = "main.norm.bias"

    def build(
        self, frame: Frame, small: Sequence[tuple[Size, Size]] | None = None, outer: bool = False
    ) -> None:
        chosen = small_kernels(min(frame.kernel)) if small is None else small
        self.main = ConvNorm(frame)
        self.small = nn.ModuleList(ConvNorm(frame, k, r) for k, r in chosen)
        self.norm = nn.BatchNorm2d(frame.outputs) if outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(sum((branch(x) for branch in self.small), start=self.main(x)))
        return y
