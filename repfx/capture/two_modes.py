"""Two modes: what a forward does in training only, cut out of what it does in both modes.

    y = bn(conv(x))                                y = bn(conv(x))
    if self.training: y = y * mask / keep    ->    y = train_only(y)       the identity in eval mode
    return y + x                                   return y + x

The forward was recorded in both modes. The two recordings are compared from their results on, back
to where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from repfx.graph.effects import writes
from repfx.graph.modes import TrainOnly


class TooDifferent(Exception):
    """The difference is more than a few operators on the way to one value."""


@dataclass
class Comparison:
    """The nodes of the eval and the training recording, and the pairs where they differ.

    `readers` lists for each pair the eval nodes that read its first value; None stands for the
    result of the forward."""

    first: set[fx.Node]
    second: set[fx.Node]
    origin: Callable[[fx.Node, int], fx.Node | int]  # of a size, see `repfx.capture.origins`
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)  # training node -> eval node
    readers: dict[tuple[fx.Node, fx.Node], list[fx.Node | None]] = field(default_factory=dict)

    def match(self) -> None:
        """Pairs the operators that both have, on the same values, from the inputs on."""
        waiting: dict[str, list[fx.Node]] = {}
        for node in sorted(self.first):
            waiting.setdefault(self._key(node), []).append(node)
        for node in sorted(self.second):
            alike = waiting.get(self._key(node))
            if alike:
                self.same[node] = alike.pop(0)

    def _key(self, node: fx.Node) -> str:
        def name(n: fx.Node) -> str:
            return self.same.get(n, n).name

        return repr((node.op, node.target, fx.node.map_arg((node.args, node.kwargs), name)))

    def compare(self, a: Any, b: Any, reader: fx.Node | None) -> None:
        """Walks back from two values at once. Raises TooDifferent."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            self._nodes(a, b, reader)
        elif isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                self.compare(x, y, reader)
        elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            for key in a:
                self.compare(a[key], b[key], reader)
        elif isinstance(a, fx.Node) or isinstance(b, fx.Node) or a != b:
            raise TooDifferent

    def _nodes(self, a: fx.Node, b: fx.Node, reader: fx.Node | None) -> None:
        if self.same.get(b, b if b not in self.second else None) is a:
            return
        if b not in self.second:  # eval mode computes something that training does not
            raise TooDifferent
        alike = a in self.first and (a.op, a.target) == (b.op, b.target) and b not in self.same
        if alike and _spread(a) == _spread(b):
            self.same[b] = a
            self.compare(a.args, b.args, a)
            self.compare(a.kwargs, b.kwargs, a)
        else:
            self.readers.setdefault((a, b), []).append(reader)

    def parts(self) -> list[Part]:
        found = [self._part(a, b, readers) for (a, b), readers in self.readers.items()]
        cut = {n for part in found for n in part.nodes}
        if any(n not in cut and n not in self.same for n in self.second):
            raise TooDifferent  # an operator of training that no result depends on
        return found

    def _part(self, a: fx.Node, b: fx.Node, readers: list[fx.Node | None]) -> Part:
        nodes, inputs, todo, seen = [], [], [b], {b}
        while todo:
            node = todo.pop()
            if node.op == "get_attr":
                raise TooDifferent  # a weight that only training has
            if node not in self.second or node in self.same:
                inputs.append(self.same.get(node, node))
                continue
            if node.op not in ("call_function", "call_method") or writes(node):
                raise TooDifferent
            nodes.append(node)
            of, axis = node.args[:2] if node.target == "size" else (None, None)
            if isinstance(axis, int) and self.origin(a, axis) is of:
                continue  # read from `a` itself
            todo += [n for n in node.all_input_nodes if n not in seen]
            seen |= set(node.all_input_nodes)
        rest = [n for n in dict.fromkeys(inputs) if n is not a]
        return Part(a, b, readers, sorted(nodes), [a, *rest])


@dataclass(frozen=True)
class Part:
    """What training does to one value: `after` in place of `before`."""

    before: fx.Node
    after: fx.Node
    readers: list[fx.Node | None]
    nodes: list[fx.Node]
    inputs: list[fx.Node]

    def module(self, same: dict[fx.Node, fx.Node]) -> tuple[TrainOnly, list[fx.Node]]:
        """The part as a module, and the nodes that it is called on, `before` first."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        called = []
        for node in self.inputs:
            made[node] = graph.placeholder(node.name)
            called.append(node)
        x = made[self.before]
        for node in self.nodes:
            made[node] = graph.node_copy(node, lambda n: made.get(same.get(n, n), x))
        graph.output(made[self.after])
        return TrainOnly(fx.GraphModule(nn.Module(), graph)), called


def _spread(node: fx.Node) -> list[Any]:
    """The arguments that are no nodes."""
    found: list[Any] = []

    def note(v: Any) -> Any:
        found.append(None if isinstance(v, fx.Node) else v)
        return v

    fx.node.map_aggregate((node.args, node.kwargs), note)
    return found
