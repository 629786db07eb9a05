"""The parameters of a block that are learned, and the modules that stand in while they are.

step       s = s0 exp(t)                            t learned
weight     straight through the rounding, or AdaRound (Nagel et al., 2020):
           Q(W) = s clamp(floor(W / s) + h(v)),  h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1) -> 0 or 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from repfx.calibration.segments import Segment
from repfx.errors import InputError
from repfx.quant import Affine, FakeQuant, quantizers_of


class AdaRound(nn.Module):
    """Replaces a weight's FakeQuant while the direction in which each value rounds is learned."""

    is_graph_leaf = True

    def __init__(self, quant: FakeQuant, weight: Tensor) -> None:
        super().__init__()
        self.grid, self.step = quant.grid, quant.grid.along(quant.step.detach(), weight)
        u = weight.detach() / self.step
        rest = (u - u.floor()).clamp(1e-3, 1 - 1e-3)
        self.v = nn.Parameter(-torch.log(1.2 / (rest + 0.1) - 1))

    def share(self) -> Tensor:
        return (1.2 * torch.sigmoid(self.v) - 0.1).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return ((weight / self.step).floor() + self.share()).clamp(
            self.grid.low, self.grid.high
        ) * self.step

    def penalty(self, beta: float) -> Tensor:
        """sum 1 - |2 h - 1|^beta, which is 0 if every h is 0 or 1."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    def settled(self, weight: Tensor) -> Tensor:
        """The weight that rounds to the learned integer values."""
        up = (self.share() >= 0.5).to(weight.dtype)
        return ((weight / self.step).floor() + up).clamp(self.grid.low, self.grid.high) * self.step


class Drop(nn.Module):
    """Replaces an activation's FakeQuant: leaves a random share of the values in float (QDrop)."""

    is_graph_leaf = True

    def __init__(self, quant: FakeQuant, share: float, random: torch.Generator) -> None:
        super().__init__()
        self.quant, self.share, self.random = quant, share, random

    def forward(self, x: Tensor) -> Tensor:
        keep = (torch.rand(x.shape, generator=self.random, device="cpu") < self.share).to(x.device)
        return torch.where(keep, x, self.quant(x))


@dataclass
class Learned:
    """The learned parameters of a block, by kind.

    `place` writes the current steps into the quantizers; call it before each forward."""

    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    affines: list[Tensor] = field(default_factory=list)
    rounds: list[AdaRound] = field(default_factory=list)
    scales: list[tuple[Any, Tensor, Tensor]] = field(default_factory=list)  # quantizer, s0, t

    def place(self) -> None:
        for quant, start, t in self.scales:
            quant.scale = start * t.exp()

    def penalty(self, done: float) -> Tensor | float:
        """AdaRound's penalty; it starts after a fifth of the iterations and gets steeper."""
        if not self.rounds or done < 0.2:
            return 0.0
        beta = 20 - 18 * (done - 0.2) / 0.8
        return (
            0.01 * sum(r.penalty(beta) for r in self.rounds) / sum(r.v.numel() for r in self.rounds)
        )


@contextmanager
def learned(
    block: Segment,
    adaround: bool,
    drop: float,
    random: torch.Generator,
    known: frozenset[int] = frozenset(),
) -> Iterator[Learned]:
    """Inside, the block runs on the learned parameters; afterwards its own tensors have the result.

    `known`: the ids of what it shares with earlier blocks. Those have learned it, so it stays.
    """
    what, module = Learned(), block.module
    quants = {path: m for path, m in quantizers_of(module).items() if id(m) not in known}
    read: dict[str, str] = {}
    for n in module.graph.nodes:
        if n.target in quants and quants[str(n.target)].of_weight:
            if n.args[0].op != "get_attr":
                raise InputError(
                    f"{n.target} rounds a weight that is computed, as under repq: reconstruct "
                    "needs a merged model, so run the pass fuse first"
                )
            if adaround and quants[str(n.target)].grid.is_sign:
                raise InputError(
                    f"{n.target} has 1 bit, which adaround cannot learn: use rounding=straight"
                )
            read[str(n.target)] = str(n.args[0].target)
    found = {path: attrgetter(ref)(module) for path, ref in read.items()}
    # Buffers are not learned.
    weights = {
        path: w for path, w in found.items() if isinstance(w, nn.Parameter) and id(w) not in known
    }
    soft = {path: w for path, w in weights.items() if adaround}
    steps = {path: q for path, q in quants.items() if not (adaround and q.of_weight)}
    wrap = partial(Drop, share=drop, random=random) if drop else None
    with _frozen(module), _which_way(module, soft, what), _moving(module, steps, what, wrap):
        if not adaround:
            what.weights += [
                w.requires_grad_() for w in {id(w): w for w in weights.values()}.values()
            ]
        for affine in block.modules(Affine).values():
            what.affines += [p.requires_grad_() for p in affine.parameters() if id(p) not in known]
        own = (p for quant in quantizers_of(module).values() for p in quant.parameters())
        taken = {*known, *map(id, found.values()), *map(id, own)}
        what.biases += [
            p.requires_grad_()
            for name, p in module.named_parameters()
            if p.dim() == 1 and id(p) not in taken and not p.requires_grad and p.is_floating_point()
        ]
        yield what


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires a gradient, except those for which it is turned on there."""
    grads = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.requires_grad_(False)
        yield
    finally:
        for p, on in grads:
            p.requires_grad_(on)


@contextmanager
def _which_way(
    module: nn.Module, weights: dict[str, nn.Parameter], what: Learned
) -> Iterator[None]:
    """Inside, an AdaRound replaces the quantizer of each weight; a shared weight has one.

    Afterwards each weight rounds to the integer values that were learned.
    """
    quants = {path: module.get_submodule(path) for path in weights}
    soft: dict[int, tuple[AdaRound, nn.Parameter]] = {}
    try:
        for path, w in weights.items():
            if id(w) not in soft:
                quant: Any = quants[path]
                soft[id(w)] = AdaRound(quant, w), w
                what.rounds.append(soft[id(w)][0])
                what.weights.append(soft[id(w)][0].v)
            module.set_submodule(path, soft[id(w)][0])
        yield
    finally:
        for path, layer in quants.items():
            module.set_submodule(path, layer)
        with torch.no_grad():
            for rounds, w in soft.values():
                w.copy_(rounds.settled(w))


@contextmanager
def _moving(
    module: nn.Module,
    quants: dict[str, FakeQuant],
    what: Learned,
    wrap: Callable[[FakeQuant], nn.Module] | None,
) -> Iterator[None]:
    """Inside, the steps of these quantizers are s0 exp(t), and `wrap` wraps those of activations.

    Afterwards the quantizers have the learned steps.
    """
    held: list[tuple[Any, Tensor]] = []
    try:
        for path, quant in quants.items():
            start: Any = quant._buffers.pop("scale")
            held.append((quant, start))
            t = torch.zeros_like(start.detach(), requires_grad=True)
            what.scales.append((quant, start.detach().clone(), t))
            what.steps.append(t)
            if wrap is not None and not quant.of_weight:
                module.set_submodule(path, wrap(quant))
        yield
    finally:
        with torch.no_grad():
            what.place()
            for quant, start in held:
                value = quant.__dict__.pop("scale", start)
                quant._buffers["scale"] = start
                start.copy_(value)
        for path, quant in quants.items():
            module.set_submodule(path, quant)
