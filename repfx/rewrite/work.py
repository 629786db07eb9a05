"""Work: what a pass is given. It reads the graph through a view and rewrites it through a few
verbs, each proved.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

from torch import fx, nn

from repfx.graph.edit import (
    drop_unreferenced,
    free_path,
    inline,
    layer_of,
    put_module,
    references,
    replace_region,
)
from repfx.graph.ops import Map, Ref
from repfx.graph.regions import Region
from repfx.graph.view import GraphView
from repfx.quant import Target
from repfx.rewrite.contract import Merged, Result
from repfx.rewrite.fold import fold_programs
from repfx.rewrite.fold_affine import fold_affines
from repfx.rewrite.kernel_of import kernel_of
from repfx.rewrite.merge_regions import Accept, Merge, Plan, plan_merges
from repfx.rewrite.prove import prove
from repfx.rewrite.weights import in_float64


class Work:
    """One GraphModule under rewrite, with the target that number formats are chosen for."""

    def __init__(self, module: fx.GraphModule, target: Target) -> None:
        self.module = module
        self.target = target
        self.inserted: list[str] = []  # paths of new layers
        self._paths: dict[nn.Module, str] = {}
        self._device = next((t.device for t in (*module.parameters(), *module.buffers())), None)

    def view(self) -> GraphView:
        """A snapshot of the graph as it is now."""
        return GraphView(self.module)

    def merge(self, name: str, accept: Accept = lambda ops: True) -> Result:
        """Merges every region that pays and that `accept` takes, each proved against itself before
        it goes in.
        """
        merged: list[Merged] = []
        while True:
            view = self.view()
            plan = plan_merges(view, accept)
            merged += self._merge(view, plan)
            if not plan.again:
                return Result(name, tuple(merged), plan.declined)

    def insert(self, before: fx.Node, value: fx.Node, wanted: str, layer: nn.Module) -> fx.Node:
        """Calls a layer on a value, before a node. A new one gets the path `wanted` or the next
        free one, and the graph's mode and device; one that was inserted before is called again."""
        path = self._paths.get(layer)
        if path is None:
            path = self._paths[layer] = free_path(self.module, wanted)
            put_module(self.module, path, layer.to(self._device).train(self.module.training))
            self.inserted.append(path)
        with self.module.graph.inserting_before(before):
            return self.module.graph.call_module(path, (value,))

    def fold(self) -> tuple[Merged, ...]:
        """Makes each weight that a program computes a plain weight, and each affine a part of its
        layer.
        """
        return fold_programs(self.module) + fold_affines(self.module)

    def expand(self, region: Region, inner: fx.Graph, block: nn.Module, path: str) -> fx.Node:
        """Puts a block, of which `inner` is the graph, in the place of a region; `path` may be its
        convolution's.

        Returns the value that now stands for the region's: other regions of the same view may start
        from it."""
        before = references(self.module.graph)
        old = put_module(self.module, path, block)
        result = inline(self.module.graph, region.source, region.sink, region.nodes, inner, path)
        drop_unreferenced(self.module, before, [] if old is None else [old])
        return result

    def _merge(self, view: GraphView, plan: Plan) -> tuple[Merged, ...]:
        before = references(self.module.graph)
        names = Names(view, self.module)
        layers: list[tuple[Merge, nn.Module, float, str]] = []
        made: dict[Any, nn.Module] = {}
        # The largest first: what it needs for a moment is then not on top of all the others'
        # results.
        for merge in sorted(plan.merges, key=lambda m: -m.geometry.params):
            layer, error, key = self._layer(view, merge, names, made)
            layers.append((merge, layer, error, key))
        return self._apply(view, layers, names, before)

    def _layer(
        self, view: GraphView, merge: Merge, names: Names, made: dict[Any, nn.Module]
    ) -> tuple[nn.Module, float, str]:
        region = merge.region
        key = names.signature(merge)
        kernel = kernel_of(view, region, in_float64(view, keep=False))
        error = prove(view, region, kernel, in_float64(view, keep=True))
        if key not in made:
            made[key] = layer_of(kernel, view.tensor(names.weight(merge)))
            made[key].train(self.module.training)
        return made[key], error, key

    def _apply(
        self,
        view: GraphView,
        layers: list[tuple[Merge, nn.Module, float, str]],
        names: Names,
        before: set[str],
    ) -> tuple[Merged, ...]:
        moved: dict[fx.Node, fx.Node] = {}
        paths: dict[int, str] = {}
        replaced: list[nn.Module] = []
        done: list[tuple[int, Merged]] = []
        together: dict[str, list[Merge]] = {}
        for merge, _, _, key in layers:
            together.setdefault(key, []).append(merge)
        for merge, layer, error, key in sorted(
            layers, key=lambda entry: view.index[entry[0].region.sink]
        ):
            region = merge.region
            label = names.label(merge)
            if id(layer) not in paths:
                paths[id(layer)] = names.path(together[key])
                old = put_module(self.module, paths[id(layer)], layer)
                if old is not None:
                    replaced.append(old)
            ops = tuple(view.name(node) for node in region.removed)
            source = moved.get(region.source, region.source)
            at = view.index[region.sink]
            moved[region.sink] = replace_region(
                self.module.graph,
                source,
                region.sink,
                region.removed,
                merge.geometry,
                paths[id(layer)],
            )
            after = float(merge.geometry.macs)
            counts = (merge.params_before, merge.geometry.params)
            done.append(
                (
                    at,
                    Merged(
                        label,
                        ops,
                        paths[id(layer)],
                        float(merge.macs_before),
                        after,
                        *counts,
                        error,
                    ),
                )
            )
        if layers:
            drop_unreferenced(self.module, before, replaced)
        return tuple(m for _, m in sorted(done, key=lambda pair: pair[0]))


