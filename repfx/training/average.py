"""Average: the exponential moving average of a model's parameters, as separate tensors.

    a <- decay * a + (1 - decay) * p    after each step; a = p after the first

The model is not copied: copying a GraphModule reorders its parameters and turns its constants into
buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The average of each parameter, by name. Buffers are not averaged."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.values: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in model.named_parameters()
        }
        self.move = get_ema_multi_avg_fn(decay)
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Updates the average with the parameters after one more step."""
        now = {name: p.detach() for name, p in model.named_parameters()}
        mine, theirs = [self.values[n] for n in now], list(now.values())
        if self.steps == 0:
            torch._foreach_copy_(mine, theirs)
        else:
            self.move(mine, theirs, self.steps)
        self.steps += 1

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's parameters are the average."""
        own = {name: p.data for name, p in model.named_parameters()}
        try:
            self.put(model)
            yield
        finally:
            for name, p in model.named_parameters():
                p.data = own[name]

    def put(self, model: nn.Module) -> None:
        """Replaces the model's parameters by the average, for good."""
        for name, p in model.named_parameters():
            p.data = self.values[name]
