"""Grid: the integers of a number format. Every grid here is uniform, with zero at code 0.

codes(v) = clamp(round(v / s), low, high),    Q(v) = s * codes(v)

A signed grid of 1 bit has no 0. It is the sign and a scale, as in binary networks (Rastegari et
al., 2016), which is best at s = mean |v|:

codes(v) = 1 if v >= 0 else -1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repfx.errors import InputError


@dataclass(frozen=True)
class Grid:
    """A grid of `bits` bits, with one scale for a tensor (`axis` None) or one per index of `axis`.

    A signed grid is symmetric, [-(2^(b-1) - 1), 2^(b-1) - 1], so that a sign can be folded into the
    codes; at 1 bit it is {-1, 1}. `full` adds the code -2^(b-1), from 2 bits on. A `reduced` grid
    is half a signed one, [-2^(b-2), 2^(b-2)]: multiply two of its codes by unsigned codes, and the
    sum of the products fits into a signed integer of 2b bits.

    >>> Grid(8).low, Grid(8).high, Grid(8, signed=False).high, Grid(8, reduced=True).high
    (-127, 127, 255, 64)
    """

    bits: int = 8
    signed: bool = True
    axis: int | None = None
    full: bool = False
    reduced: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 1 <= self.bits <= 16):
            raise InputError(f"bits must be an integer from 1 to 16, not {self.bits!r}")
        if self.reduced and (not self.signed or self.full):
            raise InputError("only a symmetric signed grid can be reduced")

    @property
    def is_sign(self) -> bool:
        return self.signed and self.bits == 1

    @property
    def high(self) -> int:
        if self.is_sign:
            return 1
        if self.reduced:
            return 1 << (self.bits - 2)
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def low(self) -> int:
        return -self.high - (self.full and self.bits > 1) if self.signed else 0

    def along(self, scale: Tensor, like: Tensor) -> Tensor:
        """The scale, shaped to broadcast over `like`."""
        if self.axis is None:
            return scale
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return scale.reshape(shape)

    def codes(self, v: Tensor, scale: Tensor) -> Tensor:
        """The integer codes of v, as floats. Ties go to even, as in ONNX's QuantizeLinear."""
        return torch.clamp(self._rounded(v / self.along(scale, v)), self.low, self.high)

    def quantize(self, v: Tensor, scale: Tensor) -> Tensor:
        """v rounded to the grid.

        Inside the grid the gradient is that of a straight-through estimator, outside it is 0."""
        s = self.along(scale, v)
        u = torch.clamp(v / s, self.low, self.high)
        return (u + (self._rounded(u) - u).detach()) * s

    def _rounded(self, u: Tensor) -> Tensor:
        return torch.where(u >= 0, 1.0, -1.0).to(u) if self.is_sign else torch.round(u)

    def mean(self, v: Tensor) -> Tensor:
        """The mean magnitude of v: a scalar, or one per index of `axis`."""
        if self.axis is None:
            return v.detach().abs().mean()
        return v.detach().abs().movedim(self.axis, 0).flatten(1).mean(1)

    def amax(self, v: Tensor) -> Tensor:
        """The largest magnitude of v: a scalar, or one per index of `axis`."""
        if self.axis is None:
            return v.detach().abs().amax()
        return v.detach().abs().movedim(self.axis, 0).flatten(1).amax(1)
