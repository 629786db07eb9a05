"""Where the weights of a region are read from: what the model holds, in float64, or draws in place
of it.

The algebra and its proof run on the CPU wherever the model is: some devices have no float64, others
only a slow one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.graph.ops import Ref
from repfx.graph.view import GraphView

Fetch = Callable[[Ref], Tensor]


def in_float64(view: GraphView, keep: bool) -> Fetch:
    """Reads constants in float64. What is not kept is freed as soon as the kernel it went into is
    made.
    """
    cache: dict[Ref, Tensor] = {}

    def fetch(ref: Ref) -> Tensor:
        if ref in cache:
            return cache[ref]
        value = _expression(view, ref, fetch) if isinstance(ref, fx.Node) else _held(view, ref)
        if keep:
            cache[ref] = value
        return value

    return fetch


def drawn(view: GraphView, seed: int) -> Fetch:
    """Every parameter and buffer drawn in float64, and the expressions of them.

    From (0.5, 1.5), parameters with either sign but for the first seed; buffers hold variances and
    stay positive."""
    generator = torch.Generator().manual_seed(seed)
    cache: dict[Any, Tensor] = {}

    def fetch(ref: Ref) -> Tensor:
        if isinstance(ref, fx.Node) and ref.op != "get_attr":
            if ref not in cache:
                cache[ref] = _expression(view, ref, fetch)
            return cache[ref]
        now = view.tensor(ref)
        if id(now) not in cache:  # tied tensors are drawn once
            draw = (
                torch.rand(now.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
            )
            if seed and isinstance(now, nn.Parameter):
                draw = draw * (
                    torch.randint(2, now.shape, generator=generator, device="cpu") * 2 - 1
                )
            cache[id(now)] = draw if now.is_floating_point() else now.cpu()
        return cache[id(now)]

    return fetch


def _held(view: GraphView, path: str) -> Tensor:
    owner_path, _, name = path.rpartition(".")
    owner = view.modules[owner_path]
    if nn.utils.parametrize.is_parametrized(owner, name):
        # computed where it is read: in float64 too
        computed: Tensor = getattr(copy.deepcopy(owner).cpu().double().eval(), name)
        return computed.detach()
    return _wide(view.tensor(path))


def _expression(view: GraphView, node: fx.Node, fetch: Fetch) -> Tensor:
    """A constant expression in float64, or in its own precision where it holds constants that
    insist on theirs.
    """
    try:
        value = view.evaluate(node, fetch)
    except RuntimeError:
        value = view.tensor(node)
    return _wide(value)


def _wide(value: Tensor) -> Tensor:
    """In float64, but for indices and masks."""
    return (
        value.detach().cpu().to(torch.float64)
        if value.is_floating_point()
        else value.detach().cpu()
    )
