"""Judge: whether a model's output on its example changed by more than rounding explains.

Each merge is proved by itself. The output of the whole model is a second check: it finds code that
cannot be traced and reads the inside of a layer. But a sort, a threshold or an argmax makes another
result out of rounding alone. So where outputs differ, the same passes run on the model in float64,
where rounding is 10^9 times smaller, and that comparison decides. If the model does not run in
float64, those tensors are compared that stay when rounding disturbs the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from repfx.capture.running import run_eval
from repfx.rewrite.difference import difference, tensors_of, worst

# Again, in float64: another judge and what changed, or None if the model does not run in float64.
Again = Callable[[], "tuple[Judge, str] | None"]


class Judge:
    """Compares outputs before and after passes, each tensor up to `limit` of its largest value.

    `kind` names the precision. `disturbed` gives the output of the model with weights that are off
    by rounding. `compared` tells what was found to be the same, and how it was compared."""

    def __init__(
        self,
        limit: float,
        kind: str,
        again: Again | None = None,
        disturbed: Callable[[], Any] | None = None,
    ) -> None:
        self.limit, self.kind, self._again, self._disturbed = limit, kind, again, disturbed
        self.compared: list[str] = []

    def changed(self, title: str, before: Any, after: Any) -> str:
        """How the output changed; empty if it did not. `title` says what ran in between."""
        pairs = list(zip_longest(tensors_of(before), tensors_of(after)))
        off = [self._off(*pair) for pair in pairs]
        why = next(filter(None, off), "")
        judged = list(range(len(pairs)))
        if why and self._wide is not None:
            return why if self._wide[1] else ""
        if why:
            judged = self._steady(before)
            if not judged or any(off[i] for i in judged):
                return why
        found = worst([difference(*pairs[i]) for i in judged])
        what = "the output"
        if len(judged) < len(pairs):
            what = f"{len(judged)} of {len(pairs)} tensors of the output, those that stay when "
            what += "rounding disturbs the weights,"
        self.compared.append(
            f"{what} on the example before and after {title}, in {self.kind}: relative difference "
            f"{found.relative:.1e}"
        )
        return ""

    @cached_property
    def _wide(self) -> tuple[Judge, str] | None:
        found = self._again() if self._again is not None else None
        if found is not None:
            self.compared += found[0].compared
        return found

    def _off(self, before: Tensor | None, after: Tensor | None) -> str:
        """How one tensor changed by more than the limit."""
        if before is None or after is None or before.shape != after.shape:
            shapes = [None if v is None else tuple(v.shape) for v in (before, after)]
            return f"outputs of different shapes: {shapes[0]} and {shapes[1]}"
        found = difference(before, after)
        return "" if found.relative <= self.limit else f"the output on the example changed: {found}"

    def _steady(self, output: Any) -> list[int]:
        """The tensors of an output that stay when rounding disturbs the weights."""
        try:
            other = None if self._disturbed is None else self._disturbed()
        except Exception:  # the model's forward can raise anything
            return []
        pairs = zip_longest(tensors_of(output), tensors_of(other))
        return [i for i, pair in enumerate(pairs) if not self._off(*pair)]


def disturbed(model: nn.Module, example: tuple[Any, ...]) -> Any:
    """The output of a copy whose weights are off by one rounding each, up or down."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.parameters():
            if p.is_floating_point():
                sign = torch.randint(2, p.shape, generator=generator, device="cpu") * 2 - 1
                p.mul_(1 + torch.finfo(p.dtype).eps * sign.to(p))
    return run_eval(twin, example)
