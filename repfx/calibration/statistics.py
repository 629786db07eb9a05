"""Statistics of another mode for a trained net: the norms take them over and compute what they
computed.

    gamma' = gamma sqrt(V' + eps) / sqrt(V + eps),  beta' = beta + gamma (mu' - mu) / sqrt(V + eps)

An estimated variance is another number than the true one, so a net trained with batch norm starts
`repq(bn=estimate)` with a jump, each norm by its own factor. After this the first step continues
the last one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from repfx.algebra import KernelNorm, Moments
from repfx.calibration.ranges import feed
from repfx.errors import InputError


@torch.no_grad()
def match_statistics(
    model: nn.Module, batches: Iterable[Any], *, progress: bool = False
) -> nn.Module:
    """Gives each batch norm under `repq` the statistics that its mode sees on these batches, and
    the gamma and beta that keep its eval output; in place, returns the model. `batches` as in
    `calibrate`.

    Raises InputError for a model that `repq` has not rewritten, a norm without gamma and beta, and
    where there is no batch."""
    norms = {
        n: m for n, m in model.named_modules() if isinstance(m, KernelNorm) and m.mode != "frozen"
    }
    if not norms:
        raise InputError(
            "the model has no batch norm that repq sees from its kernel: transform it with "
            "repq first"
        )
    fixed = [n for n, m in norms.items() if m.weight is None or m.bias is None]
    if fixed:
        raise InputError(
            f"{fixed[0]} has no gamma and beta (affine=False), so its output would change"
        )
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    kept = [(m, m.training) for m in model.modules()]
    hooks = []
    count = 0
    try:
        for m in model.eval().modules():
            m.training = isinstance(m, Moments)
        for name, m in norms.items():

            def note(norm: Any, args: Any, name: str = name) -> None:
                mean, _, var = norm.measure(*args)
                before = sums.get(name, (0, 0))
                sums[name] = before[0] + mean.double(), before[1] + var.double()

            hooks.append(m.register_forward_pre_hook(note))
        device = next(model.parameters()).device
        for batch in track(batches, "measuring", disable=not progress):
            feed(model, batch, device)
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in kept:
            m.training = training
    if not count:
        raise InputError("there is nothing to measure: give at least one batch")
    for name, (total, spread) in sums.items():
        _take_over(norms[name], total / count, spread / count)
    return model


def _take_over(m: KernelNorm, mean: Tensor, var: Tensor) -> None:
    assert m.weight is not None and m.bias is not None
    old = m.running_var.double() + m.eps
    m.bias.copy_(m.bias + m.weight * (mean - m.running_mean) / old.sqrt())
    m.weight.copy_(m.weight * ((var + m.eps) / old).sqrt())
    m.running_mean.copy_(mean)
    m.running_var.copy_(var)
