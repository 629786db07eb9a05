"""FakeQuant rounds values to a Grid, as the deployed integers will.

With `learned`, its step s is learned by the gradient of LSQ (Esser et al., 2020):

    dQ/ds = round(v/s) - v/s inside the grid, low or high outside

What an optimizer changes is r in s = scale exp(r), so a step stays positive, whatever the learning
rate, and a rate means the same for steps of any size. dL/dr = s dL/ds is what a gain has that
multiplies the values, such as a batch norm's gamma near 1, so r needs no gradient scale (LSQ has
1 / sqrt(N high), and loses steps to 0 at 8 bits). Weight decay pulls a step to where it started."""

from __future__ import annotations

import math
import warnings
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from repfx.quant.grid import Grid
from repfx.quant.observers import search_scale

# A step is at most e^30 times, and at least e^-30 times, what it started from.
FARTHEST = 30.0
# No scale of values that are not all zero is this small.
SMALLEST = torch.finfo(torch.float32).tiny


UNSET = (
    "a quantizer has no step yet and does not round: train the model, or run repfx.calibrate; make "
    "a copy for an average of weights after that"
)


warns: ContextVar[bool] = ContextVar("warns", default=True)


class Unset(UserWarning):
    """A model runs in eval mode with a quantizer that is not calibrated."""


class FakeQuant(nn.Module):
    """y = Q(x) on `grid`, with a `scale` of shape () or (channels,).

    y = x as long as the quantizer is not `calibrated`, is not `on`, or has an `observer`, which is
    shown x. One that is not calibrated has no scale yet: `scale` is infinite, which it stays in an
    average of weights that began with it. In eval mode it warns (`Unset`).

    `of_weight`: the quantizer rounds a weight, and its scale follows from that weight. Otherwise it
    rounds an activation, and its scale comes from data.

    `learned`: `log_ratio`, of the same shape, is a parameter, and the step is scale
    exp(log_ratio). A scale that is not set yet is then set in training, from the first value seen,
    to the smallest squared error (MinError); if `more` values share it, to the largest of theirs.
    Zeros have no scale: that of an activation that was zero so far (`empty`) is set in training
    from the first values that are not.
    """

    is_graph_leaf = True
    scale: Tensor
    # Whether calibration may find that the model is better off without it. It is left out then, and
    # as long as it has no scale it rounds nothing, without a warning.
    optional: bool = False
    empty: bool = False
    more: int = 0  # further calls, of a quantizer that several values share, that may set the scale
    # Temporary state, set for a while by `repfx.quant.switches`. It is not saved with the model.
    on: bool = True
    observer: Any = None

    def __init__(
        self,
        grid: Grid,
        scale: Tensor | None = None,
        of_weight: bool = False,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        like = torch.zeros((), device="cpu") if scale is None else torch.zeros_like(scale)
        self.register_buffer("scale", torch.full_like(like, math.inf))
        if learned:
            self.log_ratio = nn.Parameter(like)
        self.of_weight, self.learned = of_weight, learned
        self.calibrated = False
        if scale is not None:
            self.set_scale(scale)

    def set_scale(self, scale: Tensor) -> None:
        """Sets the scale in place. A scale of 0 comes from zeros only.

        It becomes 1, or the smallest number if it is learned, until training sets it."""
        with torch.no_grad():
            least = SMALLEST if self.learned else 1.0
            self.scale.copy_(torch.where(scale > SMALLEST, scale, least))
            if self.learned:
                self.log_ratio.zero_()
        self.calibrated, self.more = True, 0
        self._find_empty()

    def _find_empty(self) -> None:
        self.empty = self.learned and bool((self.scale <= SMALLEST).any()) and not self.of_weight

    def _begin(self, x: Tensor) -> None:
        """Sets the scale from the first values that are seen in training."""
        scale = search_scale(x.detach(), self.grid, 2.0).to(self.scale)
        more = self.more
        if self.calibrated:  # not in place, as the backward pass of the call before needs its scale
            self.scale, self.more = torch.maximum(scale, self.scale), more - 1
        else:
            self.set_scale(scale)
            self.more = more

    def renew_steps(self, steps: Tensor) -> Tensor:
        """Sets those learned steps in place for which `steps` is above 0, and leaves the others.

        Steps that come from zeros only are left, too: training sets their scale. Returns
        their `log_ratio`, NaN for the others."""
        with torch.no_grad():
            steps = steps.to(self.scale)
            found = (steps > 0) & (self.scale > SMALLEST)
            ratio = torch.where(found, (steps / self.scale).log(), math.nan)
            self.log_ratio.copy_(torch.where(ratio.isnan(), self.log_ratio, ratio))
        return ratio

    def complete(self, state: dict[str, Any], prefix: str) -> None:
        """Brings a state dict by repfx 0.1, which learned the scale itself, to today's form."""
        name = f"{prefix}scale"
        if self.learned and f"{prefix}log_ratio" not in state:
            state[f"{prefix}log_ratio"] = torch.zeros_like(self.log_ratio)
            if name in state:
                state[name] = _as_used(state[name])
        elif name in state and not state[name].any():  # 0 was what is infinite now
            state[name] = torch.full_like(state[name], math.inf)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.renew()

    def renew(self) -> None:
        """Brings a module that repfx 0.1 saved to today's form."""
        old = self._parameters.pop("scale", None)
        if old is not None:
            self.register_buffer("scale", _as_used(old.detach()))
            self.log_ratio = nn.Parameter(torch.zeros_like(old), old.requires_grad)
        if not self.scale.any():
            self.scale = torch.full_like(self.scale, math.inf)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.see(x)
            return x
        if not self.on:
            return x
        if self.learned and self.training:
            if self.empty and x.any():  # not in place, as in `_begin`
                self.scale = search_scale(x.detach(), self.grid, 2.0).to(self.scale)
                self._find_empty()
            elif self.more or not self.calibrated:
                self._begin(x)
        if not self.calibrated:
            if self.missing and not self.training and warns.get():
                warnings.warn(Unset(UNSET), stacklevel=2)
            return x
        return self.grid.quantize(x, self.step)

    @property
    def missing(self) -> bool:
        """Whether it has no scale and needs one."""
        return not self.calibrated and not self.optional

    @property
    def step(self) -> Tensor:
        """The scale that is used. A learned one is positive and finite."""
        if not self.learned:
            return self.scale
        moved = self.scale * self.log_ratio.clamp(-FARTHEST, FARTHEST).exp()
        return moved.clamp(min=torch.finfo(moved.dtype).tiny)

    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of x, as floats."""
        return self.grid.codes(x, self.step)

    def extra_repr(self) -> str:
        g = self.grid
        kind = f"{'int' if g.signed else 'uint'}{g.bits}" + (
            "" if g.axis is None else f" per axis {g.axis}"
        )
        return kind + ("" if self.calibrated else ", not calibrated") + ("" if self.on else ", off")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.optional and f"{prefix}scale" not in state_dict:
            return  # calibration has left it out
        self.complete(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.calibrated = _is_set(self.scale)
        self.optional = self.optional and not self.calibrated
        self.more = 0 if self.calibrated else self.more
        self._find_empty()


def _is_set(scale: Tensor) -> bool:
    """Whether this is a scale; in repfx 0.1 it was 0 until it was set."""
    return bool((scale.isfinite() & (scale != 0)).all())


def _as_used(scale: Tensor) -> Tensor:
    """The scale that repfx 0.1 used for a learned one, which may have walked below 0."""
    least = scale.clamp(min=torch.finfo(torch.float32).eps)
    return torch.where(scale == 0, math.inf, least)  # 0 is not set yet
