"""Axis: one spatial axis of a map. With x0 the source, extended by zeros or by a mode of F.pad:

    y[o, n] = b[o] + sum_{i, t < taps} K[o, i, t] * x0[i, stride * n + t - before]
    size(y) = floor((size(x) + before + after - taps) / stride) + 1

`before` and `after` are paddings; negative ones crop. A transposed map writes where this one reads:

    y[o, stride * n + t - before] += K[o, i, t] * x[i, n]
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a map: `taps` positions per output, `stride`, and padding, in pixels.

    Only every `gap`-th tap, starting with the first, may differ from zero. This is the dilation of
    a convolution."""

    taps: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0
    gap: int = 1

    @property
    def places(self) -> range:
        """The taps that may differ from zero."""
        return range(0, self.taps, self.gap)

    def size(self, n: int) -> int:
        """Output size for an input of n pixels.

        >>> Axis(taps=3, stride=2, before=1, after=1).size(7)
        4
        """
        return (n + self.before + self.after - self.taps) // self.stride + 1

    def then(self, outer: Axis) -> Axis:
        """The axis of `outer(self(x))`: T' = T + s*(T2 - 1), s' = s*s2, p' = p + s*p2.

        >>> Axis(3, 1, 1, 1).then(Axis(3, 2, 0, 0))
        Axis(taps=5, stride=2, before=1, after=1, gap=1)
        """
        s = self.stride
        return Axis(
            self.taps + s * (outer.taps - 1),
            s * outer.stride,
            self.before + s * outer.before,
            self.after + s * outer.after,
            _gap(self, Axis(1 + s * (outer.taps - 1), gap=s * outer.gap)),
        )

    def plus(self, other: Axis) -> Axis:
        """The axis that has room for both maps, aligned at their origin.

        Both must have the same stride and output size."""
        before = max(self.before, other.before)
        end = max(self.taps - self.before, other.taps - other.before)
        gap = _gap(self, other, self.before - other.before)
        return Axis(before + end, self.stride, before, self.surplus + end, gap)

    @property
    def surplus(self) -> int:
        """p + q - T. Two axes with the same stride have the same output sizes iff this is equal."""
        return self.before + self.after - self.taps

    @property
    def is_point(self) -> bool:
        return self == Axis()


def _gap(a: Axis, b: Axis, apart: int = 0) -> int:
    """The gap of both sets of taps together, with their first taps `apart`. One tap has no gap."""
    return gcd(*(x.gap for x in (a, b) if x.taps > 1), apart) or 1
