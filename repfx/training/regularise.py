"""RepVGG's custom weight decay, and Eq. 6 of QARepVGG, for sums of a kxk and a 1x1 branch.

The sum may have a norm of its own, and `repq` may train its merged weight.

    L2 = |K3|^2 without its centre + sum (K3c t3 + K1 t1)^2 / (t3^2 + t1^2)

    t = gamma / sqrt(var + eps), detached

Eq. 6 leaves out the denominator. With it, the penalty stays the same when all gammas grow by the
same factor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repfx.capture.model import capture
from repfx.capture.model import graphs as graphs_of
from repfx.errors import InputError
from repfx.graph.view import GraphView
from repfx.rewrite.branches import branch_sums, merged_pairs


@dataclass(frozen=True)
class CustomL2:
    """The penalty on a model's multi-branch blocks.

    Add 0.5 * weight_decay * penalty() to the loss, and leave `kernels` out of other weight decay.
    `blocks` lists (kxk convolution, its norm, 1x1 convolution, its norm). `denominator=False` is
    Eq. 6."""

    blocks: tuple[tuple[nn.Module, nn.Module, nn.Module, nn.Module], ...]
    denominator: bool = True

    @staticmethod
    def of(model: nn.Module, example: object = None, denominator: bool = True) -> CustomL2:
        """Finds the blocks by their structure. Raises InputError if the model has none."""
        args = example if example is None or isinstance(example, tuple) else (example,)
        found = []
        for path, graph in graphs_of(capture(model, args).model):
            prefix = f"{path}." if path else ""
            found += [
                tuple(model.get_submodule(prefix + name) for name in names)
                for names in _blocks(GraphView(graph))
            ]
        if not found:
            raise InputError(
                "the model has no sum of a kxk and a 1x1 branch that both have a batch norm"
            )
        return CustomL2(tuple(found), denominator)  # type: ignore[arg-type]

    @property
    def kernels(self) -> list[Tensor]:
        """The weights that the penalty decays."""
        return [conv.weight for k, _, p, _ in self.blocks for conv in (k, p)]  # type: ignore[misc]

    def penalty(self) -> Tensor:
        """The penalty summed over all blocks, a scalar."""
        return torch.stack([self._of_block(*block) for block in self.blocks]).sum()

    def _of_block(
        self, conv3: nn.Module, norm3: nn.Module, conv1: nn.Module, norm1: nn.Module
    ) -> Tensor:
        k3: Tensor = conv3.weight  # type: ignore[assignment]
        k1: Tensor = conv1.weight  # type: ignore[assignment]
        at: Any = (slice(None), slice(None), *(n // 2 for n in k3.shape[2:]))
        centre = k3[at]
        t3, t1 = (_scale(norm).unsqueeze(1) for norm in (norm3, norm1))
        merged = (centre * t3 + k1.flatten(1) * t1).square()
        if self.denominator:
            merged = merged / (t3.square() + t1.square())
        return k3.square().sum() - centre.square().sum() + merged.sum()


def _blocks(view: GraphView) -> Iterator[tuple[str, ...]]:
    """The paths of a kxk convolution, its norm, a 1x1 convolution and its norm, for each block."""
    for block in branch_sums(view):
        branches = [b for b in (block.main, block.point) if b is not None]
        nodes = [n for b in branches for n in (b.conv, b.norm) if n is not None]
        if len(nodes) == 4:
            yield tuple(str(n.target) for n in nodes)
    yield from merged_pairs(view)


def _scale(norm: nn.Module) -> Tensor:
    """gamma / sqrt(running_var + eps), detached: (channels,)."""
    found = torch.rsqrt(norm.running_var + norm.eps)  # type: ignore[operator]
    return (found if norm.weight is None else found * norm.weight).detach()  # type: ignore[operator]
