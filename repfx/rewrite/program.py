"""program: writes the kernel of a region into the graph as tensor code, which runs at every step.

`kernel_of` runs on proxies instead of the weights themselves, and its operations are recorded as
nodes. Each batch norm is replaced by a `KernelNorm`, which reads the moments of the region's
source."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from repfx.algebra import Fixed, Kernel, KernelNorm
from repfx.graph.edit import free_path, put_module
from repfx.graph.ops import Map, Ref
from repfx.graph.view import GraphView
from repfx.rewrite.kernel_of import kernel_of
from repfx.rewrite.merge_regions import Merge
from repfx.rewrite.names import weight_of
from repfx.rewrite.proxies import ConstantProxy


class Recorder(GraphAppendingTracer):
    """Records operations on constants as nodes, and runs them so that their values are known."""

    def __init__(self, module: fx.GraphModule, view: GraphView, like: Tensor) -> None:
        super().__init__(module.graph)
        self.module, self.view, self.like = module, view, like
        self.stored: dict[int, tuple[Tensor, str]] = {}

    def constant(self, ref: Ref) -> ConstantProxy:
        """A proxy for a weight, as the graph reads it."""
        node = self.graph.get_attr(ref) if isinstance(ref, str) else ref
        return ConstantProxy(node, self, self.view.tensor(ref).detach())

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        values = fx.node.map_aggregate((args, kwargs), self._now)
        with torch.no_grad():
            call_args, call_kwargs = values
            f = target if kind == "call_function" else getattr(type(call_args[0]), target)
            value = f(*call_args, **call_kwargs)
        return ConstantProxy(node, self, value)

    def _now(self, v: Any) -> Any:
        if isinstance(v, ConstantProxy):
            return v.value
        if isinstance(v, Tensor):
            return v.to(self.like) if v.is_floating_point() else v.to(self.like.device)
        return v

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):  # a constant of the algebra, such as the ones of an identity
            if id(a) not in self.stored:
                path, fixed = fixed_of(self.module)
                self.stored[id(a)] = (a, f"{path}.{fixed.add(self._now(a))}")
            return self.graph.get_attr(self.stored[id(a)][1])
        return super().create_arg(a)


def fixed_of(module: fx.GraphModule) -> tuple[str, Fixed]:
    """The module that keeps the algebra's constants, and its path; created if there is none."""
    for name, child in module.named_children():
        if isinstance(child, Fixed):
            return name, child
    fixed, path = Fixed(), free_path(module, "fixed")
    put_module(module, path, fixed)
    return path, fixed


def program(
    module: fx.GraphModule,
    view: GraphView,
    merge: Merge,
    at: fx.Node,
    seen: Callable[[], fx.Node],
    mode: str,
) -> tuple[fx.Node, fx.Node | None, Tensor]:
    """Writes the program of a region before the node `at`.

    Returns the nodes of the weight and the bias, and the current value of the weight. Batch norms
    are replaced by KernelNorms of this `mode`, which read the Moments that `seen` returns."""
    region = merge.region
    layers = [n for n in region.nodes if getattr(view.ops[n], "macs", 0)]
    # A layer that other regions read, too, may have been replaced already, and reads nothing now.
    like = view.tensor(next(ref for n in layers if (ref := weight_of(n)) is not None))
    recorder = Recorder(module, view, like)
    fetch: Any = recorder.constant  # proxies stand for tensors

    def meaning(op: Map, before: Kernel) -> Kernel:
        g = op.geometry(before.geometry)
        if op.kind != "bn":
            return op.kernel(fetch, g)
        before = before.plain
        node = next(n for n in region.nodes if view.ops[n] is op)
        norm: Any = view.modules[str(node.target)]
        where = str(node.target)
        parent = module.get_submodule(where.rpartition(".")[0])
        bias = None if before.bias is None else recorder.create_arg(before.bias)
        args = (seen(), recorder.create_arg(before.weight), bias)
        exact = before.geometry.taps > 1 and not _taps_are_learned(module, args[1], args[0])
        parent._modules[where.rpartition(".")[2]] = KernelNorm(norm, before.geometry, mode, exact)
        call = module.graph.call_module(where, args)
        running = [t.detach() for t in (norm.running_mean, norm.running_var)]
        scale = torch.rsqrt(running[1] + norm.eps) * (
            1 if norm.weight is None else norm.weight.detach()
        )
        shift = -running[0] * scale + (0 if norm.bias is None else norm.bias.detach())
        parts = []
        for i, value in enumerate((scale, shift)):
            item = module.graph.call_function(operator.getitem, (call, i))
            parts.append(ConstantProxy(item, recorder, value))
        return Kernel.diagonal(g, *parts)  # type: ignore[arg-type]

    with module.graph.inserting_before(at):
        kernel = kernel_of(view, region, fetch, meaning=meaning).plain
        packed: Any = (
            kernel.weight if kernel.geometry.source_axis == 1 else kernel.weight.flatten(1)
        )
        weight = recorder.create_arg(packed)
        bias = None if kernel.bias is None else recorder.create_arg(kernel.bias)
    now = packed.value if isinstance(packed, ConstantProxy) else packed
    return weight, bias, now.to(like)


def _taps_are_learned(module: fx.GraphModule, weight: fx.Node, seen: fx.Node) -> bool:
    """Whether this expression contains a trained kernel of more than one tap.

    A fixed filter that is only scaled does not."""
    reached, todo = {seen}, [weight]
    while todo:
        node = todo.pop()
        if node in reached:
            continue
        reached.add(node)
        todo += node.all_input_nodes
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(module)
            if value.requires_grad and prod(value.shape[2:]) > 1:
                return True
    return False
