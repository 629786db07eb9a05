"""Names: the paths of merged layers, and the names of their regions in reports."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

from torch import fx

from repfx.graph.edit import free_path
from repfx.graph.holders import is_holder
from repfx.graph.ops import Map, Ref
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import layers
from repfx.rewrite.merge_regions import Merge


class Names:
    """The paths of merged layers: that of the region's widest convolution, if it is free."""

    def __init__(self, view: GraphView, module: fx.GraphModule) -> None:
        self.view = view
        self.module = module
        self.calls: dict[str, list[fx.Node]] = {}  # by the path of the called module
        self.reads: dict[str, list[fx.Node]] = {}  # get_attr nodes, by the module with the tensor
        # How many convolutions and linear layers each module contains.
        self.under: Counter[str] = Counter()
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

        if len(merge.region.removed) == 1:
            return merge.region.removed[0]
        convs = [n for n in merge.region.removed if self.view.ops[n].macs]  # type: ignore[union-attr]
        return max(convs, key=width)

    def weight(self, merge: Merge) -> Ref:
        return weight_of(self.main(merge))

    def label(self, merge: Merge) -> str:
        """The innermost module that contains the region and little else, or its main layer."""
        parts = [self.view.name(n).split(".") for n in merge.region.removed]
        shared = []
        for names in zip(*parts, strict=False):
            if len(set(names)) > 1:
                break
            shared.append(names[0])
        inside = sum(bool(getattr(self.view.ops[n], "macs", 0)) for n in merge.region.removed)
        here = shared and 2 * inside > self.under[".".join(shared)]
        return ".".join(shared) if here else self.view.name(self.main(merge))

    def signature(self, merge: Merge) -> str:
        """A key that is equal for merges that call the same modules in the same way.

        Such merges share one layer. Any other merge has the name of its sink."""
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
        if holder is not None and is_holder(holder) and not holder._modules and not holder._buffers:
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
        reads = all(self._leads_to(n, removed) for n in self._inside(scope, self.reads))
        calls = all(n in removed for n in self._inside(scope, self.calls))
        if self._is_layer(main, scope) and reads and calls:
            return scope
        return free_path(self.module, f"{scope}.merged" if scope else "merged")

    def _is_layer(self, node: fx.Node, scope: str) -> bool:
        """Whether the node is the forward of the layer at `scope`, whose weight is computed."""
        classes = dict(node.meta.get("nn_module_stack", {}).values())
        return any(base in layers() for base in getattr(classes.get(scope), "__mro__", ()))

    @staticmethod
    def _inside(scope: str, found: dict[str, list[fx.Node]]) -> list[fx.Node]:
        """The nodes of the module at `scope` and of those inside it."""
        return [n for where, ns in found.items() for n in ns if f"{where}.".startswith(f"{scope}.")]

    def _leads_to(self, node: fx.Node, removed: set[fx.Node]) -> bool:
        """Whether everything that is computed from a constant is removed."""
        return all(user in removed or self._leads_to(user, removed) for user in node.users) and (
            bool(node.users)
        )

    def _reads_end_in(self, path: str, removed: set[fx.Node]) -> bool:
        """Whether only removed nodes read the tensors of the module at `path`."""
        return all(user in removed for n in self.reads.get(path, []) for user in n.users)


def weight_of(conv: fx.Node) -> Ref:
    """Where a convolution or linear layer reads its weight from."""
    if conv.op == "call_module":
        return f"{conv.target}.weight"
    return conv.args[1] if len(conv.args) > 1 else conv.kwargs["weight"]  # type: ignore[return-value]
