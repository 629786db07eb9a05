"""The input of a layer over the data: its values, its ranges and what clipping it would gain.

Q_r(x) = s clamp(round(x / s), low, high),   s = r max|x| / high,   r = 1.0, 0.9, ... 0.3  (RepAPQ)

SQNR(r) = 10 log10( sum x^2 / sum (x - Q_r(x))^2 )
"""

from __future__ import annotations

import torch
from torch import Tensor

from repfx.quant import FakeQuant
from repfx.reporting.numbers import Activation, Clip, decibels
from repfx.reporting.spreads import Tally, reach, spread

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the largest magnitude


class Inputs:
    """Statistics of a quantizer's inputs over all batches.

    `axis`: that of the channels. `largest`: the largest magnitude over all batches, which the clips
    are shares of. Where all are 0 there is nothing to clip."""

    def __init__(self, quant: FakeQuant, axis: int, largest: float) -> None:
        self.quant, self.axis, self.largest = quant, axis, largest
        self.values = Tally()
        self.clipped = 0
        self.codes = torch.zeros(2**16, dtype=torch.bool, device="cpu")
        self.channels: Tensor | None = None
        self.samples: list[Tensor] = []
        self.shares = SHARES if largest > 0 else ()
        self.noise = [0.0 for _ in self.shares]

    def add(self, x: Tensor) -> None:
        """Adds a batch (N, ...)."""
        grid, flat = self.quant.grid, x.detach().flatten().float()
        self.values.add(x)
        codes = self.quant.codes(flat)
        self.codes[codes.to(torch.int64).add_(2**15).unique()] = True
        over = flat / self.quant.step
        self.clipped += int(((over > grid.high + 0.5) | (over < grid.low - 0.5)).sum())
        for i, share in enumerate(self.shares):
            rounded = grid.quantize(flat, flat.new_tensor(share * self.largest / grid.high))
            self.noise[i] += float((flat - rounded).double().square().sum())
        if x.dim() > 1:
            size = x.detach().abs()
            self.samples.append(size.flatten(1).amax(1))
            top = size.movedim(self.axis, 0).flatten(1).amax(1)
            self.channels = (
                top
                if self.channels is None or len(self.channels) != len(top)
                else self.channels.maximum(top)
            )

    def activation(self) -> Activation | None:
        """The numbers of all batches, None where they held no values."""
        values = self.values.spread()
        if values is None:
            return None
        grid, channels = self.quant.grid, self.channels
        wide, median = reach(channels)
        return Activation(
            values,
            0 if channels is None else len(channels),
            wide,
            median,
            self.clipped / self.values.count,
            int(self.codes.sum()) / (grid.high - grid.low + 1),
            spread(torch.cat(self.samples)) if self.samples else None,
            None if channels is None else spread(channels),
            self._clip(),
        )

    def _clip(self) -> Clip | None:
        if not self.shares:
            return None
        sqnr = tuple(decibels(self.values.square, noise) for noise in self.noise)
        best = self.noise.index(min(self.noise))
        gain = 0.0 if best == 0 else sqnr[best] - sqnr[0]
        return Clip(self.shares, sqnr, self.shares[best], gain)
