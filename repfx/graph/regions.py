"""Where to look for blocks: runs of dominators with nothing but linear operators between them.

    x --> {conv3, bn3, conv1, bn1, +} --> s --> {bn} --> y        the run [x, s, y]

Every candidate block is a stretch of such a run: linear between one input and one output. Which
stretch is worth merging is not decided here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from repfx.graph.naming import described
from repfx.graph.ops import Map, Sum
from repfx.graph.view import GraphView

# A linear run longer than this is cut: the search in it is quadratic, and no convolution spans
# dozens of operators.
LONGEST = 48


@dataclass(frozen=True)
class Run:
    """Dominators d0 ... dn, and per step the nodes strictly between two of them with the later one,
    in order.
    """

    ends: tuple[fx.Node, ...]
    steps: tuple[tuple[fx.Node, ...], ...]
    blocked: bool  # whether a node already taken cut it short


@dataclass(frozen=True)
class Region:
    """A block: linear from `source` to `sink`. `nodes` are in order and end with the sink; `kept`
    are read elsewhere.
    """

    source: fx.Node
    sink: fx.Node
    nodes: tuple[fx.Node, ...]
    kept: frozenset[fx.Node]

    @property
    def removed(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in self.nodes if n not in self.kept)


def is_linear(view: GraphView, node: fx.Node) -> bool:
    return isinstance(view.ops[node], (Map, Sum))


def is_value(view: GraphView, node: fx.Node) -> bool:
    """Whether a linear node gives one tensor, so that a block may begin or end there."""
    return getattr(view.ops[node], "pieces", None) is None


def run_to(view: GraphView, sink: fx.Node, taken: set[fx.Node]) -> Run:
    """The longest run of linear steps that ends in `sink` and touches no node of `taken` but at its
    start.
    """
    ends, steps, blocked = [sink], [], False
    while (
        len(ends) <= LONGEST
        and is_linear(view, ends[-1])
        and (ends[-1] is sink or ends[-1] not in taken)
    ):
        above = view.dominator.get(ends[-1])
        while above is not None and not is_value(view, above):
            above = view.dominator.get(above)
        step = None if above is None else nodes_between(view, above, ends[-1])
        if above is None or step is None:
            break
        if any(n in taken for n in step if n is not ends[-1]):
            blocked = True
            break
        ends.append(above)
        steps.append(step)
    return Run(tuple(reversed(ends)), tuple(reversed(steps)), blocked)


def region_of(
    view: GraphView,
    source: fx.Node,
    sink: fx.Node,
    nodes: tuple[fx.Node, ...],
    needed: set[fx.Node] | None = None,
) -> Region:
    """The region with the parts that must stay: those read from outside or `needed`, and what they
    are computed from.
    """
    inside, kept = set(nodes), set()
    for node in reversed(nodes):
        read = any(user not in inside or user in kept for user in node.users)
        if node is not sink and (read or (needed is not None and node in needed)):
            kept.add(node)
    return Region(source, sink, nodes, frozenset(kept))


def boundary(view: GraphView, node: fx.Node) -> list[fx.Node]:
    """The values a linear node is computed from: what a walk back through linear operators stops
    at, in order.
    """
    found, seen, todo = set(), {node}, [node]
    while todo:
        for value in view.ops[todo.pop()].values:  # type: ignore[union-attr]
            if value not in seen:
                seen.add(value)
                if is_linear(view, value):
                    todo.append(value)
                else:
                    found.add(value)
    return sorted(found, key=view.index.__getitem__)


def why_alone(view: GraphView, node: fx.Node) -> tuple[str, str]:
    """Reason and cure for a linear node that no run leads to."""
    ends = boundary(view, node)
    if isinstance(view.ops[node], Sum) and len(ends) > 1:
        inner = [e for e in ends if e is not view.dominator.get(node)]
        if len(inner) < len(ends):
            return f"{described(view, inner[0])} inside it is not linear", ""
        return (
            f"it sums values of different sources: {', '.join(described(view, e) for e in ends)}",
            "",
        )
    op = view.ops[node]
    if isinstance(op, Map) and op.values[0] in ends:
        source = described(view, op.values[0])
        return f"no convolution leads to it: its input is {source}", ""
    return "no convolution leads to it", ""


def nodes_between(view: GraphView, source: fx.Node, sink: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes on paths from source to sink, sink included; None where one of them is not
    linear."""
    if source is sink:
        return ()
    seen, todo = {sink}, [sink]
    while todo:
        for value in view.data_inputs(todo.pop()):
            if value is not source and value not in seen:
                if not is_linear(view, value):
                    return None
                seen.add(value)
                todo.append(value)
    return tuple(sorted(seen, key=view.index.__getitem__))
