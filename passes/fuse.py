"""fuse: every linear block becomes the one convolution it equals, where that costs no more.

    relu(bn(conv3(x)) + bn(conv1(x)) + bn(x))   ->   relu(conv(x))

Cases: any block that is linear between one input and one output (branches, chains, batch norms,
scales, pools, pads); regions whose border makes them inexact, or that would multiply the work, are
declined with the reason and the blocks inside them are merged instead. Values read elsewhere stay.
Running it again finds nothing to do. After `repq` the program of each weight becomes the weight;
after `qprep` each affine goes into its layer's integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from repfx.rewrite.contract import Pass, Promise, Stage, register
from repfx.rewrite.results import Result
from repfx.rewrite.work import Work


@register
@dataclass(frozen=True)
class Fuse(Pass):
    """Merges every region that pays."""

    name: ClassVar[str] = "fuse"
    stage: ClassVar[Stage] = Stage.MERGE
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.REGIONS})

    def run(self, work: Work) -> Result:
        result = work.merge(self.name)
        return replace(result, merged=result.merged + work.fold())
