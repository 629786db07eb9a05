"""GraphView: a read-only view of a graph that answers every question about its nodes.

Every node has an Op. Nodes that do not depend on the input are constants. The data flow of the
other nodes has dominators: d dominates v if every path from the input to v passes through d."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.errors import unknown
from repfx.graph.calls import Layer, call_of, layer_of
from repfx.graph.effects import Writes, writes
from repfx.graph.modes import Mode
from repfx.graph.ops import Map, Op, Opaque, Ref, Sum
from repfx.graph.run_node import call
from repfx.graph.traits import Trait
from repfx.graph.vocabulary import Kind, kind_of, overrides
from repfx.quant import FakeQuant


class GraphView:
    """A view of one GraphModule. The graph must not change while the view is in use.

    `unsigned`: patterns of the names of inputs that are never negative. Raises InputError for one
    that matches no input."""

    def __init__(self, module: fx.GraphModule, unsigned: Iterable[str] = ()) -> None:
        self.module = module
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.nodes = list(module.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self._unsigned = self._inputs(unsigned)
        # A cache for `repfx.rewrite.kernel_of`: what it found out about (source, padding).
        self.own_padding: dict[tuple[fx.Node, fx.Node], bool] = {}
        self._tensors: dict[Ref, Tensor] = {}
        self._modes: set[fx.Node] = set()
        self._constants: set[fx.Node] = set()
        # A tensor that a forward changes is not a constant.
        self._written = {n for n in self.writes.of if n.op == "get_attr"}
        for node in self.nodes:
            self._classify(node)
        self.ops: dict[fx.Node, Op] = {}
        for node in self.nodes:
            self.ops[node] = self._op(node)

    def is_constant(self, value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, fx.Node) and value in self._constants)

    def follows_mode(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self._modes

    def tensor(self, ref: Ref) -> Tensor:
        """The value of a constant: a parameter or buffer by its path, or an expression of them."""
        if ref not in self._tensors:
            if isinstance(ref, str):
                owner = self.modules.get(ref.rpartition(".")[0])
                # In training mode a parametrization may change its own state.
                owner = (
                    copy.deepcopy(owner).eval()
                    if owner and nn.utils.parametrize.is_parametrized(owner)
                    else None
                )
                self._tensors[ref] = (
                    getattr(owner, ref.rpartition(".")[2])
                    if owner
                    else attrgetter(ref)(self.module)
                )
            else:
                self._tensors[ref] = self.evaluate(ref, self.tensor)
        return self._tensors[ref]

    def rank(self, node: fx.Node) -> int | None:
        """The number of dimensions of a value, or None if unknown.

        It was stored when the graph was checked on an example."""
        return node.meta.get("rank")

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of a value, or None if unknown."""
        return node.meta.get("dtype")

    def channels(self, node: fx.Node, channel_axis: int) -> int | None:
        """The number of channels of a value, or None if unknown."""
        shape = node.meta.get("shape")
        return None if shape is None or len(shape) < 2 else shape[channel_axis]

    def name(self, node: fx.Node) -> str:
        """A readable name: the path of a module, or an operator with the module it belongs to."""
        if node.op in ("call_module", "get_attr"):
            return str(node.target)
        stack = node.meta.get("nn_module_stack")
        scope = list(stack.values())[-1][0] if stack else ""
        return f"{scope}.{node.name}".lstrip(".")

    def data_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [
            n for n in node.all_input_nodes if n not in self._constants and n not in self._modes
        ]

    def values_of(self, node: fx.Node) -> list[fx.Node]:
        """The values that a node computes with: its data inputs that are no sizes."""
        return [n for n in self.data_inputs(node) if not self.is_size(n)]

    def is_size(self, node: fx.Node) -> bool:
        """Whether it is a size, or computed from sizes alone."""
        if Trait.MEASURES in self.traits(node):
            return True
        inputs = self.data_inputs(node)
        number = node.op == "call_function" and bool(inputs)
        return number and all(self.is_size(n) for n in inputs)

    def is_data(self, node: fx.Node) -> bool:
        return node not in self._constants and node not in self._modes

    def varies(self, node: fx.Node) -> bool:
        """Whether it depends on an input of the graph. A table that layers compute does not."""
        return node in self._varying

    @cached_property
    def _varying(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    @cached_property
    def writes(self) -> Writes:
        """The changes in place of this graph."""
        return Writes(self.modules, self.nodes, self.index)

    @cached_property
    def dominator(self) -> dict[fx.Node, fx.Node | None]:
        """The immediate dominator of each data node, None for the inputs."""
        import networkx as nx  # imported late, because it takes longer than the rest of repfx

        flow = nx.DiGraph()
        for node in self.nodes:
            if self.is_data(node):
                i = self.index[node]
                inputs = self.data_inputs(node)
                flow.add_edges_from([(self.index[n], i) for n in inputs] if inputs else [(-1, i)])
        if not flow:
            return {}
        above = nx.immediate_dominators(flow, -1)
        return {
            self.nodes[i]: self.nodes[d] if d is not None and d >= 0 else None
            for i, d in above.items()
            if i >= 0
        }

    def kind(self, node: fx.Node) -> Kind:
        """The row of the vocabulary for the operator that the node calls."""
        return kind_of(node, self.module_of(node))

    def traits(self, node: fx.Node) -> Trait:
        """The traits of the value of a node, from its operator and from its Op."""
        called = call_of(node, self.module_of(node))
        found = Trait.NONE if called is None else called.traits
        if node in self._unsigned:
            found |= Trait.NON_NEGATIVE
        op = self.ops.get(node)
        if isinstance(op, Map) and op.kind in ("identity", "dropout"):
            found |= Trait.SAME | Trait.MOVES | Trait.KEEPS_SIGN
        elif isinstance(op, Sum):
            if all(factor >= 0 for _, factor in op.terms):
                found |= Trait.KEEPS_SIGN
            if len(op.terms) == 1 and op.terms[0][1] == 1:
                found |= Trait.MOVES
        return found

    def layer(self, node: fx.Node) -> Layer | None:
        """The convolution or linear layer that a node calls, or None."""
        return layer_of(node, self.module_of(node))

    def quantizer(self, node: Any) -> FakeQuant | None:
        """The quantizer that a node calls, or None."""
        module = self.module_of(node) if isinstance(node, fx.Node) else None
        return module if isinstance(module, FakeQuant) else None

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, or None."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _inputs(self, patterns: Iterable[str]) -> set[fx.Node]:
        inputs = {str(n.target): n for n in self.nodes if n.op == "placeholder"}
        found: set[str] = set()
        for pattern in patterns:
            names = fnmatch.filter(inputs, pattern)
            if not names and pattern != "*":
                raise unknown("input", pattern, inputs)
            found.update(names)
        return {inputs[name] for name in found}

    def _classify(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            if node not in self._written:
                self._constants.add(node)
        elif isinstance(self.module_of(node), Mode):
            self._modes.add(node)
        elif node.op in ("call_function", "call_method") and not writes(node):
            fixed = all(n in self._constants for n in node.all_input_nodes)
            if fixed and not kind_of(node).traits & (Trait.RANDOM | Trait.UNSET):
                self._constants.add(node)

    def _op(self, node: fx.Node) -> Op:
        if not self.is_data(node):
            return Opaque()
        module = self.module_of(node)
        called = call_of(node, module)
        if module is not None and overrides(module):
            return Opaque("its class overrides the forward of a known layer")
        if called is None and module is not None and self.kind(node).rule is not None:
            return Opaque("it is called with more than its input")
        if called is None or called.kind.rule is None:
            return Opaque()
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            return Opaque("it has forward hooks", "remove the hooks")
        try:
            return called.kind.rule(self, *called.args, **called.kwargs)
        except TypeError:
            return Opaque("arguments that are not static")

    def evaluate(self, node: fx.Node, fetch: Callable[[Ref], Tensor]) -> Tensor:
        """The value of a constant expression, computed from the tensors that `fetch` returns."""
        if node.op == "get_attr":
            return fetch(str(node.target))
        with torch.no_grad():
            value: Tensor = call(node, fetch)
        return value
