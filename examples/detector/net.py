"""A small anchor-free detector in the manner of YOLOv6, of any re-parameterizable block.

    images (N, 3, H, W) -> three maps (N, 4 + classes, H / s, W / s), s = 4, 8, 16 times `down` / 2

After "YOLOv6: A Single-Stage Object Detection Framework" (Li et al., 2022): a backbone of blocks
and ReLU, a path aggregation network as neck, and a head a level with one branch for the classes and
one for the distances to the sides of the box. Height and width are multiples of 8 * `down`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from repfx.blocks import BLOCKS
from repfx.blocks.frame import ConvNorm, Frame

Made = Callable[..., nn.Module]


def plain(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Module:
    """One convolution and its batch norm."""
    return ConvNorm(Frame.of(inputs, outputs, kernel, stride, padding))


def stage(block: Made, inputs: int, outputs: int, depth: int, stride: int = 1) -> nn.Sequential:
    """`depth` 3x3 blocks and ReLU; the first has the stride."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [block(inputs if i == 0 else outputs, outputs, 3, stride if i == 0 else 1, 1)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers)


def point(inputs: int, outputs: int) -> nn.Sequential:
    """A 1x1 convolution, batch norm and ReLU."""
    return nn.Sequential(plain(inputs, outputs, 1), nn.ReLU())


class Head(nn.Module):
    """The decoupled head of one level: (N, width, h, w) -> (N, 4 + classes, h, w)."""

    def __init__(self, block: Made, width: int, classes: int) -> None:
        super().__init__()
        self.stem = point(width, width)
        self.classes, self.sides = (stage(block, width, width, 1) for _ in range(2))
        self.logits, self.distances = nn.Conv2d(width, classes, 1), nn.Conv2d(width, 4, 1)
        # At first every class is rare, and a box as wide as two cells.
        nn.init.constant_(self.logits.bias, -4.6)  # type: ignore[arg-type]
        nn.init.constant_(self.distances.bias, 1.0)  # type: ignore[arg-type]
        nn.init.zeros_(self.distances.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        sides, logits = self.distances(self.sides(x)), self.logits(self.classes(x))
        return torch.cat((sides, logits), 1)


class Detector(nn.Module):
    """Backbone, neck and heads; `widths` are those of the stages, the first at half the size.

    `down` is how much smaller the first map of the backbone is than the image."""

    def __init__(
        self,
        block: Made,
        classes: int,
        widths: tuple[int, int, int, int] = (16, 24, 48, 64),
        down: int = 2,
        depth: int = 2,
    ) -> None:
        super().__init__()
        first, *wide = widths
        stems = [stage(block, 3, first, 1, 2)]
        while down > 2:
            stems, down = [*stems, stage(block, first, first, 1, 2)], down // 2
        self.stem = nn.Sequential(*stems)
        befores = (first, *wide[:-1])
        self.stages = nn.ModuleList(
            stage(block, a, b, depth, 2) for a, b in zip(befores, wide, strict=True)
        )
        neck = wide[0]
        self.narrow = nn.ModuleList(point(w, neck) for w in wide)
        self.larger = nn.ModuleList(nn.ConvTranspose2d(neck, neck, 2, 2) for _ in range(2))
        self.up = nn.ModuleList(stage(block, 2 * neck, neck, 1) for _ in range(2))
        self.smaller = nn.ModuleList(stage(plain, neck, neck, 1, 2) for _ in range(2))
        self.back = nn.ModuleList(stage(block, 2 * neck, neck, 1) for _ in range(2))
        self.heads = nn.ModuleList(Head(block, neck, classes) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, levels = self.stem(x), []
        for part, narrow in zip(self.stages, self.narrow, strict=True):
            x = part(x)
            levels.append(narrow(x))
        for i in (1, 0):  # from coarse to fine
            levels[i] = self.up[i](torch.cat((self.larger[i](levels[i + 1]), levels[i]), 1))
        for i in (0, 1):  # and back
            levels[i + 1] = self.back[i](torch.cat((self.smaller[i](levels[i]), levels[i + 1]), 1))
        return [head(level) for head, level in zip(self.heads, levels, strict=True)]


def detector(name: str = "repvgg", classes: int = 10, **options: Any) -> Detector:
    """The detector of the block of this name, one of repfx.blocks.BLOCKS, or of "plain"."""
    return Detector(plain if name == "plain" else BLOCKS[name], classes, **options)


def digits() -> Detector:
    """Ten classes, 64 x 64."""
    return detector()


def cells() -> Detector:
    """Three classes, 256 x 320: maps of strides 8, 16 and 32."""
    return detector("qarepvgg", 3, down=4)
