"""Moves a trained net's batch norms to the statistics of another mode, with the same output.

    gamma' = gamma sqrt(V' + eps) / sqrt(V + eps),  beta' = beta + gamma (mu' - mu) / sqrt(V + eps)

An estimated variance differs from the true one. So a net that was trained with plain batch norm
starts `repq(bn=estimate)` with a jump in every norm. After `match_statistics` there is no jump."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from repfx.algebra import KernelNorm, Moments
from repfx.calibration.feed import feed
from repfx.data.batches import Batches
from repfx.errors import InputError
from repfx.quant import in_eval


@torch.no_grad()
def match_statistics(
    model: nn.Module, batches: Iterable[Any], *, progress: bool = False
) -> nn.Module:
    """Sets each batch norm under `repq` to the statistics that its mode sees on these batches.

    Gamma and beta change with them, so that the output in eval mode stays the same. Works in place
    and returns the model. `batches`: as for `calibrate`.

    Raises InputError for a model that `repq` has not rewritten, for a norm without gamma and beta,
    and if there is no image."""
    norms = _seen_by_repq(model)
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, norm: KernelNorm, args: Any) -> None:
        mean, _, var = norm.measure(*args)
        before = sums.get(name, (0, 0))
        sums[name] = before[0] + mean.double(), before[1] + var.double()

    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: note(name, m, args))
        for name, m in norms.items()
    ]
    count = 0
    try:
        with in_eval(model):
            for m in model.modules():
                m.training = isinstance(m, Moments)
            for batch in track(Batches(batches), "measuring", disable=not progress):
                feed(model, batch)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    for name, (total, spread) in sums.items():
        _take_over(norms[name], total / count, spread / count)
    return model


def _seen_by_repq(model: nn.Module) -> dict[str, KernelNorm]:
    """The batch norms whose statistics `repq` computes, by path.

    Raises InputError if there are none, and for one without gamma and beta.
    """
    norms = {
        n: m for n, m in model.named_modules() if isinstance(m, KernelNorm) and m.mode != "frozen"
    }
    if not norms:
        raise InputError(
            "the model has no batch norm whose statistics repq computes: transform it with "
            "repq first"
        )
    fixed = [n for n, m in norms.items() if m.weight is None or m.bias is None]
    if fixed:
        raise InputError(
            f"{fixed[0]} has no gamma and beta (affine=False), so its output would change"
        )
    return norms


def _take_over(m: KernelNorm, mean: Tensor, var: Tensor) -> None:
    assert m.weight is not None and m.bias is not None
    old = m.running_var.double() + m.eps
    m.bias.copy_(m.bias + m.weight * (mean - m.running_mean) / old.sqrt())
    m.weight.copy_(m.weight * ((var + m.eps) / old).sqrt())
    m.running_mean.copy_(mean)
    m.running_var.copy_(var)
