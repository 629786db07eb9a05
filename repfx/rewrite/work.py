"""Work: the graph that a pass is given, with the methods that read and rewrite it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

from repfx.errors import InputError
from repfx.graph.edit import (
    drop_unreferenced,
    free_path,
    inline,
    layer_from,
    put_module,
    references,
    replace_region,
)
from repfx.graph.regions import Region
from repfx.graph.view import GraphView
from repfx.quant import Target
from repfx.rewrite.absorb import put
from repfx.rewrite.fold import fold_programs
from repfx.rewrite.fold_affine import fold_affines, fold_norms
from repfx.rewrite.kernel_of import kernel_of
from repfx.rewrite.merge_regions import Accept, Merge, Plan, plan_merges
from repfx.rewrite.names import Names, weight_of
from repfx.rewrite.prove import prove
from repfx.rewrite.results import Merged, Result
from repfx.rewrite.slide import explained, plan_slides
from repfx.rewrite.weights import InFloat64

# What a graph is: the whole model, a part of the model's graph, or a part of code not traced.
Part = Literal["", "of a graph", "of code"]


class Work:
    """One GraphModule being rewritten, with the target that decides the number formats.

    `merge` and `fold` only read the model's weights, and prove their results. A pass that asks for
    `module` may write into any of its tensors, so `on_reach` runs first: it copies the tensors that
    are still shared with the caller's model and records what must be checked afterwards."""

    def __init__(
        self,
        module: fx.GraphModule,
        target: Target,
        on_reach: Callable[[], None] | None = None,
        inner: bool = False,
        part: Part = "",
    ) -> None:
        self._module = module
        self._on_reach = on_reach
        self.target = target
        self.inner = inner  # whether another graph reads on in what this one returns
        self.part = part
        self.inserted: list[str] = []  # paths of new layers
        self._paths: dict[nn.Module, str] = {}
        self._device = next((t.device for t in (*module.parameters(), *module.buffers())), None)

    @property
    def module(self) -> fx.GraphModule:
        """The graph and its layers, a private copy: a pass may write into any of its tensors."""
        on_reach, self._on_reach = self._on_reach, None
        if on_reach is not None:
            on_reach()
        return self._module

    def view(self, unsigned: str | Iterable[str] = ()) -> GraphView:
        """A snapshot of the graph as it is now.

        `unsigned`: see `GraphView`. It is about the inputs of the model, so it says nothing of a
        graph within the model's. Raises InputError where there is no graph of the model."""
        if unsigned and self.part == "of code":
            raise InputError(
                "unsigned: the model is not one graph, so it is not known where its inputs go; "
                "leave unsigned out, or see repfx.inspect for what was not traced"
            )
        if self.part:
            return GraphView(self.module)
        return GraphView(self.module, (unsigned,) if isinstance(unsigned, str) else unsigned)

    def merge(self, name: str, accept: Accept | None = None) -> Result:
        """Merges every region that costs no more merged and that `accept` takes.

        Each merged layer is proved against its region before it replaces it."""
        # `accept` gets operators, and through them it can reach the graph.
        module = self._module if accept is None else self.module
        accept = accept or (lambda ops: True)
        merged: list[Merged] = []
        while True:
            view = GraphView(module)
            plan = plan_merges(view, accept)
            merged += self._merge(view, plan)
            if plan.again:
                continue
            view = GraphView(module) if plan.merges else view
            slides, failed = plan_slides(view, accept)
            moved = put(module, view, slides, failed) if slides else ()
            merged += moved
            if not moved:
                why = {view.name(node): inexact for node, inexact in failed.items()}
                return Result(name, tuple(merged), explained(plan.declined, why))

    def insert(self, before: fx.Node, value: fx.Node, wanted: str, layer: nn.Module) -> fx.Node:
        """Inserts a call of `layer` on `value` before a node, and returns the call.

        A new layer gets the path `wanted`, or the next free one, and the graph's mode and device.
        A layer that was inserted earlier is called again."""
        path = self._paths.get(layer)
        if path is None:
            path = self._paths[layer] = free_path(self._module, wanted)
            put_module(self._module, path, layer.to(self._device).train(self._module.training))
            self.inserted.append(path)
        with self._module.graph.inserting_before(before):
            return self._module.graph.call_module(path, (value,))

    def fold(self) -> tuple[Merged, ...]:
        """Replaces each computed weight by a plain one, and folds affines and norms into layers."""
        done = fold_programs(self._module) + fold_affines(self._module)
        return done + fold_norms(self._module)

    def expand(self, region: Region, inner: fx.Graph, block: nn.Module, path: str) -> fx.Node:
        """Replaces a region by a block whose graph is `inner`.

        `path` may be the path of the region's convolution. Returns the value that replaces the
        region's output: other regions of the same view may start from it."""
        graph = self._module.graph
        before = references(graph)
        old = put_module(self._module, path, block)
        result = inline(graph, region.source, region.sink, region.nodes, inner, path)
        drop_unreferenced(self._module, before, [] if old is None else [old])
        return result

    def _merge(self, view: GraphView, plan: Plan) -> tuple[Merged, ...]:
        """Inserts the merged layers in graph order: a region may start where another ends."""
        before = references(self._module.graph)
        names = Names(view, self._module)
        proved = self._proved(view, plan, names)
        sharing: dict[str, list[Merge]] = {}
        for p in proved:
            sharing.setdefault(p.key, []).append(p.merge)
        paths: dict[str, str] = {}
        moved: dict[fx.Node, fx.Node] = {}
        replaced: list[nn.Module] = []
        done: list[Merged] = []
        for p in sorted(proved, key=lambda p: view.index[p.merge.region.sink]):
            region, label = p.merge.region, names.label(p.merge)
            if p.key not in paths:
                paths[p.key] = names.path(sharing[p.key])
                old = put_module(self._module, paths[p.key], p.layer)
                replaced += [] if old is None else [old]
            done.append(p.told(view, label, paths[p.key]))
            moved[region.sink] = replace_region(
                self._module.graph,
                moved.get(region.source, region.source),
                region.sink,
                region.removed,
                p.merge.geometry,
                paths[p.key],
            )
        if proved:
            drop_unreferenced(self._module, before, replaced)
        return tuple(done)

    def _proved(self, view: GraphView, plan: Plan, names: Names) -> list[_Proved]:
        """The merged layers, each proved.

        The largest is made first, while the results of the others do not yet take memory."""
        made: dict[str, nn.Module] = {}
        proved = []
        for merge in sorted(plan.merges, key=lambda m: -m.geometry.params):
            key = names.signature(merge)
            kernel = kernel_of(view, merge.region, InFloat64(view, keep=False)).plain
            error = prove(view, merge.region, kernel, InFloat64(view, keep=True))
            if key not in made:
                made[key] = layer_from(kernel, view.tensor(names.weight(merge)))
                made[key].train(self._module.training)
            proved.append(_Proved(merge, made[key], key, error))
        return proved


@dataclass(frozen=True)
class _Proved:
    """A merge and its layer; merges with one `key` share it. `error` comes from the proof."""

    merge: Merge
    layer: nn.Module
    key: str
    error: float

    def told(self, view: GraphView, name: str, into: str) -> Merged:
        m = self.merge
        ops = tuple(view.name(node) for node in m.region.removed)
        macs = float(m.macs_before), float(m.geometry.macs)
        return Merged(name, ops, into, *macs, m.params_before, m.geometry.params, self.error)


__all__ = ["Names", "Work", "weight_of"]
