"""KernelNorm: a batch norm seen from its kernel. Its input is u = K x + b, so its statistics follow from K and x:

    B[u] = scale * u + shift,    scale = gamma / sqrt(var + eps),    shift = beta - mean * scale

and a map followed by it is the map (scale * K, scale * b + shift) without u being computed, but for what a mode needs:

    running          mean from E[x] (exact, differentiable); var the moving average, this batch's u in it, detached
    batch            mean and biased variance of u, with their gradients: nn.BatchNorm2d itself
    estimate         mean = sum K E, var = sum K^2 V; E and V of the padded input, a tap at a time
    estimate_paper   mean = E[x] sum K, var = V[x] sum K^2
    sampled          mean as running; variance of u on a part of the batch, with its gradient
    frozen           the moving averages

Eval mode uses the moving averages whatever the mode.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.algebra.geometry import Geometry
from repfx.algebra.kernel import Kernel

MODES = ("running", "batch", "estimate", "estimate_paper", "sampled", "frozen")


class KernelNorm(nn.Module):
    """Takes the place, the parameters and the buffers of a batch norm: (x, K, b) -> (scale, shift), each (channels,).

    `geometry` is that of K, `mode` one of MODES, `sample` the part of the batch that "sampled" reads.
    """

    is_graph_leaf = True
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.Module, geometry: Geometry, mode: str, sample: int = 4) -> None:
        super().__init__()
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self._non_persistent_buffers_set = norm._non_persistent_buffers_set
        self.eps: float = norm.eps  # type: ignore[assignment]
        self.momentum: float | None = norm.momentum  # type: ignore[assignment]
        self.geometry, self.mode, self.sample = geometry, mode, sample
        self.training = norm.training

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, var = self._statistics(x, weight, bias)
        scale = torch.rsqrt(var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def extra_repr(self) -> str:
        return f"{self.geometry.outputs}, eps={self.eps}, momentum={self.momentum}, mode={self.mode}"

    def _statistics(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.training or self.mode == "frozen":
            return self.running_mean, self.running_var
        if self.mode == "batch":
            u = self._output(x, weight, bias)
            axes = [d for d in range(u.dim()) if d != self.geometry.channel_axis % u.dim()]
            var, mean = torch.var_mean(u, axes, correction=0)
            count = u.numel() // u.shape[self.geometry.channel_axis]
            self._move(mean, var * (count / max(count - 1, 1)))
            return mean, var
        paper = self.mode == "estimate_paper"
        first = self._taps(x, paper)
        mean = (weight * self._per_weight(first)).flatten(1).sum(1)
        mean = mean if bias is None else mean + bias
        if self.mode in ("estimate", "estimate_paper"):
            spread = self._taps(x * x, paper) - first * first
            var = (weight * weight * self._per_weight(spread)).flatten(1).sum(1)
            self._move(mean, var)
            return mean, var
        if self.mode == "sampled":
            part = x[:: self.sample] if x.shape[0] >= 2 * self.sample else x
            var = self._variance(part, weight, 0)
            self._move(mean, var)
            return mean, var
        with torch.no_grad():
            self._move(mean, self._variance(x, weight, 1))
        return mean, self.running_var.clone()  # a clone: the next step moves it, backward must not see that

    def _output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return Kernel(self.geometry, weight, bias)(x)

    def _variance(self, x: Tensor, weight: Tensor, correction: int) -> Tensor:
        """Of u on x. Where K keeps channels apart it is that of x, scaled."""
        at = self.geometry.channel_axis
        if self.geometry.is_diagonal:
            axes = [d for d in range(x.dim()) if d != at % x.dim()]
            return torch.var(x, axes, correction=correction) * weight.flatten(1)[:, 0].square()
        u = self._output(x, weight, None)
        return torch.var(u, [d for d in range(u.dim()) if d != at % u.dim()], correction=correction)

    def _taps(self, x: Tensor, everywhere: bool) -> Tensor:
        """The mean of the padded x under each tap, over the output positions: (in, *taps), 1s where `everywhere`."""
        g = self.geometry
        if g.channel_axis == -1:
            return x.flatten(0, -2).mean(0).reshape(-1, *(1,) * len(g.axes))
        x = x.mean(0, keepdim=True)
        if everywhere:
            return x.flatten(2).mean(2).reshape(-1, *(1,) * len(g.axes))
        sizes = [a.size(n) for a, n in zip(g.axes, x.shape[2:], strict=True)]
        for sides, mode in g.pad_steps:
            x = F.pad(x, sides, mode)
        found = []
        for at in product(*(range(a.taps) for a in g.axes)):
            part = x[0]
            for axis, (t, a, n) in enumerate(zip(at, g.axes, sizes, strict=True), start=1):
                part = part[(slice(None),) * axis + (slice(t, t + a.stride * (n - 1) + 1, a.stride),)]
            found.append(part.flatten(1).mean(1))
        return torch.stack(found, 1).reshape(-1, *(a.taps for a in g.axes))

    def _per_weight(self, values: Tensor) -> Tensor:
        """(in, *taps) -> (out, in / groups, *taps or 1s)."""
        g = self.geometry
        rows = values.reshape(g.groups, 1, -1, *values.shape[1:])
        rows = rows.expand(-1, g.outputs // g.groups, *rows.shape[2:])
        return rows.reshape(g.outputs, -1, *values.shape[1:])

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor) -> None:
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.detach().to(self.running_mean), share)
        self.running_var.lerp_(var.detach().to(self.running_var), share)
