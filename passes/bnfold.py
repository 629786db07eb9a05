"""bnfold: folds batch norms, scales and shifts into the convolution next to them; branches stay.

bn(conv(x))   ->   conv'(x),      W' = a*W,  b' = a*b + c
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from repfx.graph.ops import Map, Op
from repfx.rewrite.contract import Pass, Promise, Stage, register
from repfx.rewrite.results import Result
from repfx.rewrite.work import Work


@register
@dataclass(frozen=True)
class BnFold(Pass):
    """Merges the regions that contain one convolution or linear layer and no sum."""

    name: ClassVar[str] = "bnfold"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.REGIONS})

    def run(self, work: Work) -> Result:
        return work.merge(self.name, _one_convolution)


def _one_convolution(ops: list[Op]) -> bool:
    return (
        all(isinstance(op, Map) for op in ops)
        and sum(op.macs > 0 for op in ops if isinstance(op, Map)) == 1
    )
