"""Modules that let a traced graph follow `.train()` and `.eval()`, and the flag used in tracing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Mode(nn.Module):
    """Returns whether it is in training mode, for `training=` of F.dropout and F.batch_norm."""

    def forward(self) -> bool:
        return self.training


class TrainOnly(nn.Module):
    """Runs `inner` in training mode and returns x in eval mode, as stochastic depth does.

    Rewrites treat it as an identity."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(x, *args, **kwargs) if self.training else x


class Asked:
    """What a trace answers to `if self.training`, and how often it was asked.

    `training`: the ids of modules whose training branch is always taken, because it computes in
    eval mode what their eval branch computes. `deployed`: those whose training branch is left out.
    """

    def __init__(self, value: bool) -> None:
        self.value = value
        self.times = 0
        self.training: set[int] = set()
        self.deployed: set[int] = set()


class ModeFlag:
    """Replaces the attribute `training` of a module during a trace.

    An `if` on it takes the branch that `asked` says, and is counted. Passed as an argument, it
    becomes a `Mode` node that reads the flag of that module."""

    def __init__(self, asked: Asked, owner: nn.Module) -> None:
        self.asked, self.owner = asked, owner

    def __bool__(self) -> bool:
        if id(self.owner) in self.asked.training:
            return True
        if id(self.owner) in self.asked.deployed:
            return False
        self.asked.times += 1
        return self.asked.value

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __index__(self) -> int:
        return int(bool(self))

    def __mul__(self, other: Any) -> Any:
        return bool(self) * other

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return "self.training"
