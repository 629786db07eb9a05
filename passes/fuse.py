"""fuse: merges every linear block into one equal convolution, where that costs no more.

    relu(bn(conv3(x)) + bn(conv1(x)) + bn(x))   ->   relu(conv(x))

It covers any block that is linear between one input and one output: branches, chains, batch norms,
scales, pools and pads. A region that is inexact at the border, or that would cost more when merged,
is declined with the reason, and the blocks inside it are merged instead. A value that is also read
elsewhere is kept. A norm, scale or shift that no region takes moves through pools, flattens,
transposes and concatenations into the layers before or behind them. A second run finds nothing to
do. After `repq` it replaces the code that computes
each weight by the weight itself; after `qprep` it folds each affine into its layer's integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from repfx.rewrite.contract import Pass, Promise, Stage, register
from repfx.rewrite.results import Result
from repfx.rewrite.work import Work


@register
@dataclass(frozen=True)
class Fuse(Pass):
    """Merges every region whose merged convolution costs no more than its parts."""

    name: ClassVar[str] = "fuse"
    stage: ClassVar[Stage] = Stage.MERGE
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.REGIONS})

    def run(self, work: Work) -> Result:
        result = work.merge(self.name)
        folded = work.fold()
        if not folded:
            return result
        # A float layer whose weight was computed may now merge with the norm behind it.
        last = work.merge(self.name)
        return replace(last, merged=result.merged + folded + last.merged)
