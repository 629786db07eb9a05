"""Where to look for blocks: runs of dominators with only linear operators between them.

    x --> {conv3, bn3, conv1, bn1, +} --> s --> {bn} --> y        the run [x, s, y]

Every candidate for a block is a part of such a run, linear from one input to one output. Which of
them is worth merging is not decided here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from repfx.graph.naming import described
from repfx.graph.ops import Map, Sum
from repfx.graph.view import GraphView

# A longer run is cut, because the search in a run takes quadratic time, and no block has that many
# operators in a row.
LONGEST = 48


@dataclass(frozen=True)
class Run:
    """Dominators d0 ... dn, and the steps between them.

    A step has the nodes after one dominator, up to and including the next, in order."""

    ends: tuple[fx.Node, ...]
    steps: tuple[tuple[fx.Node, ...], ...]
    blocked: bool  # whether it stopped at a node that another block has taken


@dataclass(frozen=True)
class Region:
    """A candidate for a block, linear from `source` to `sink`.

    `nodes` are in order and end with the sink. `kept` are those that must stay, because their
    values are needed elsewhere."""

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
    """Whether a linear node returns one tensor, so that a block may begin or end there."""
    return getattr(view.ops[node], "pieces", None) is None


def run_to(view: GraphView, sink: fx.Node, taken: set[fx.Node]) -> Run:
    """The longest run of linear steps that ends in `sink`. Only its start may be a `taken` node."""
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
    """The region, with the nodes that must stay marked as kept.

    These are the nodes that are read from outside or `needed`, and those they are computed from."""
    inside, kept = set(nodes), set()
    for node in reversed(nodes):
        read = any(user not in inside or user in kept for user in node.users)
        if node is not sink and (read or (needed is not None and node in needed)):
            kept.add(node)
    return Region(source, sink, nodes, frozenset(kept))


def boundary(view: GraphView, node: fx.Node) -> list[fx.Node]:
    """The values that are not linear and that a linear node is computed from, in graph order.

    A walk back through linear operators ends at them."""
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
    """The reason and the hint for a linear node that no run leads to."""
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
    """The nodes on paths from source to sink, with the sink. None if one of them is not linear."""
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
