"""What training has ruined, seen in the last step of an epoch.

dead        all integer values of a channel of a weight, or of an activation, are 0, though the
            values are not
saturated   more than a quarter of the values lie beyond the grid, by a quarter of it or more
unused      no integer value uses more than a sixteenth of the grid
constant    the model gives each of sixteen samples or more the same output

A net with such a grid goes on training and has lost accuracy for good, without a word. A constant
model has lost all of it. One epoch may be chance, so a run is ruined after two, or by both. A loss
that a high learning rate has raised may still fall below its start, so it stops a run only if it
goes on rising; else it is said at the end.

A dead channel of a weight is brought back: its learned step is chosen anew, from its values. An
activation may be dead in one batch only, so it is named and left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repfx.quant import FakeQuant, Grid, quantizers_of, search_scale
from repfx.training.history import Epoch

SATURATED = 1 / 4
UNUSED = 1 / 16
WORSE = 0.25
SAMPLES = 16
HINT = "a lower learning rate (lr=, or step_lr= for the steps alone) or more bits may help"


@dataclass
class Seen:
    """What was wrong with the grids, a line each, and whether the model was constant.

    `anew`: by the quantizer's name, the steps that dead channels of weights should have, 0 for the
    others."""

    faults: tuple[str, ...] = ()
    constant: bool = False
    anew: dict[str, Tensor] = field(default_factory=dict)

    def of_dead(self) -> tuple[str, ...]:
        """The faults of quantizers with dead channels."""
        return tuple(line for line in self.faults if line.split(" ")[0] in self.anew)


def revive(model: nn.Module, seen: list[Seen], average: Mapping[str, Tensor] | None = None) -> Seen:
    """Gives dead channels the steps that were seen to fit, their mean over processes.

    `average`: averaged parameters by name, which get these steps, too. Returns what the processes
    have seen together."""
    quants = quantizers_of(model)
    anew: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for one in seen for name in one.anew):
        found = torch.stack([one.anew[name] for one in seen if name in one.anew])
        anew[name] = found.sum(0) / (found > 0).sum(0).clamp(min=1)
        ratio = quants[name].renew_steps(anew[name])
        if average is not None:
            average[f"{name}.log_ratio"].copy_(
                torch.where(ratio.isnan(), average[f"{name}.log_ratio"], ratio)
            )
    faults = dict.fromkeys(line for one in seen for line in one.faults)
    return Seen(tuple(faults), all(one.constant for one in seen), anew)


def ruined(now: Seen, before: Seen, first: float, rows: Sequence[Epoch], grids: int) -> str:
    """Why a run has no sense any more, in words; empty if it has.

    `now`, `before`: what was seen in the last two epochs. `first`: the loss of the first step.
    `grids`: how many quantizers the model has. If more than half of them are useless, any loss
    above the first is too high; else one a quarter above it. Sound grids or not, a loss is too high
    if it is above the first and has risen for three epochs, by a quarter of the first, though the
    learning rate has not."""
    if now.constant and (before.constant or now.faults):
        return "the model gives every sample the same output"
    losses = [row.loss for row in rows]
    useless = min(len(now.faults), len(before.faults))
    if useless and len(rows) > 1:
        least = min(losses[-2:])
        if least > first if 2 * useless > grids else worse(first, least, first):
            said = " and ".join(f"{loss:.3g}" for loss in losses[-2:])
            return f"the loss was {first:.3g} in the first step and {said} in the last two epochs"
    pairs = list(pairwise(rows[-4:]))
    rises = len(pairs) == 3 and all(b.loss > a.loss and b.lr <= a.lr for a, b in pairs)
    if rises and losses[-1] > first and worse(losses[-4], losses[-1], first):
        said = ", ".join(f"{loss:.3g}" for loss in losses[-4:])
        return f"the loss was {first:.3g} in the first step and goes on rising: {said}"
    return ""


def worse(least: float, loss: float, first: float) -> bool:
    """Whether a loss is above another by more than two batches may differ.

    A first loss of 0 says nothing of how much that is."""
    return first != 0 and loss > least + WORSE * abs(first)


def risen(first: float, rows: Sequence[Epoch]) -> tuple[str, ...]:
    """A line for a run that ends above its least loss, be it of the first step or an epoch."""
    if not rows:
        return ()
    said, least = min(
        [("the first step", first), *((f"epoch {row.epoch}", row.loss) for row in rows)],
        key=lambda pair: pair[1],
    )
    loss = rows[-1].loss
    if not worse(least, loss, first):
        return ()
    return (f"the loss was {least:.3g} in {said} and is {loss:.3g} in the last epoch: {HINT}",)


@contextmanager
def watching(model: nn.Module | None) -> Iterator[Seen]:
    """Inside, each quantizer looks at what it is given, and the model at what it returns.

    What is yielded is filled at the end. Without a model it stays empty."""
    found: dict[str, str] = {}
    anew: dict[str, Tensor] = {}
    constant: list[int] = []  # of each call, the samples that are equal, 0 if they are not

    def look(name: str, quant: FakeQuant, x: Tensor) -> None:
        if not (quant.calibrated and quant.on):
            return
        fault = fault_of(quant, x)
        if fault:
            found[name] = f"{name} {fault}: {HINT}"
        if quant.learned and quant.of_weight:
            fits = fitting(quant, x).cpu()
            # One that several calls share is dead only if it is in each of them.
            both = (fits > 0) & (anew.get(name, fits) > 0)
            anew[name] = torch.where(both, torch.maximum(fits, anew.get(name, fits)), 0.0)

    hooks = [
        quant.register_forward_pre_hook(lambda q, args, name=name: look(name, q, args[0]))
        for name, quant in (quantizers_of(model).items() if model is not None else ())
    ]
    if model is not None:
        hooks.append(
            model.register_forward_hook(
                lambda _, args, kwargs, output: constant.append(equal((args, kwargs), output)),
                with_kwargs=True,
            )
        )
    seen = Seen()
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        seen.faults = tuple(found.values())
        seen.anew = {name: steps for name, steps in anew.items() if steps.any()}
        seen.constant = sum(constant) >= SAMPLES and all(constant)


def equal(given: Any, output: Any) -> int:
    """How many samples have the same output, if all have and two of them differ; else 0."""
    inputs, outputs = ([t for t in tree_leaves(v) if _rows(t)] for v in (given, output))
    same = bool(outputs) and all(map(_equal, outputs)) and not all(map(_equal, inputs))
    return len(outputs[0]) if same else 0


def _rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) > 1 and value.numel() > 0


def _equal(rows: Tensor) -> bool:
    return bool((rows == rows[:1]).all())


@torch.no_grad()
def dead(grid: Grid, codes: Tensor, x: Tensor) -> Tensor:
    """Whether all codes of x, or of each of its channels, are 0 though x is not: () or (C,)."""
    if grid.axis is None:
        return x.any() & ~codes.any()
    rows, values = (t.movedim(grid.axis, 0).flatten(1) for t in (codes, x))
    return values.any(1) & ~rows.any(1)


@torch.no_grad()
def fitting(quant: FakeQuant, x: Tensor) -> Tensor:
    """The steps that bring the dead channels of x back, 0 for the others: () or (C,)."""
    x, grid = x.float(), quant.grid
    gone = dead(grid, quant.codes(x), x)
    if not gone.any():
        return torch.zeros_like(gone, dtype=torch.float32)
    fits = search_scale(x, grid, 2.0)
    return torch.where(gone & ~dead(grid, grid.codes(x, fits), x), fits, 0.0)


@torch.no_grad()
def fault_of(quant: FakeQuant, x: Tensor) -> str:
    """What is wrong with a quantizer that rounds x, in words; empty if nothing is."""
    grid = quant.grid
    codes = quant.codes(x)
    lost = dead(grid, codes, x)
    if lost.any():
        channels = f"all of {int(lost.sum())} of {len(lost)} channels" if lost.dim() else ""
        return f"rounds {channels or 'every value'} to 0"
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
