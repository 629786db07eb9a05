"""Options: the settings of a training run that are not part of its recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from repfx.errors import InputError


@dataclass(frozen=True)
class Options:
    """The arguments of `fit` besides its `Recipe`; see `fit` for what they mean.

    Raises InputError for a number out of range.
    """

    batch: int = 64
    workers: int = 0
    ema: float | None = None
    clip: float | None = None
    accumulate: int = 1
    teacher: nn.Module | None = None
    distill: float = 0.5
    seed: int = 0
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None
    resume: bool = True
    log: str | os.PathLike[str] | None = None
    progress: bool = True
    device: str | None = None
    precision: str | None = None
    guard: bool = True

    def __post_init__(self) -> None:
        counts: dict[str, Any] = {
            "batch": self.batch,
            "accumulate": self.accumulate,
            "checkpoint_every": self.checkpoint_every or 1,
        }
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is a whole number from 1, not {value!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema is a decay between 0 and 1, not {self.ema!r}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip is a norm above 0, not {self.clip!r}")
        if not 0 <= self.distill <= 1:
            raise InputError(f"distill is a share from 0 to 1, not {self.distill!r}")
