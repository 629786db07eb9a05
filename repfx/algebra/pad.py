"""pad_with: a padding with one constant per channel, such as the bias of the map before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_with(x: Tensor, sides: Sequence[int], value: Tensor) -> Tensor:
    """Pads x (N, C, ...) with `value` (1, C, 1, ...). `sides` are in the order of F.pad.

    >>> pad_with(torch.zeros(1, 2, 1), [1, 0], torch.tensor([[[3.0], [4.0]]]))
    tensor([[[3., 0.],
             [4., 0.]]])
    """
    inside = F.pad(torch.ones_like(x[:1, :1], dtype=torch.bool), sides)
    return torch.where(inside, F.pad(x, sides), value)
