"""How far two outputs differ, each tensor relative to its own size.

Boxes in 0..640 would hide scores in 0..1 that are all wrong, so the result for several tensors is
that of the worst one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repfx.errors import CheckError


@dataclass(frozen=True)
class Difference:
    """How far two tensors differ.

    `max_abs`: the largest difference. `relative`: `max_abs` divided by the largest value. `sqnr`:
    signal-to-noise ratio in dB. Integers, such as indices, are either equal or not: `different` of
    `integers` entries differ, `relative` is their share, and `sqnr` is that share in dB."""

    max_abs: float
    relative: float
    sqnr: float
    integers: int = 0
    different: int = 0

    def __str__(self) -> str:
        counted = f", {self.different} of {self.integers} integers differ" if self.integers else ""
        return (
            f"max abs {self.max_abs:.3g}, relative {self.relative:.3g}, SQNR "
            f"{self.sqnr:.1f} dB{counted}"
        )


def difference(want: Any, got: Any) -> Difference:
    """The difference of two outputs: tensors, or lists and dicts of tensors of one structure.

    For several tensors it is the worst. Equal infinities, and NaN in both, count as equal; infinity
    or NaN in only one is an infinite difference. Raises CheckError if the structures or shapes
    differ.

    >>> print(difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])))
    max abs 1, relative 0.25, SQNR 12.3 dB
    """
    return worst(differences(want, got))


def differences(want: Any, got: Any) -> tuple[Difference, ...]:
    """The difference of each tensor of two outputs.

    Raises CheckError if the structures or shapes differ.
    """
    a, b = tensors_of(want), tensors_of(got)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=False)):
        raise CheckError(
            f"outputs of different shapes: {[tuple(x.shape) for x in a]} and "
            f"{[tuple(y.shape) for y in b]}"
        )
    return tuple(_difference(x.detach().cpu(), y.detach().cpu()) for x, y in zip(a, b, strict=True))


def worst(found: Sequence[Difference]) -> Difference:
    """One difference for several: each number is the worst of them."""
    return Difference(
        max((d.max_abs for d in found), default=0.0),
        max((d.relative for d in found), default=0.0),
        min((d.sqnr for d in found), default=math.inf),
        sum(d.integers for d in found),
        sum(d.different for d in found),
    )


def _difference(want: Tensor, got: Tensor) -> Difference:
    kinds = want.dtype, got.dtype
    wide = torch.complex128 if any(k.is_complex for k in kinds) else torch.float64
    x, y = want.to(wide), got.to(wide)
    equal = (x == y) | (x.isnan() & y.isnan())
    noise = (x - y).abs().masked_fill(equal, 0).nan_to_num(math.inf, math.inf)
    most = float(noise.max()) if noise.numel() else 0.0
    if not any(k.is_floating_point or k.is_complex for k in kinds):
        entries, different = equal.numel(), int((~equal).sum())
        return Difference(
            most, different / max(entries, 1), _decibel(entries, different), entries, different
        )
    signal = x.masked_fill(~x.isfinite(), 0).abs()
    top = float(signal.max()) if signal.numel() else 0.0
    relative = most / top if top else (math.inf if most else 0.0)
    return Difference(
        most, relative, _decibel(float(signal.square().sum()), float(noise.square().sum()))
    )


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]
