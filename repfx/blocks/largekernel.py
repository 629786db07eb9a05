"""A large kernel and small ones: RepLKNet (Ding et al., 2022), UniRepLKNet (Ding et al., 2024).

    y = B[CK x] + sum_i B[C(k_i, dilation r_i) x],    r_i (k_i - 1) + 1 <= K

In UniRepLKNet the small kernels are dilated. A kernel with dilation r is a larger kernel with r - 1
zeros between its taps.
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
    """The (kernel, dilation) pairs of UniRepLKNet for the largest K in its table up to `size`.

    Below the smallest K it is one 1x1 kernel."""
    return SMALL[max(k for k in SMALL if k <= size)] if size >= min(SMALL) else ((1, 1),)


class LargeKernel(Block):
    """y = B[CK x] + sum_i B[C(k_i, dilation r_i) x].

    (N, in, H, W) -> (N, out, H', W'), as nn.Conv2d with these arguments. `small` lists the
    (k_i, r_i), each an int or a pair, with r_i in taps of the large kernel. By default it is that
    of UniRepLKNet for the shorter side of the kernel; RepLKNet has ((5, 1),). `outer` adds a batch
    norm after the sum. Raises ValueError if a small kernel spans more taps than the large one has.
    """

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
