"""The one place for tolerances: how far apart two computations of one thing may be.

Each is a largest difference over a largest value, unless it says otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A merged region against itself. It is proved in float64; the others are what rounding in a dtype
# of its own makes of that, a whole net long.
MERGED = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Two expressions of the same random weights: equal there, they are equal everywhere.
SAME_CONSTANT = 1e-9

# A traced graph against the forward it was traced from, in float32 and in float64.
TRACED = 1e-4
TRACED_WIDE = 1e-9

# A model's output before and after passes that keep it, in float32.
KEPT = 1e-3


@dataclass(frozen=True)
class Limits:
    """How far a runtime's arithmetic may err. `spread`: how many times as far as torch's own does
    in that precision. `rounding`: of the largest value of the tensor besides. Of an output of
    indices, `indices` of the entries may differ, `few`, never most."""

    spread: float
    rounding: float
    few: int
    indices: float


# A lowered file against the model, by whether the file is float16.
LOWERED = {False: Limits(8, 2**-19, 2, 1e-2), True: Limits(8, 2**-9, 8, 5e-2)}
