"""Segments: a graph cut into pieces that can be run and learned one after another.

    x -> [Q conv relu] -> [Q conv relu Q conv + relu] -> [pool Q linear] -> y

A cut is a place in the order of the graph. The values that are alive there (they are read later) go
from one segment to the next. The graph is cut wherever a single value is alive and a quantizer
reads it. If more than LARGEST layers stay together between two such cuts (a long skip, the levels
of a U-Net, the neck of a detector), it is also cut where the fewest values are alive, and so on.
Segments share the modules and tensors of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from repfx.capture.running import quiet
from repfx.errors import InputError, unknown
from repfx.graph.effects import Writes
from repfx.graph.run_node import Interpreter
from repfx.quant import FakeQuant

# In layers. A residual block stays whole; parts of up to this size learned better uncut.
LARGEST = 8


@dataclass(frozen=True)
class Segment:
    """One piece of a graph: `module` maps the values before it to the values after it.

    `name` is the name of the value at its end. A call returns the values after it, float tensors
    with a row for each image: first those it computed, then those it only passes on. `passed` has
    the indices of the latter among its inputs. `kept` has the indices of the tensors to return
    among the leaves of the module's output."""

    name: str
    module: fx.GraphModule
    kept: tuple[int, ...]
    passed: tuple[int, ...] = ()
    overwrites: bool = False  # whether it overwrites its inputs, as only the first can

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        values = tuple(v.clone() for v in values) if self.overwrites else values
        given = tree_leaves(self.module(*values))
        return tuple(given[i] for i in self.kept)

    def made(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The values that it computed, among the values after it."""
        return values[: len(values) - len(self.passed)]

    def modules(self, kind: type[nn.Module]) -> dict[str, nn.Module]:
        """Its modules of this kind, by path."""
        return {name: m for name, m in self.module.named_modules() if isinstance(m, kind)}


@dataclass(frozen=True)
class _Cut:
    """The place after a node, and the values alive there: the node first, then in graph order.

    Its name is the path of the module that the node calls, if the node is the first to call it,
    else the name of the node.
    """

    place: int
    values: tuple[fx.Node, ...]
    name: str = ""


def inputs_of(module: nn.Module) -> list[fx.Node]:
    """The inputs that a model reads. Raises InputError if it is not a GraphModule."""
    if not isinstance(module, fx.GraphModule):
        raise InputError(
            "blocks can be found only in a GraphModule, a model that was traced whole; "
            "repfx.calibrate takes any model"
        )
    return [n for n in module.graph.nodes if n.op == "placeholder" and n.users]


def segments(
    module: nn.Module, values: tuple[Tensor, ...], ends: Sequence[str] | None = None
) -> list[Segment]:
    """The segments of a model, in order. `values`: a batch (n, ...) for each input that it reads.

    `ends` names the values at which segments end, except the last one; other values may be alive
    there. Raises InputError for a model that is not a GraphModule or has no output to learn from,
    for a batch that it does not take, and for an end that is not a cut, naming the cuts."""
    inputs = inputs_of(module)
    assert isinstance(module, fx.GraphModule)
    nodes = list(module.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    writes = Writes(dict(module.named_modules()), nodes, order)
    carried, outputs = _carried(module, inputs, values)
    if not outputs:
        raise InputError("no output of the model is a float tensor with a row for each image")
    cuts = _cuts(nodes, order, writes, carried)
    if ends is None:
        chosen = _chosen(cuts, nodes, module)
    else:
        known = {c.name: c for c in cuts}
        for end in ends:
            if end not in known:
                raise unknown("end of a block", end, known)
        chosen = sorted((known[end] for end in set(ends)), key=lambda c: c.place)
    found, before = list[Segment](), _Cut(-1, tuple(inputs))
    for cut in chosen:
        # The computed values come first, then those that are passed on.
        cut = replace(cut, values=tuple(sorted(cut.values, key=lambda n: n in before.values)))
        found.append(_between(module, nodes, before, cut))
        before = cut
    found.append(replace(_between(module, nodes, before, None), kept=outputs))
    if any(n in writes.of for n in inputs):  # a passed value is no longer what came in
        found[0] = replace(found[0], overwrites=True, passed=())
    return found


def _quantizer(module: nn.Module, node: fx.Node, of_weight: bool | None = None) -> bool:
    if node.op != "call_module":
        return False
    found = module.get_submodule(str(node.target))
    return isinstance(found, FakeQuant) and of_weight in (None, found.of_weight)


def _carried(
    module: fx.GraphModule, inputs: list[fx.Node], values: tuple[Tensor, ...]
) -> tuple[set[fx.Node], tuple[int, ...]]:
    """The nodes whose value is a float tensor with a row for each image, and such outputs.

    Only such values can go from one segment to the next. The outputs are indices of the flattened
    output. The model runs with two batch sizes, so that no other dimension is mistaken for the
    batch."""
    found, outputs = set(module.graph.nodes), list[set[int]]()
    for rows in (3, 5):
        seen = set(inputs)

        class Watch(Interpreter):
            def run_node(self, n: fx.Node, rows: int = rows, seen: set[fx.Node] = seen) -> Any:
                value = super().run_node(n)
                if _has_rows(value, rows):
                    seen.add(n)
                return value

        env: dict[fx.Node, Any] = {n: None for n in module.graph.nodes if n.op == "placeholder"}
        env.update(zip(inputs, (torch.cat([v[:1]] * rows) for v in values), strict=True))
        try:
            with torch.no_grad(), quiet():
                given = tree_leaves(Watch(module).run(initial_env=env, enable_io_processing=False))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = ", ".join(str(tuple(v.shape[1:])) for v in values)
            why = str(error).partition("\n")[0]
            raise InputError(
                f"the model does not take images of {shapes}, {rows} at a time: {why}"
            ) from error
        found &= seen
        outputs.append({i for i, value in enumerate(given) if _has_rows(value, rows)})
    return found, tuple(sorted(set.intersection(*outputs)))


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == (rows,)


def _data(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on an input."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _cuts(
    nodes: list[fx.Node], order: dict[fx.Node, int], writes: Writes, carried: set[fx.Node]
) -> list[_Cut]:
    """Every place right after a node where all values alive can go from segment to segment.

    A place is left out if a value alive there is changed in place later: after the cut, tensors
    that share its memory would not see the change.
    """
    data = _data(nodes)
    alive: dict[fx.Node, int] = {}
    found, named = [], set[str]()
    for i, node in enumerate(nodes[:-1]):
        name = (
            str(node.target)
            if node.op == "call_module" and str(node.target) not in named
            else node.name
        )
        named.add(name)
        if node in data and node.users:
            alive[node] = max(order[u] for u in node.users)
        alive = {n: last for n, last in alive.items() if last > i}
        fixed = all(order[w] <= i for n in alive for w in writes.of.get(n, ()))
        if (
            node in alive
            and node.op != "placeholder"
            and fixed
            and all(n in carried for n in alive)
        ):
            found.append(_Cut(i, (node, *(n for n in alive if n is not node)), name))
    return found


def _chosen(cuts: list[_Cut], nodes: list[fx.Node], module: nn.Module) -> list[_Cut]:
    steps = [i for i, n in enumerate(nodes) if _quantizer(module, n)]
    layers = [i for i in steps if _quantizer(module, nodes[i], of_weight=True)]
    read = [
        c for c in cuts if any(_quantizer(module, u, of_weight=False) for u in c.values[0].users)
    ]

    def inside(low: float, high: float, width: int) -> list[_Cut]:
        """The cuts to take between two places, with at least `width` values alive."""
        here = [c for c in read if low < c.place < high and len(c.values) >= width]
        if not here or (width > 1 and sum(low < i < high for i in layers) <= LARGEST):
            return []
        width = min(len(c.values) for c in here) if width > 1 else 1
        taken = [c for c in here if len(c.values) == width]
        places = [low, *(c.place for c in taken), high]
        finer = [inside(a, b, width + 1) for a, b in pairwise(places)]
        return [
            c
            for part, end in zip(finer, [*taken, None], strict=True)
            for c in (*part, *([end] if end else []))
        ]

    kept: list[_Cut] = []
    for cut in inside(-1, float("inf"), 1):
        first = kept[-1].place if kept else -1
        # A part with nothing to learn is joined with the next one.
        if any(first < i < cut.place for i in steps):
            kept.append(cut)
    return kept


def _between(
    module: fx.GraphModule, nodes: list[fx.Node], before: _Cut, after: _Cut | None
) -> Segment:
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for i, node in enumerate(before.values):
        made[node] = graph.placeholder(f"x{i}")
    data = _data(nodes)

    def copy(node: fx.Node) -> fx.Node:
        if node not in made:
            for needed in node.all_input_nodes:
                copy(needed)
            made[node] = graph.node_copy(node, made.__getitem__)
        return made[node]

    for node in nodes[before.place + 1 : None if after is None else after.place + 1]:
        if node in data and node.op not in ("placeholder", "output"):
            copy(node)
    if after is None:
        place: Callable[[fx.Node], fx.Node] = copy
        graph.output(fx.node.map_arg(nodes[-1].args[0], place))
        return Segment("output", fx.GraphModule(module, graph), ())
    graph.output(tuple(made[n] for n in after.values))
    passed = tuple(before.values.index(n) for n in after.values if n in before.values)
    return Segment(
        after.name, fx.GraphModule(module, graph), tuple(range(len(after.values))), passed
    )
