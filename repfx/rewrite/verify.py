"""How far two outputs are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repfx.errors import CheckError


@dataclass(frozen=True)
class Difference:
    """`max_abs`: largest difference. `relative`: that over the largest value. `sqnr`: signal over noise in dB."""

    max_abs: float
    relative: float
    sqnr: float

    def __str__(self) -> str:
        return f"max abs {self.max_abs:.3g}, relative {self.relative:.3g}, SQNR {self.sqnr:.1f} dB"


def difference(want: Any, got: Any) -> Difference:
    """The difference of two outputs: tensors, or lists and dicts of tensors of one structure.

    Raises CheckError where the structures or shapes differ.

    >>> print(difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])))
    max abs 1, relative 0.25, SQNR 12.3 dB
    """
    a, b = _tensors(want), _tensors(got)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=False)):
        raise CheckError(f"outputs of different shapes: {[tuple(x.shape) for x in a]} and {[tuple(y.shape) for y in b]}")
    x, y = (torch.cat([t.detach().double().reshape(-1).cpu() for t in ts]) if ts else torch.zeros(1) for ts in (a, b))
    noise = (x - y).abs()
    most, top = float(noise.max()), float(x.abs().max())
    signal_power, noise_power = float(x.square().sum()), float(noise.square().sum())
    if math.isnan(most):
        return Difference(math.nan, math.nan, -math.inf)
    relative = most / top if top else (math.inf if most else 0.0)
    if noise_power == 0:
        return Difference(most, relative, math.inf)
    return Difference(most, relative, 10 * math.log10(signal_power / noise_power) if signal_power else -math.inf)


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]
