"""Replaces a zero padding whose border is then overwritten with a constant by `pad_with`.

    y = F.pad(x, [p] * 4);  y[:, :, :p] = v; y[:, :, -p:] = v; ...  ->  y = pad_with(x, [p] * 4, v)

The indices are not analysed. The operators are run on random values of several sizes, and the
results are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from repfx.algebra import pad_with
from repfx.graph.run_node import call
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of

_SPREADS = Trait.RESHAPES | Trait.SPREADS


def _writes_part(node: fx.Node) -> bool:
    """Whether the node writes into a part of its first argument, or returns such a part."""
    return Trait.STORES in kind_of(node).traits or kind_of(node).name == "slice"


def name_border_writes(graph: fx.Graph, view: GraphView) -> bool:
    """Replaces each zero padding whose border is then filled with one constant by `pad_with`.

    Returns whether there was one."""
    changed = False
    for node in list(graph.nodes):
        if (
            node.op == "call_function"
            and kind_of(node).name == "pad"
            and node.args
            and isinstance(node.args[0], fx.Node)
        ):
            found = _Border.of(node, view)
            if found is not None and found.is_pad_with(view):
                found.rename(graph)
                changed = True
    return changed


@dataclass
class _Border:
    """A padding, the operators that write its border, and the constant `value` that they write.

    `end` holds the result."""

    pad: fx.Node
    sides: list[int]
    writes: list[fx.Node]
    end: fx.Node
    value: fx.Node
    rank: int
    channels: int

    @staticmethod
    def of(pad: fx.Node, view: GraphView) -> _Border | None:
        """The candidate that starts at a padding, or None if the graph has another form there."""
        inside, todo = {pad}, [pad]
        while todo:
            for user in todo.pop().users:
                if _writes_part(user) and user not in inside:
                    inside.add(user)
                    todo.append(user)
        writes = sorted(inside - {pad})
        read = [n for n in inside if any(u not in inside for u in n.users)]
        sides: Any = pad.args[1] if len(pad.args) > 1 else pad.kwargs.get("pad")
        given = {_root(v, view) for w in writes for v in w.all_input_nodes if v not in inside}
        value = given.pop() if len(given) == 1 else None
        if len(read) != 1 or value is None or not all(isinstance(s, int) and s >= 0 for s in sides):
            return None
        if any(u not in inside and u < writes[-1] for u in read[0].users):
            return None
        shape = view.tensor(value).shape
        return _Border(pad, list(sides), writes, read[0], value, 2 + len(sides) // 2, shape.numel())

    def is_pad_with(self, view: GraphView) -> bool:
        """Whether it computes what pad_with computes.

        Checked on the size seen in the example and on all other sizes tried that run."""
        source: Any = self.pad.args[0]
        own = source.meta.get("shape")
        sizes = [(2, self.channels, *(n + i for i in range(self.rank - 2))) for n in (3, 6)]
        if own:  # larger sizes too, because an index may hit the border at this size only
            sizes += [(*own[:2], *(n + more for n in own[2:])) for more in (1, 8)]
        results = [self._agrees(view, size) for size in ([own] if own else []) + sizes]
        return (results[0] is True if own else all(results)) and False not in results

    def _agrees(self, view: GraphView, size: tuple[int, ...]) -> bool | None:
        """Whether the two agree on one size. None if the operators do not run on it."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        value = torch.randn(
            view.tensor(self.value).shape, generator=generator, dtype=torch.float64, device="cpu"
        )
        values: dict[fx.Node, Any] = {self.value: value}

        def known(v: Any) -> Any:
            return values[v] if v in values else view.evaluate(v, known)

        try:
            for node in (self.pad, *self.writes):
                values[node] = call(node, lambda v: x if v is self.pad.args[0] else known(v))
            return torch.equal(
                values[self.end],
                pad_with(x, self.sides, value.reshape(1, -1, *(1,) * (self.rank - 2))),
            )
        except (RuntimeError, IndexError, TypeError, KeyError):
            return None

    def rename(self, graph: fx.Graph) -> None:
        with graph.inserting_after(self.writes[-1]):
            shaped = graph.call_function(
                torch.reshape, (self.value, [1, -1, *[1] * (self.rank - 2)])
            )
        with graph.inserting_after(shaped):
            named = graph.call_function(pad_with, (self.pad.args[0], self.sides, shaped))
        named.meta = dict(self.pad.meta)
        inside = {self.pad, *self.writes}
        self.end.replace_all_uses_with(named, delete_user_cb=lambda user: user not in inside)
        for node in reversed((self.pad, *self.writes)):
            graph.erase_node(node)


def _root(value: fx.Node, view: GraphView) -> fx.Node | None:
    """The constant that a written value is expanded from. None if it is not a constant."""
    while view.is_constant(value) and view.traits(value) & _SPREADS:
        value = value.all_input_nodes[0]
    return value if view.is_constant(value) else None
