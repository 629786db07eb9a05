"""ECB, edge-oriented convolution block (Zhang et al., 2021): learned kernels and edge filters.

    y = C3 x + C3' P(C1 x) + sum_i [(s_i E_i) dw P(C1_i x) + b_i] (+ x)

    E_i = Sobel rows, Sobel columns, Laplacian

There is no batch norm. P pads with the bias of the 1x1 before it, which is the output of that 1x1
for a zero: P(C1 x) = C1 P0(x), where P0 pads with zeros. So the block pads its input once, and no
branch pads. The taps of an edge filter add up to zero. With this padding, a bias in front of it
would have no effect and no gradient, so C1_i has none."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.blocks.frame import Block, Frame

EDGES = {
    "rows": [[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]],
    "columns": [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]],
    "laplacian": [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]],
}


class Edge(nn.Module):
    """(s E) dw (C1 x) + b, with a fixed 3x3 filter E, and one s and b per channel.

    (N, in, H, W) -> (N, out, H', W')."""

    edge: Tensor

    def __init__(self, frame: Frame, edge: list[list[float]]) -> None:
        super().__init__()
        self.frame = frame
        self.point = nn.Conv2d(frame.inputs, frame.outputs, 1, groups=frame.groups, bias=False)
        self.register_buffer("edge", torch.tensor(edge), persistent=False)
        self.scale = nn.Parameter(torch.randn(frame.outputs, 1, 1, 1) * 1e-3)
        self.bias = nn.Parameter(torch.randn(frame.outputs) * 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        f = self.frame
        return F.conv2d(
            self.point(x), self.scale * self.edge, self.bias, f.stride, 0, f.dilation, f.outputs
        )


class ECB(Block):
    """y = C3 x + C3' P(C1 x) + sum_i [(s_i E_i) dw P(C1_i x) + b_i] (+ x).

    (N, in, H, W) -> (N, out, H', W'), as nn.Conv2d with these arguments. Every convolution except
    C1_i has a bias. There are `expand * out_channels` channels between C1 and C3'. With `identity`,
    x is added if in == out, the stride is 1 and sizes are kept. Raises ValueError if the kernel is
    not 3x3 or expand is below 1."""

    kernel: ClassVar[str] = "main.weight"
    shift: ClassVar[str] = "main.bias"

    def build(self, frame: Frame, expand: int = 2, identity: bool = False) -> None:
        if frame.kernel != (3, 3):
            raise ValueError(f"ECB is 3x3, as its edge filters are; kernel_size is {frame.kernel}")
        if expand < 1:
            raise ValueError(f"expand={expand} must be at least 1")
        self.border = frame.border
        self.identity = identity and frame.holds_identity
        inside = frame.kernel, frame.stride, 0, frame.dilation, frame.groups
        self.main = nn.Conv2d(frame.inputs, frame.outputs, *inside)
        self.point = nn.Conv2d(frame.inputs, expand * frame.outputs, 1, groups=frame.groups)
        self.deep = nn.Conv2d(expand * frame.outputs, frame.outputs, *inside)
        self.edges = nn.ModuleList(Edge(frame, edge) for edge in EDGES.values())

    def forward(self, x: Tensor) -> Tensor:
        z = F.pad(x, self.border) if any(self.border) else x
        start: Tensor = self.main(z) + self.deep(self.point(z))
        y = sum((edge(z) for edge in self.edges), start=start)
        return y + x if self.identity else y
