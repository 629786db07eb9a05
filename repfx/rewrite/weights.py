"""The weights of a region in float64: the model's own, or random ones in their place.

The algebra and its proofs run on the CPU, wherever the model is: some devices have no float64, and
on others it is slow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.graph.ops import Ref
from repfx.graph.view import GraphView

Fetch = Callable[[Ref], Tensor]


class InFloat64:
    """Reads the model's constants in float64; `keep` caches them, else each is freed after use.

    A class and not a closure: one that calls itself would be freed only by the garbage collector,
    and the copies of the weights with it."""

    def __init__(self, view: GraphView, keep: bool) -> None:
        self._view, self._keep = view, keep
        self._cache: dict[Ref, Tensor] = {}

    def __call__(self, ref: Ref) -> Tensor:
        if ref in self._cache:
            return self._cache[ref]
        if isinstance(ref, fx.Node):
            value = _expression(self._view, ref, self)
        else:
            value = _held(self._view, ref)
        if self._keep:
            self._cache[ref] = value
        return value


class Drawn:
    """Draws every parameter and buffer at random in float64, and evaluates expressions of them.

    Values are uniform in (0.5, 1.5). Parameters get a random sign, except with seed 0; buffers
    stay positive, because some are variances."""

    def __init__(self, view: GraphView, seed: int) -> None:
        self._view, self._seed = view, seed
        self._generator = torch.Generator().manual_seed(seed)
        self._cache: dict[Any, Tensor] = {}

    def __call__(self, ref: Ref) -> Tensor:
        if isinstance(ref, fx.Node) and ref.op != "get_attr":
            if ref not in self._cache:
                self._cache[ref] = _expression(self._view, ref, self)
            return self._cache[ref]
        now = self._view.tensor(ref)
        if id(now) not in self._cache:  # tied tensors are drawn once
            self._cache[id(now)] = self._draw(now) if now.is_floating_point() else now.cpu()
        return self._cache[id(now)]

    def _draw(self, like: Tensor) -> Tensor:
        generator = self._generator
        draw = torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
        if self._seed and isinstance(like, nn.Parameter):
            draw = draw * (torch.randint(2, like.shape, generator=generator, device="cpu") * 2 - 1)
        return draw


def _held(view: GraphView, path: str) -> Tensor:
    owner_path, _, name = path.rpartition(".")
    owner = view.modules[owner_path]
    if nn.utils.parametrize.is_parametrized(owner, name):
        # A parametrized weight is computed when it is read: compute it in float64, too.
        computed: Tensor = getattr(copy.deepcopy(owner).cpu().double().eval(), name)
        return computed.detach()
    held: Tensor = _wide(view.tensor(path))
    return held


def _expression(view: GraphView, node: fx.Node, fetch: Fetch) -> Tensor:
    """A constant expression in float64, or in its own precision if it cannot run in float64."""
    try:
        value = view.evaluate(node, fetch)
    except RuntimeError:
        value = view.tensor(node)
    wide: Tensor = _wide(value)
    return wide


def _wide(value: Any) -> Any:
    """The value in float64; indices and masks keep their type, and so does what is no tensor."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_wide, value)) if type(value) in (tuple, list) else value
    if not isinstance(value, Tensor):
        return value
    here = value.detach().cpu()
    return here.to(torch.float64) if here.is_floating_point() else here
