"""What the branches of each block put out on data, in the model as written (QARepVGG, Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from repfx.capture.running import run_eval
from repfx.data.batches import Batch
from repfx.graph.ops import Sum
from repfx.graph.run_node import Interpreter
from repfx.graph.view import GraphView
from repfx.reporting.numbers import Operand, Region
from repfx.reporting.spreads import Tally


def operands(
    base: fx.GraphModule, regions: tuple[Region, ...], batches: Sequence[Batch]
) -> dict[str, tuple[Operand, ...]]:
    """For each layer, by its name: the values that the additions of its block add.

    A sum that another addition of the block goes on with is not one of them."""
    view = GraphView(base)
    owner = {op: r.name for r in regions for op in r.ops}
    added = {
        node: op.values
        for node in view.nodes
        if view.name(node) in owner and isinstance(op := view.ops[node], Sum) and op.kind == "add"
    }
    watching = _Watching(base, added)
    for batch in batches:
        run_eval(watching, (batch.tensor,))
    found: dict[str, list[Operand]] = {}
    for (node, value), tally in watching.seen.items():
        values = tally.spread()
        if value not in added and values is not None:
            layer = found.setdefault(owner[view.name(node)], [])
            layer.append(Operand(view.name(value), values))
    return {name: tuple(layer) for name, layer in found.items()}


class _Watching(nn.Module):
    """Runs a graph and tallies what each addition adds, before one in place changes it."""

    def __init__(self, module: fx.GraphModule, added: dict[fx.Node, tuple[fx.Node, ...]]) -> None:
        super().__init__()
        self.module, self.added = module, added
        self.seen = {(n, v): Tally() for n, values in added.items() for v in dict.fromkeys(values)}

    def forward(self, *args: Any) -> Any:
        added, seen = self.added, self.seen

        class Watch(Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                for value in dict.fromkeys(added.get(n, ())):
                    seen[n, value].add(self.env[value])
                return super().run_node(n)

        inputs = getattr(self.module, "graph_inputs", None)
        return Watch(self.module).run(*(inputs(args, {}) if inputs else args))
