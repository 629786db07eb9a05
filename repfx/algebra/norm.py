"""KernelNorm: a batch norm computed from the kernel in front of it.

Its input is u = K x + b, so its statistics follow from K and x:

    B[u] = scale * u + shift,    scale = gamma / sqrt(var + eps),    shift = beta - mean * scale

A map followed by it is the map (scale * K, scale * b + shift). So u is computed only if the mode
needs it:

    running          mean from E[x], exact and differentiable; var: the moving average, detached
    batch            mean and biased variance of u with their gradients, as in nn.BatchNorm2d
    estimate         mean = sum K E, var = sum K^2 V; E and V of the padded input, tap by tap
    estimate_paper   mean = E[x] sum K, var = V[x] sum K^2
    sampled          mean as in `running`; variance of u on the part of x given, with its gradient
    frozen           the moving averages

In eval mode the moving averages are used, whatever the mode.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.algebra.geometry import Geometry
from repfx.algebra.kernel import Kernel

MODES = ("running", "batch", "estimate", "estimate_paper", "sampled", "frozen")


ENOUGH = 1024  # so many values per channel give a variance to 5 %
Seen = tuple[Tensor, Tensor | None, Tensor | None]  # x and its moments


class Moments(nn.Module):
    """Computes once what the KernelNorms that read x need: x -> (x, mean of x, variance of x).

    Both are over the batch, (1, channels, ...), and in float32 at least, whatever the autocast. The
    mean is None unless `first`, the variance unless `second`, and both are None in eval mode.
    `runs`: every KernelNorm runs its kernel on the x it gets. Then x is laid out with channels
    last, and convolutions on a CPU take a third less time. `sample`: that x has every `sample`-th
    image at most, at equal distances, and at least ENOUGH values per channel (along `axis`) if
    there are as many."""

    is_graph_leaf = True
    sample, axis = 1, 1  # models of repfx 0.1 do not have them

    def __init__(
        self, first: bool, second: bool, runs: bool = False, sample: int = 1, axis: int = 1
    ) -> None:
        super().__init__()
        self.first, self.second, self.whole = first, second, runs
        self.sample, self.axis = sample, axis

    def forward(self, x: Tensor) -> Seen:
        if not self.training:
            return x, None, None
        first = second = None
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        # Reductions run several times faster along memory.
        values = _wide(x).permute(0, 2, 3, 1) if last else _wide(x)
        if self.second:
            first, second = _MeanVar.apply(values)  # type: ignore[no-untyped-call]
        elif self.first:
            first = values.mean(0, keepdim=True)
        if last:
            first, second = (None if m is None else m.permute(0, 3, 1, 2) for m in (first, second))
        count = x.numel() // max(x.shape[self.axis], 1)
        read = x[:: max(1, min(self.sample, count // ENOUGH))]
        if self.whole and x.dim() == 4:
            read = read.contiguous(memory_format=torch.channels_last)
        return read, first, second


class _MeanVar(torch.autograd.Function):
    """Mean and variance over a batch, several times as fast as `torch.var_mean` on a CPU.

    Centred, because E[x^2] - E[x]^2 would lose a small variance about a large mean. Nothing but x
    and the mean is kept for the gradient, g_mean / N + 2 (x - mean) g_var / N."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(0, keepdim=True)
        ctx.save_for_backward(x, mean)
        return mean, (x - mean).square_().mean(0, keepdim=True)

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        off: Tensor = x - mean
        return off.mul_(of_var * (2 / len(x))).add_(of_mean / len(x))


