"""Moves a trained net's batch norms to the statistics that they see, with the same output.

    gamma' = gamma sqrt(V' + eps) / sqrt(V + eps),  beta' = beta + gamma (mu' - mu) / sqrt(V + eps)

A net trained with plain batch norm starts `repq(bn=estimate)` with a jump in every norm, because an
estimated variance differs from the true one. A norm that `qarep` has added starts with a variance
that was derived as if the branches were independent, and which may be several times off. After
`match_statistics` training starts where the trained net is."""

from __future__ import annotations

from collections.abc import Iterable
from operator import length_hint
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfx.algebra import KernelNorm, Moments
from repfx.calibration.feed import feed
from repfx.data.batches import Batches
from repfx.data.share import Share
from repfx.errors import InputError
from repfx.processes import agreed, gathered
from repfx.quant import in_eval

Norm = KernelNorm | _BatchNorm
Sums = tuple[Tensor | float, Tensor | float, int]  # of means, of variances, and how many


@torch.no_grad()
def match_statistics(
    model: nn.Module, batches: Iterable[Any], *, progress: bool = False
) -> nn.Module:
    """Sets each batch norm to the statistics that it sees on these batches.

    Under `repq` they are those of its mode. Gamma and beta change with them, so that the output in
    eval mode stays the same. Works in place and returns the model. `batches`: as for `calibrate`,
    also with several processes.

    Raises InputError for a model without batch norms, for a norm without gamma and beta, and if
    there is no image."""
    norms = _norms(model)
    sums: dict[str, Sums] = {}

    def note(name: str, norm: Norm, args: Any) -> None:
        mean, var = _seen(norm, args)
        before = sums.get(name, (0.0, 0.0, 0))
        sums[name] = before[0] + mean.double(), before[1] + var.double(), before[2] + 1

    hooks = [
        m.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: note(name, m, (*args, *kwargs.values())),
            with_kwargs=True,
        )
        for name, m in norms.items()
    ]
    given = Batches(batches, finite=True)
    share = Share(given)
    shares = track(share, "measuring", total=length_hint(given) or None, disable=not progress)
    try:
        with agreed(), in_eval(model):
            for m in model.modules():
                m.training = isinstance(m, Moments)
            for _, batch in shares:
                feed(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    share.check()
    every = gathered(sums)
    for name, norm in norms.items():
        seen = [found[name] for found in every if name in found]
        if seen:
            mean, var, count = (sum(values) for values in zip(*seen, strict=True))
            _take_over(norm, mean / count, var / count)
    return model


def _seen(norm: Norm, args: Any) -> tuple[Tensor, Tensor]:
    """The mean and variance of one batch for the moving averages: each (channels,)."""
    if isinstance(norm, KernelNorm):
        mean, _, var = norm.measure(*args)
        return mean, var
    x = args[0].float() if args[0].dtype in (torch.half, torch.bfloat16) else args[0]
    if x.numel() == x.shape[1]:
        raise InputError("a batch norm sees one value per channel: give batches of more images")
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1])
    return mean, var


def _norms(model: nn.Module) -> dict[str, Norm]:
    """The batch norms that keep statistics, by path.

    Raises InputError if there are none, and for one without gamma and beta.
    """
    norms: dict[str, Norm] = {
        name: m
        for name, m in model.named_modules()
        if (isinstance(m, KernelNorm) and m.mode != "frozen")
        or (isinstance(m, _BatchNorm) and m.running_mean is not None)
    }
    if not norms:
        raise InputError("the model has no batch norm that keeps statistics")
    fixed = [n for n, m in norms.items() if m.weight is None or m.bias is None]
    if fixed:
        raise InputError(
            f"{fixed[0]} has no gamma and beta (affine=False), so its output would change"
        )
    return norms


def _take_over(m: Norm, mean: Tensor, var: Tensor) -> None:
    assert m.weight is not None and m.bias is not None
    assert m.running_mean is not None and m.running_var is not None
    mean, var = (t.to(m.running_mean.device) for t in (mean, var))
    old = m.running_var.double() + m.eps
    m.bias.copy_(m.bias + m.weight * (mean - m.running_mean) / old.sqrt())
    m.weight.copy_(m.weight * ((var + m.eps) / old).sqrt())
    m.running_mean.copy_(mean)
    m.running_var.copy_(var)
