"""Frame: where a branch with a small kernel sits in the convolution that the whole block equals.

A convolution with k taps reads x[s n + d t - p], t < k. A branch with m taps that are r of these
steps apart spans e = r (m - 1) + 1 of the k taps. At the centre, it skips o = (k - e) // 2 taps on
the left and k - e - o on the right, so its own padding is

    left = p - d o,    right = p - d (k - e - o)        (negative: a crop)

and its output has the size of the block's output, for every input size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]  # (rows, columns)
Size = int | Pair


def pair(name: str, value: Size, least: int = 1) -> Pair:
    """The value for both axes.

    Raises ValueError unless it is an int or a pair of ints, and at least `least`."""
    given = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(given, (tuple, list))
        or len(given) != 2
        or not all(isinstance(v, int) for v in given)
    ):
        raise ValueError(f"{name} must be an int or a pair of ints, not {value!r}")
    if min(given) < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
    return given[0], given[1]


@dataclass(frozen=True)
class Frame:
    """The arguments of nn.Conv2d for a block. Sizes are (rows, columns), in taps or pixels."""

    inputs: int
    outputs: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @staticmethod
    def of(
        inputs: int,
        outputs: int,
        kernel: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
    ) -> Frame:
        """Checks the arguments.

        Raises ValueError if one is out of range, or if groups does not divide the channels."""
        if min(inputs, outputs, groups) < 1 or inputs % groups or outputs % groups:
            raise ValueError(
                f"groups={groups} must divide in_channels={inputs} and out_channels={outputs}"
            )
        sizes = (
            pair("kernel_size", kernel),
            pair("stride", stride),
            pair("padding", padding, 0),
            pair("dilation", dilation),
        )
        return Frame(inputs, outputs, *sizes, groups)

    @property
    def depthwise(self) -> bool:
        return self.inputs == self.outputs == self.groups

    @property
    def holds_identity(self) -> bool:
        """Whether a convolution of this shape can be y = x, at every input size."""
        axes = zip(self.kernel, self.padding, self.dilation, strict=True)
        same = all(k % 2 == 1 and 2 * p == d * (k - 1) for k, p, d in axes)
        return same and self.inputs == self.outputs and self.stride == (1, 1)

    @property
    def border(self) -> tuple[int, int, int, int]:
        """The padding in the order of F.pad."""
        rows, columns = self.padding
        return columns, columns, rows, rows

    def margins(self, span: Pair) -> list[Pair]:
        """The zeros around the input of a branch that spans `span` taps.

        They are (top, bottom), (left, right). Raises ValueError if the span exceeds the kernel.
        """
        if span[0] > self.kernel[0] or span[1] > self.kernel[1]:
            raise ValueError(f"a branch spans {span} taps, more than the kernel's {self.kernel}")
        found = []
        for k, e, p, d in zip(self.kernel, span, self.padding, self.dilation, strict=True):
            before = (k - e) // 2
            found.append((p - d * before, p - d * (k - e - before)))
        return found


class Block(nn.Module):
    """Base class of the blocks. It takes the arguments of nn.Conv2d, and those of its `build`.

    `kernel` and `shift` name two parameters, as described in repfx.blocks. Raises ValueError if the
    block cannot be built with the arguments."""

    kernel: ClassVar[str]
    shift: ClassVar[str]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.build(
            Frame.of(in_channels, out_channels, kernel_size, stride, padding, dilation, groups),
            **options,
        )

    def build(self, frame: Frame) -> None:
        """Creates the layers."""
        raise NotImplementedError


class ConvNorm(nn.Module):
    """B[C x]: a convolution without bias at the centre of a frame, then a batch norm.

    (N, in, H, W) -> (N, out, H', W'). `kernel` is the kernel size, by default that of the frame.
    `spread` is the distance between its taps, in taps of the frame. The convolution pads as much as
    it can. Crops, and padding that differs between two sides, come before it. Raises ValueError if
    the branch spans more taps than the frame has."""

    def __init__(
        self, frame: Frame, kernel: Size | None = None, spread: Size = 1, norm: bool = True
    ) -> None:
        super().__init__()
        small, apart = (
            frame.kernel if kernel is None else pair("kernel", kernel),
            pair("spread", spread),
        )
        rows, columns = frame.margins(
            (apart[0] * (small[0] - 1) + 1, apart[1] * (small[1] - 1) + 1)
        )
        native = max(0, min(rows)), max(0, min(columns))
        self.margins = (*(n - native[1] for n in columns), *(n - native[0] for n in rows))
        dilation = frame.dilation[0] * apart[0], frame.dilation[1] * apart[1]
        self.conv = nn.Conv2d(
            frame.inputs,
            frame.outputs,
            small,
            frame.stride,
            native,
            dilation,
            frame.groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(frame.outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(F.pad(x, self.margins) if any(self.margins) else x))
        return y
