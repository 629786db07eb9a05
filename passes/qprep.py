"""qprep: adds a learnable affine to every quantized layer that folds into its integers (RepAPQ).

    F.conv2d(Q(x), Q(W), b)  ->  F.conv2d(Q(x), *affine(Q(W), b)), affine = (eta Q(W), eta b + eps)

This is the QPRep of the paper. At the start eta = 1 and eps = 0, so that nothing changes.
`repfx.reconstruct` learns them, and `fuse` folds them exactly into the weight scales, the integer
weights (also for eta < 0) and the biases. The pass needs the merged, quantized net, so it runs
`fuse` and `ptq` first.

Weights need one scale per channel. A layer is declined if other layers read its quantized weight.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from repfx.errors import Declined, InputError
from repfx.graph.calls import layer_of
from repfx.quant import Affine, FakeQuant
from repfx.rewrite.contract import Pass, Promise, Stage, register
from repfx.rewrite.results import Result
from repfx.rewrite.work import Work


@register
@dataclass(frozen=True)
class QPRep(Pass):
    """Inserts the affines. Raises InputError if a weight is quantized per tensor."""

    name: ClassVar[str] = "qprep"
    stage: ClassVar[Stage] = Stage.ADJUST
    requires: ClassVar[tuple[str, ...]] = ("ptq", "fuse")
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.NAMES})

    def run(self, work: Work) -> Result:
        view, graph = work.view(), work.module.graph
        declined = []
        reads = Counter(n.target for n in view.nodes if n.op == "get_attr")
        for node in view.nodes:
            quant = view.modules.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(quant, FakeQuant) or not quant.of_weight:
                continue
            path = str(node.target)
            if quant.grid.axis is None:
                raise InputError(
                    f"{path} has one scale for the whole tensor: an affine can fold only into "
                    "weights with one scale per channel, ptq(per_channel=True)"
                )
            call = next(iter(node.users))
            layer = layer_of(call) if len(node.users) == 1 else None
            if layer is None or layer.weight != node:
                declined.append(
                    Declined(path, "its quantized weight is read more than once, or not by a layer")
                )
                continue
            bias = layer.bias
            if isinstance(bias, fx.Node) and (
                bias.op != "get_attr" or reads[bias.target] > 1 or len(bias.users) > 1
            ):
                declined.append(
                    Declined(path, "the bias of its layer is computed, or is also read elsewhere")
                )
                continue
            ref = node.args[0]
            assert isinstance(ref, fx.Node) and not isinstance(bias, str)
            affine = work.insert(
                call,
                node,
                f"{path.rpartition('.')[0]}.affine".lstrip("."),
                Affine(view.tensor(ref)),
            )
            affine.args = (node, bias)
            with graph.inserting_before(call):
                parts = [graph.call_function(operator.getitem, (affine, i)) for i in (0, 1)]
            named = ("input", "weight", "bias")
            call.kwargs = {k: v for k, v in call.kwargs.items() if k not in named}
            call.args = (layer.x, *parts, *call.args[3:])
        return Result(self.name, declined=tuple(declined), inserted=tuple(work.inserted))
