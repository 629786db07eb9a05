"""Recipe: the hyperparameters of a training run, from a preset or given one by one.

The learning rate depends only on the step:

lr(step) = peak * (step + 1) / warm-up steps        at first, then
lr(step) = peak * (1 + cos(pi t)) / 2               t from 0 to 1 over the rest, or constant
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from repfx.errors import InputError, unknown
from repfx.quant import quantizers_of

PRESETS: dict[str, dict[str, Any]] = {
    "repvgg": {
        "epochs": 120,
        "optimizer": "sgd",
        "momentum": 0.9,
        "lr": 0.1,
        "schedule": "cosine",
        "l2": "custom",
    },
    "qarepvgg": {
        "epochs": 120,
        "optimizer": "sgd",
        "momentum": 0.9,
        "lr": 0.1,
        "schedule": "cosine",
        "weight_decay": 1e-4,
    },
    "qat": {
        "epochs": 10,
        "warmup": 3,
        "optimizer": "sgd",
        "momentum": 0.9,
        "lr": 0.01,
        "schedule": "cosine",
    },
    "yolov6": {
        "epochs": 300,
        "warmup": 3,
        "optimizer": "sgd",
        "momentum": 0.937,
        "lr": 0.01,
        "schedule": "cosine",
        "weight_decay": 5e-4,
    },
    "ecbsr": {"optimizer": "adam", "lr": 5e-4, "schedule": "constant", "weight_decay": 0.0},
}
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "constant")
L2 = ("plain", "custom", "eq6")


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run.

    `warmup` is in epochs. `decay_norm` also decays batch norms and other parameters of one
    dimension. `l2`: plain weight decay, or RepVGG's custom decay, or Eq. 6 of QARepVGG, on the
    kernels of multi-branch blocks (see `CustomL2`). `step_lr` is the learning rate of the learned
    steps of quantizers; None is `lr`."""

    epochs: int
    optimizer: str | Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str | Callable[[float], float] = "cosine"
    warmup: float = 0
    decay_norm: bool = False
    l2: str = "plain"
    step_lr: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.l2 not in L2:
            raise unknown("l2", str(self.l2), L2)
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise InputError(f"epochs is a whole number from 1, not {self.epochs!r}")
        for name in ("lr", "momentum", "weight_decay", "warmup", "step_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is a number from 0, not {value!r}")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step `step`, counted from 0, if an epoch has `steps` steps."""
        return self.lr * self.share_at(step, steps)

    def share_at(self, step: int, steps: int) -> float:
        """The share of its rate that each group has in step `step`."""
        warm, total = self.warmup * steps, self.epochs * steps
        if step < warm:
            return min(1.0, (step + 1) / warm)
        share = (step - warm) / max(1.0, total - warm)
        if callable(self.schedule):
            return self.schedule(share)
        return 0.5 * (1 + math.cos(math.pi * share)) if self.schedule == "cosine" else 1.0


def recipe(preset: str | Mapping[str, Any] | None, given: Mapping[str, Any]) -> Recipe:
    """The preset, with the values in `given` that are not None on top.

    Raises InputError if the number of epochs is missing or a name is unknown.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        preset = PRESETS[preset]
    values = {**(preset or {}), **{k: v for k, v in given.items() if v is not None}}
    for name in values:
        if name not in {f.name for f in fields(Recipe)}:
            raise unknown("setting in preset", name, [f.name for f in fields(Recipe)])
    if "epochs" not in values:
        raise InputError("give the number of epochs to train: epochs=")
    return Recipe(**values)


def optimizer_of(model: nn.Module, r: Recipe, free: Iterable[Tensor] = ()) -> torch.optim.Optimizer:
    """The optimizer, with its parameter groups.

    Weight decay applies to parameters of two or more dimensions (with `decay_norm`, to all), but
    not to those in `free` and not to the steps of quantizers. With `step_lr` the steps are a group
    of their own. Raises InputError for a model without a parameter to train.
    """
    steps = {id(p) for m in quantizers_of(model).values() for p in m.parameters()}
    spared = {id(p) for p in free} | steps
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("the model has no parameter to train")
    kinds: dict[str, list[Tensor]] = {"decayed": [], "free": [], "steps": []}
    for p in trained:
        decays = id(p) not in spared and (p.dim() > 1 or r.decay_norm)
        apart = r.step_lr is not None and id(p) in steps
        kinds["steps" if apart else "decayed" if decays else "free"].append(p)
    groups: list[dict[str, Any]] = [
        {
            "params": params,
            "weight_decay": r.weight_decay if kind == "decayed" else 0.0,
            "lr": r.step_lr if kind == "steps" else r.lr,
        }
        for kind, params in kinds.items()
        if params
    ]
    if callable(r.optimizer):
        return r.optimizer(groups)
    if r.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=r.lr, momentum=r.momentum)
    return (torch.optim.Adam if r.optimizer == "adam" else torch.optim.AdamW)(groups, lr=r.lr)