class Names:
    """Where merged layers go: in the place of their region's widest convolution, unless another
    call still needs it.
    """

    def __init__(self, view: GraphView, module: fx.GraphModule) -> None:
        self.view = view
        self.module = module
        self.calls: dict[str, list[fx.Node]] = {}  # by the module called
        self.reads: dict[str, list[fx.Node]] = {}  # of tensors, by the module that holds them
        self.under: Counter[str] = Counter()  # convolutions and linears, by the modules around them
        for node in view.nodes:
            if getattr(view.ops[node], "macs", 0):
                parts = view.name(node).split(".")
                self.under.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)
            elif node.op == "get_attr":
                self.reads.setdefault(str(node.target).rpartition(".")[0], []).append(node)

    def main(self, merge: Merge) -> fx.Node:
        def width(node: fx.Node) -> tuple[int, Fraction | int]:
            op = self.view.ops[node]
            assert isinstance(op, Map)
            weight = self.view.tensor(weight_of(node))
            return (weight[0, 0].numel() if weight.dim() > 2 else 1, op.macs)

        convs = [n for n in merge.region.removed if self.view.ops[n].macs]  # type: ignore[union-attr]
        return max(convs, key=width)

    def weight(self, merge: Merge) -> Ref:
        return weight_of(self.main(merge))

    def label(self, merge: Merge) -> str:
        """The innermost module that holds the region and little else, or else its main
        convolution."""
        parts = [self.view.name(n).split(".") for n in merge.region.removed]
        shared = []
        for names in zip(*parts, strict=False):
            if len(set(names)) > 1:
                break
            shared.append(names[0])
        inside = sum(bool(self.view.ops[n].macs) for n in merge.region.removed)  # type: ignore[union-attr]
        here = shared and 2 * inside > self.under[".".join(shared)]
        return ".".join(shared) if here else self.view.name(self.main(merge))

    def signature(self, merge: Merge) -> str:
        """Equal for two calls of the same modules in the same way, which then share one layer; else
        the sink's name.
        """
        region = merge.region
        if all(
            len(self.calls.get(str(n.target), [])) < 2
            for n in region.removed
            if n.op == "call_module"
        ):
            return region.sink.name
        position = {region.source: -1, **{n: i for i, n in enumerate(region.nodes)}}

        def place(v: Any) -> Any:
            return repr(position.get(v, v.name)) if isinstance(v, fx.Node) else v

        return repr(
            [
                (n.op, n.target, fx.node.map_aggregate((n.args, n.kwargs), place))
                for n in region.nodes
            ]
        )

    def path(self, merges: list[Merge]) -> str:
        """The path for the layer that these merges share."""
        removed = {n for m in merges for n in m.region.removed}
        main = self.main(merges[0])
        if main.op == "call_module":
            path = str(main.target)
            free = all(n in removed for n in self.calls[path]) and self._reads_end_in(path, removed)
            return path if free else free_path(self.module, f"{path}_merged")
        weight = weight_of(main)
        path = (
            str(weight.target).rpartition(".")[0]
            if isinstance(weight, fx.Node) and weight.op == "get_attr"
            else ""
        )
        holder = self.module.get_submodule(path) if path else None
        if (
            holder is not None
            and type(holder) is nn.Module
            and not holder._modules
            and not holder._buffers
        ):
            read = {str(n.target) for n in self.reads.get(path, [])} >= {
                f"{path}.{k}" for k in holder._parameters
            }
            if (
                read
                and self._reads_end_in(path, removed)
                and set(holder._parameters) <= {"weight", "bias"}
            ):
                return path
        scope = path or self.view.name(main).rpartition(".")[0]
        return free_path(self.module, f"{scope}.merged" if scope else "merged")

    def _reads_end_in(self, path: str, removed: set[fx.Node]) -> bool:
        """Whether the tensors of the module at `path` are read by removed nodes alone."""
        return all(user in removed for n in self.reads.get(path, []) for user in n.users)


def weight_of(conv: fx.Node) -> Ref:
    """Where the weight of a convolution or linear is read from."""
    if conv.op == "call_module":
        return f"{conv.target}.weight"
    return conv.args[1] if len(conv.args) > 1 else conv.kwargs["weight"]  # type: ignore[return-value]