class KernelNorm(nn.Module):
    """Replaces a batch norm: (x, K, b) -> (scale, shift), each (channels,).

    It takes over the parameters, buffers and children of the norm. x comes with its moments.
    `geometry` is that of K, and `mode` is one of MODES. `exact`: K has fixed taps, such as an
    average or an edge filter. Their output depends on the correlation of neighbouring pixels, which
    the estimates ignore, so these would be off by large factors. They use the variance of u
    instead."""

    is_graph_leaf = True
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.Module, geometry: Geometry, mode: str, exact: bool = False) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = (
            norm._parameters,
            norm._buffers,
            norm._modules,
        )
        self._non_persistent_buffers_set = norm._non_persistent_buffers_set
        self.eps: float = norm.eps  # type: ignore[assignment]
        self.momentum: float | None = norm.momentum  # type: ignore[assignment]
        # The statistics are those of u laid out as x is.
        self.geometry = geometry.turned_to(geometry.source_axis)
        self.mode, self.exact = mode, exact
        self.training = norm.training

    def forward(
        self, seen: Seen, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        mean, var = self._statistics(seen, weight, bias)
        scale = torch.rsqrt(var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def extra_repr(self) -> str:
        return (
            f"{self.geometry.outputs}, eps={self.eps}, momentum={self.momentum}, mode={self.mode}"
        )

    def _statistics(self, seen: Seen, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.training or self.mode == "frozen" or not seen[0].numel():
            return self.running_mean, self.running_var
        mean, var, unbiased = self.measure(seen, weight, bias)
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach().to(self.running_mean), share)
            self.running_var.lerp_(unbiased.detach().to(self.running_var), share)
        if self.mode == "running":
            # A clone, because the next step changes the buffer before backward may have read it.
            return mean, self.running_var.clone()
        return mean, var

    def measure(
        self, seen: Seen, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance, and variance for the moving average, of this batch: each (channels,)."""
        x, first, second = seen
        if self.mode == "batch":
            u = _wide(Kernel(self.geometry, weight, bias)(x))
            var, mean = torch.var_mean(u, self._others(u), correction=0)
            return mean, var, _unbiased(var, u.numel() // u.shape[self.geometry.channel_axis])
        assert first is not None
        everywhere = self.mode == "estimate_paper" or self.geometry.channel_axis == -1
        padded = self._padded(first, everywhere)
        taps = self._means(padded, everywhere)
        # The mean of u without its bias.
        level = (weight * self._per_weight(taps)).flatten(1).sum(1)
        mean = level if bias is None else level + bias
        if self.mode in ("estimate", "estimate_paper") and not self.exact:
            assert second is not None
            # The variance at each place, and that of the means of the places, which are centred
            # because E[x^2] - E[x]^2 would lose it otherwise.
            off = padded - padded.mean(self._others(padded), keepdim=True).detach()
            spread = self._means(self._padded(second, everywhere) + off.square(), everywhere)
            spread = spread - self._means(off, everywhere).square()
            var = (weight.square() * self._per_weight(spread)).flatten(1).sum(1)
            return mean, var, var
        if self.mode == "running":
            with torch.no_grad():
                var, count = self._variance(x, weight, level, taps)
            return mean, var, _unbiased(var, count)
        var, _ = self._variance(x, weight, level, taps)
        return mean, var, var

    def _variance(
        self, x: Tensor, weight: Tensor, level: Tensor, taps: Tensor
    ) -> tuple[Tensor, int]:
        """The variance of u on x around its known mean, and the number of values per channel.

        If K is one scale per channel, the variance of x itself is scaled."""
        if self.geometry.is_diagonal:
            mean = taps.flatten()
            u = _wide(x) - (
                mean.reshape(-1, *(1,) * (x.dim() - 2)) if self.geometry.channel_axis == 1 else mean
            )
        else:
            u = _wide(Kernel(self.geometry, weight, -level)(x))
        count = u.numel() // u.shape[self.geometry.channel_axis]
        var = u.square().sum(self._others(u)) / count
        return var * weight.flatten().square() if self.geometry.is_diagonal else var, count

    def _others(self, u: Tensor) -> list[int]:
        return [d for d in range(u.dim()) if d != self.geometry.channel_axis % u.dim()]

    def _padded(self, x: Tensor, everywhere: bool) -> Tensor:
        """What the taps read: x, a statistic over the batch (1, in, ...), and its padding."""
        for sides, mode in () if everywhere else self.geometry.pad_steps:
            x = F.pad(x, sides, mode)
        return x

    def _means(self, x: Tensor, everywhere: bool) -> Tensor:
        """The mean over all output positions of what each tap reads of x: (in, *places).

        With `everywhere` it is the mean of all of x, and the places are 1s."""
        g = self.geometry
        if everywhere:
            return x.mean(self._others(x)).reshape(-1, *(1,) * len(g.axes))
        sizes = [(n - a.taps) // a.stride + 1 for a, n in zip(g.axes, x.shape[2:], strict=True)]
        if all(a.stride == 1 for a in g.axes):  # the positions of a tap are one window
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(g.axes) - 1]
            means: Tensor = pool(x, sizes, [a.gap for a in g.axes])[0]
            return means
        found = []
        for at in product(*(a.places for a in g.axes)):
            part = x[0]
            for axis, (t, a, n) in enumerate(zip(at, g.axes, sizes, strict=True), start=1):
                part = part[
                    (slice(None),) * axis + (slice(t, t + a.stride * (n - 1) + 1, a.stride),)
                ]
            found.append(part.flatten(1).mean(1))
        return torch.stack(found, 1).reshape(-1, *(len(a.places) for a in g.axes))

    def _per_weight(self, values: Tensor) -> Tensor:
        """(in, *places) -> (out, in / groups, *places or 1s)."""
        g = self.geometry
        rows = values.reshape(g.groups, 1, -1, *values.shape[1:])
        rows = rows.expand(-1, g.outputs // g.groups, *rows.shape[2:])
        return rows.reshape(g.outputs, -1, *values.shape[1:])


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least: half precision loses what a variance is made of."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unbiased(var: Tensor, count: int) -> Tensor:
    return var * (count / max(count - 1, 1))
