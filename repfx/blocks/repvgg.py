"""RepVGG (Ding et al., 2021):  y = relu(B[C3 x] + B[C1 x] + B[x]), the last where shapes allow it."""

from __future__ import annotations

from torch import Tensor, nn


class RepVGGBlock(nn.Module):
    """3x3, 1x1 and identity branches, each with its batch norm: (N, inputs, H, W) -> (N, outputs, H', W')."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, stride, 0, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.bn0 = nn.BatchNorm2d(outputs) if inputs == outputs and stride == 1 else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv3(x)) + self.bn1(self.conv1(x))
        return self.act(y if self.bn0 is None else y + self.bn0(x))
