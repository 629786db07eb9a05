"""Grids that training has made useless, seen in the last step of an epoch.

dead        all integer values of a channel of a weight, or of an activation, are 0, though the
            values are not
saturated   more than a quarter of the values lie beyond the grid, by a quarter of it or more
unused      no integer value uses more than a sixteenth of the grid

A net with such a grid goes on training and has lost accuracy for good, without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from repfx.quant import FakeQuant, quantizers_of

SATURATED = 1 / 4
UNUSED = 1 / 16
HINT = "a lower learning rate (lr=, or step_lr= for the steps alone) or more bits may help"


@contextmanager
def watching(model: nn.Module | None) -> Iterator[list[str]]:
    """Inside, each quantizer looks at what it is given. Yields what is wrong, a line each.

    The list is filled at the end. Without a model it stays empty."""
    found: dict[str, str] = {}

    def look(name: str, quant: FakeQuant, x: Tensor) -> None:
        fault = fault_of(quant, x) if quant.calibrated and quant.on else ""
        if fault:
            found[name] = f"{name} {fault}: {HINT}"

    hooks = [
        quant.register_forward_pre_hook(lambda q, args, name=name: look(name, q, args[0]))
        for name, quant in (quantizers_of(model).items() if model is not None else ())
    ]
    lines: list[str] = []
    try:
        yield lines
    finally:
        for hook in hooks:
            hook.remove()
        lines += found.values()


@torch.no_grad()
def fault_of(quant: FakeQuant, x: Tensor) -> str:
    """What is wrong with a quantizer that rounds x, in words; empty if nothing is."""
    grid = quant.grid
    codes = quant.codes(x)
    if grid.axis is None:
        if codes.numel() and not codes.any() and x.any():
            return "rounds every value to 0"
    else:
        rows, values = (t.movedim(grid.axis, 0).flatten(1) for t in (codes, x))
        dead = int((~rows.any(1) & values.any(1)).sum())
        if dead:
            return f"rounds all of {dead} of {len(rows)} channels to 0"
    over = x / grid.along(quant.step, x)
    beyond = (over > 1.25 * grid.high + 0.5) | (over < 1.25 * grid.low - 0.5)
    if not grid.signed:
        beyond &= over > 0  # what is negative is cut off on purpose
    share = float(beyond.float().mean()) if x.numel() else 0.0
    if share > SATURATED:
        return f"cuts off {share:.0%} of the values"
    if x.numel() and codes.any() and float(codes.abs().max()) < grid.high * UNUSED:
        return f"uses {int(codes.abs().max())} of {grid.high} steps"
    return ""
