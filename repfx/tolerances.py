"""Tolerances: how far two computations of the same thing may be apart.

Each is the largest difference, relative to the largest value, unless a comment says otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A merged region against the original one, by dtype. The proof is in float64. The other bounds
# allow for the rounding of that dtype, added up over a whole network.
MERGED = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Two expressions evaluated on the same random weights. If they agree there, they are the same.
SAME_CONSTANT = 1e-9

# A traced graph against the forward it was traced from, in float32 and in float64.
TRACED = 1e-4
TRACED_WIDE = 1e-9

# A model's output before and after passes that must not change it, in float32 and in float64. A
# detector with random weights makes 5e-9 of rounding in float64. A computation that is wrong is off
# by far more.
KEPT = 1e-3
KEPT_WIDE = 1e-7


@dataclass(frozen=True)
class Limits:
    """How far the output of a runtime may be off.

    The error may be `spread` times the error that torch itself makes in that precision, plus
    `rounding` times the largest value of the tensor; a value of a sigmoid or softmax by `of_one`,
    too. In an output of indices, `few` entries may differ, or the share `indices` of them if that
    is more, but never most of them."""

    spread: float
    rounding: float
    of_one: float
    few: int
    indices: float


# A lowered file against the model. The key says whether the file is in float16.
LOWERED = {False: Limits(8, 2**-19, 2**-21, 2, 1e-2), True: Limits(8, 2**-9, 2**-11, 8, 5e-2)}
