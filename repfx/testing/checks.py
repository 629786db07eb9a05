"""Assertions that the output did not change: on one input, and on other sizes and batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repfx.api import verify
from repfx.errors import InputError
from repfx.quant import same_modes
from repfx.rewrite.difference import difference
from repfx.tolerances import MERGED

_STATEFUL = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Sets the statistics and weights of every batch norm to random values, in place.

    With the default values a batch norm is almost the identity, and a test would show little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for name, low, high in (
                    ("running_mean", -0.5, 0.5),
                    ("running_var", 0.5, 2.0),
                    ("weight", 0.5, 1.5),
                ):
                    tensor = getattr(m, name)
                    if tensor is not None:
                        tensor.copy_(
                            torch.rand(tensor.shape, generator=generator) * (high - low) + low
                        )
                if m.bias is not None:
                    m.bias.copy_(torch.randn(m.bias.shape, generator=generator) * 0.3)
    return model


def assert_same(before: Any, after: Any, x: Any, tolerance: float | None = None) -> None:
    """Asserts that two models have the same output on x.

    The largest difference over the largest value is at most `tolerance`, by default that of the
    dtype of x.
    """
    first = x[0] if isinstance(x, tuple) else x
    limit = MERGED[first.dtype] if tolerance is None else tolerance
    off = verify(before, after, x)
    assert off.relative <= limit, f"outputs differ: {off}, more than {limit:.0e}"


def assert_same_elsewhere(
    before: nn.Module, after: nn.Module, x: Tensor, tolerance: float | None = None
) -> None:
    """Asserts the same on inputs of other sizes and batch sizes, if `before` accepts them.

    `after` may refuse another size, by a fact that its graph rests on, but no other batch size.
    A model with neither norm nor dropout is also compared in train mode, on x."""
    limit = MERGED[x.dtype] if tolerance is None else tolerance
    generator = torch.Generator().manual_seed(1)
    with same_modes(before, after):
        for shape in _other_shapes(x.shape):
            other = torch.randn(shape, generator=generator, dtype=x.dtype)
            _assert_same_in(False, before, after, other, limit, shape[2:] != x.shape[2:])
        if not any(isinstance(m, _STATEFUL) for m in before.modules()):
            _assert_same_in(True, before, after, x, limit, False)


def _other_shapes(shape: torch.Size) -> list[tuple[int, ...]]:
    """Other sizes, even where they were odd, and the same sizes with smaller and larger batches."""
    n, channels, *sizes = shape
    return [
        (n, channels, *(s + 2 * i + 1 for i, s in enumerate(sizes))),
        (1, *shape[1:]),
        (n + 1, *shape[1:]),
    ]


@torch.no_grad()
def _assert_same_in(
    training: bool,
    before: nn.Module,
    after: nn.Module,
    x: Tensor,
    limit: float,
    may_refuse: bool,
) -> None:
    try:
        want = _seeded(before.train(training), x)
    except (RuntimeError, ValueError):  # it does not accept these sizes
        return
    try:
        got = _seeded(after.train(training), x)
    except InputError as error:
        if "was traced with" in str(error) and may_refuse:
            return
        raise
    off = difference(want, got)
    mode = "train" if training else "eval"
    assert off.relative <= limit, (
        f"outputs differ on {tuple(x.shape)} in {mode} mode: {off}, more than {limit:.0e}"
    )


def _seeded(model: nn.Module, x: Tensor) -> Any:
    """The output, always for the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(x.clone())
