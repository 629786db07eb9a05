"""Small modules as found in real code: functions, pads by hand, channels last, computed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Scale(nn.Module):
    """x * weight, where the weight has one entry per channel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Shift(Scale):
    """x + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight + x


class Call(nn.Module):
    """A function of one or more values, and of a tensor if one is given.

    `kind` says whether the tensor is a parameter, a buffer or a plain attribute.
    """

    tensor: Any

    def __init__(
        self,
        text: str,
        function: Callable[..., Any],
        tensor: Tensor | None = None,
        kind: str = "parameter",
    ) -> None:
        super().__init__()
        self.text, self.function = text, function
        if tensor is not None and kind == "buffer":
            self.register_buffer("tensor", tensor)
        else:
            self.tensor = (
                nn.Parameter(tensor) if tensor is not None and kind == "parameter" else tensor
            )

    def forward(self, *values: Tensor) -> Any:
        return (
            self.function(*values) if self.tensor is None else self.function(*values, self.tensor)
        )

    def extra_repr(self) -> str:
        return self.text if self.tensor is None else f"{self.text}, {tuple(self.tensor.shape)}"


class FunctionalNorm(nn.Module):
    """A batch norm written with F.batch_norm on buffers, or as its formula."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, axes: int, formula: bool) -> None:
        super().__init__()
        self.axes, self.formula = axes, formula
        self.register_buffer("mean", torch.rand(channels) - 0.5)
        self.register_buffer("var", torch.rand(channels) + 0.5)
        self.weight, self.bias = (
            nn.Parameter(torch.rand(channels) + 0.5),
            nn.Parameter(torch.rand(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.formula:
            return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=1e-3)
        mean, weight, bias = (
            v.view(1, -1, *[1] * self.axes) for v in (self.mean, self.weight, self.bias)
        )
        return (x - mean) * (
            weight / torch.sqrt(self.var + 1e-3).view(1, -1, *[1] * self.axes)
        ) + bias


Sides = list[tuple[int, int]]  # for each axis, how many entries before and after


class PaddedBy(nn.Module):
    """A layer whose output is padded with one number per channel.

    The numbers are the shift or bias of the layer, or `own`. `sides` are the widths of the borders,
    first axis first; `written` says which of the 2 * axes borders get the numbers."""

    def __init__(
        self, layer: nn.Module, spelling: str, sides: Sides, written: list[bool], own: Tensor | None
    ) -> None:
        super().__init__()
        self.layer, self.spelling, self.sides, self.written = layer, spelling, sides, written
        self.own = None if own is None else nn.Parameter(own)

    def constant(self) -> Tensor:
        if self.own is not None:
            return self.own
        m: Any = self.layer[-1] if isinstance(self.layer, nn.Sequential) else self.layer
        if not isinstance(m, nn.modules.batchnorm._BatchNorm):
            bias: Tensor = m.bias
            return bias
        norm: Any = m
        spread = torch.sqrt(norm.running_var + norm.eps)
        shift: Tensor = norm.bias - norm.running_mean * norm.weight / spread
        return shift

    def forward(self, x: Tensor) -> Tensor:
        return _SPELLINGS[self.spelling](
            self, self.layer(x), self.constant().view(1, -1, *[1] * len(self.sides))
        )

    def borders(self) -> list[tuple[Any, ...]]:
        """The index of each border that gets the numbers."""
        found, axes = [], len(self.sides)
        for i, (before, after) in enumerate(self.sides):
            for n, cut, wanted in zip(
                (before, after),
                (slice(0, before), slice(-after, None)),
                self.written[2 * i :],
                strict=False,
            ):
                if n and wanted:
                    found.append(
                        (slice(None),) * (2 + i) + (cut,) + (slice(None),) * (axes - 1 - i)
                    )
        return found

    def inner(self) -> tuple[Any, ...]:
        return (
            slice(None),
            slice(None),
            *(slice(before, -after or None) for before, after in self.sides),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.spelling}, sides={self.sides}, written={self.written}, "
            f"own={self.own is not None}"
        )


def flat(sides: Sides) -> list[int]:
    """The sides as F.pad takes them: last axis first."""
    return [n for side in reversed(sides) for n in side]


def _shifted(m: PaddedBy, u: Tensor, c: Tensor) -> Tensor:
    return F.pad(u - c, flat(m.sides)) + c


def _bordered(m: PaddedBy, u: Tensor, c: Tensor) -> Tensor:
    y = F.pad(u, flat(m.sides))
    for border in m.borders():
        y[border] = c
    return y


def _filled(m: PaddedBy, u: Tensor, c: Tensor) -> Tensor:
    y = F.pad(torch.zeros_like(u), flat(m.sides)) + c
    y[m.inner()] = u
    return y


_SPELLINGS: dict[str, Callable[[PaddedBy, Tensor, Tensor], Tensor]] = {
    "shifted": _shifted,
    "bordered": _bordered,
    "filled": _filled,
}


class ChannelsLast(nn.Module):
    """Steps with the channels as the last axis, between two permutes.

    With `tokens` they work on (N, positions, channels)."""

    def __init__(self, axes: int, tokens: bool, residual: bool, steps: list[nn.Module]) -> None:
        super().__init__()
        self.axes, self.tokens, self.residual = axes, tokens, residual
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens:
            return (
                self._steps(x.flatten(2).transpose(1, 2))
                .transpose(1, 2)
                .reshape(x.shape[0], -1, *_sizes(x, self.axes))
            )
        spatial = range(2, self.axes + 2)
        return self._steps(x.permute(0, *spatial, 1)).permute(
            0, self.axes + 1, *range(1, self.axes + 1)
        )

    def _steps(self, x: Tensor) -> Tensor:
        y = x
        for step in self.steps:
            y = step(y)
        return x + y if self.residual else y

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, residual={self.residual}"


def _sizes(x: Tensor, axes: int) -> list[int]:
    return [x.shape[2 + i] for i in range(axes)]


class RowNorm(nn.Module):
    """A BatchNorm1d over the last axis; all other axes are flattened into rows."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return y


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "product": lambda m: m.weight * m.scale,
    "sum": lambda m: m.weight + m.other,
    "difference": lambda m: m.weight - 0.5 * m.other.flip(-1),
    "identity": lambda m: m.weight + m.eye,
    "einsum": lambda m: torch.einsum("op,pi...->oi...", m.mix, m.weight),
    "product of matrices": lambda m: (m.mix @ m.weight.flatten(1)).view(m.weight.shape),
    "widened": lambda m: F.pad(m.point, m.around) + m.weight,
    "standardised": lambda m: m.scale * (m.weight - m.weight.mean(dim=(1, 2), keepdim=True)),
    "masked": lambda m: m.weight * (m.eye + 0.5),
}


class ComputedWeight(nn.Module):
    """A convolution whose weight is computed from parameters; it keeps the spatial sizes."""

    eye: Tensor

    def __init__(
        self,
        expression: str,
        channels: int,
        out: int,
        kernel: tuple[int, ...],
        groups: int,
        bias: bool,
    ) -> None:
        super().__init__()
        self.expression, self.groups = expression, groups
        self.axes, self.padding = len(kernel), tuple(k // 2 for k in kernel)
        self.around = [n for p in reversed(self.padding) for n in (p, p)]
        shape, ones = (out, channels // groups, *kernel), (1,) * len(kernel)
        eye = torch.zeros(shape)
        for o in range(out):
            eye[(o, o % shape[1], *self.padding)] = 1
        self.register_buffer("eye", eye)
        self.weight, self.other = (
            nn.Parameter(torch.randn(shape) * 0.3),
            nn.Parameter(torch.randn(shape) * 0.3),
        )
        self.scale = nn.Parameter(torch.rand(out, 1, *ones) + 0.5)
        self.point, self.mix = (
            nn.Parameter(torch.randn(*shape[:2], *ones)),
            nn.Parameter(torch.randn(out, out) * 0.5),
        )
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = WEIGHTS[self.expression](self)
        return CONV[self.axes](x, weight, self.bias, padding=self.padding, groups=self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.expression}, {tuple(self.weight.shape)}, groups={self.groups}, "
            f"bias={self.bias is not None}"
        )
