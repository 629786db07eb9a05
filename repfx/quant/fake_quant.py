"""FakeQuant: rounds a value to a Grid as the deployed integers will. Without a scale yet it passes values through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repfx.quant.grid import Grid


class FakeQuant(nn.Module):
    """y = Q(x) on `grid`, with buffer `scale` () or (channels,). `scale` 0 means not calibrated: y = x.

    `of_weight` tells a quantizer of constants, whose scale follows from them, from one whose scale comes from data.
    """

    is_graph_leaf = True
    scale: Tensor

    def __init__(self, grid: Grid, scale: Tensor | None = None, of_weight: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("scale", torch.zeros(()) if scale is None else torch.zeros_like(scale))
        self.of_weight = of_weight
        self.calibrated = False
        if scale is not None:
            self.set_scale(scale)
        self.observer: Any = None

    def set_scale(self, scale: Tensor) -> None:
        """Sets the scale in place. A scale of 0, as all-zero values give, becomes 1: every scale holds zeros."""
        with torch.no_grad():
            self.scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))
        self.calibrated = True

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.see(x.detach())
            return x
        return self.grid.quantize(x, self.scale) if self.calibrated else x

    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of x, as floats."""
        return self.grid.codes(x, self.scale)

    def extra_repr(self) -> str:
        g = self.grid
        kind = f"{'int' if g.signed else 'uint'}{g.bits}" + ("" if g.axis is None else f" per axis {g.axis}")
        return kind + ("" if self.calibrated else ", not calibrated")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.calibrated = bool((self.scale > 0).all())
