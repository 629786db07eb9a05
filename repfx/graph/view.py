"""GraphView: a read-only snapshot of a graph, as the algebra sees it.

Every node has an Op; nodes that do not depend on the input are constants; the data-flow graph of
the rest has dominators: d dominates v when every path from the input to v passes through d."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.graph.calls import Layer, call_of, layer_of
from repfx.graph.effects import Writes, writes
from repfx.graph.modes import Mode
from repfx.graph.ops import Map, Op, Opaque, Ref, Sum
from repfx.graph.run_node import call
from repfx.graph.traits import Trait
from repfx.graph.vocabulary import Kind, kind_of, overrides
from repfx.quant import FakeQuant


class GraphView:
    """Reads one GraphModule; the graph must not change while a view of it is in use."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.nodes = list(module.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.own_padding: dict[
            tuple[fx.Node, fx.Node], bool
        ] = {}  # what a reader found of (source, padding)
        self._tensors: dict[Ref, Tensor] = {}
        self._modes: set[fx.Node] = set()
        self._constants: set[fx.Node] = set()
        self._written = {
            n for n in self.writes.of if n.op == "get_attr"
        }  # what a forward changes is no constant
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
                # What parametrizes it may move its own state in training.
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
        """The number of dimensions of a value, noted when the graph was checked on an example; None
        if it was not.
        """
        return node.meta.get("rank")

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        """The type of a value, noted as its rank is."""
        return node.meta.get("dtype")

    def channels(self, node: fx.Node, channel_axis: int) -> int | None:
        """The number of channels of a value, noted as its rank is."""
        shape = node.meta.get("shape")
        return None if shape is None or len(shape) < 2 else shape[channel_axis]

    def name(self, node: fx.Node) -> str:
        """What a person calls this node: a module's path, or the operator with the module it stands
        in.
        """
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

    @cached_property
    def writes(self) -> Writes:
        """The changes in place."""
        return Writes(self.modules, self.nodes, self.index)

    @cached_property
    def dominator(self) -> dict[fx.Node, fx.Node | None]:
        """The immediate dominator of each data node; None at the inputs."""
        import networkx as nx  # here: it takes longer to import than all of repfx

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
        """The row of the vocabulary that says what the node calls."""
        return kind_of(node, self.module_of(node))

    def traits(self, node: fx.Node) -> Trait:
        """What is true of the value that a node gives, from its spelling and from its Op."""
        called = call_of(node, self.module_of(node))
        found = Trait.NONE if called is None else called.traits
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
        """The convolution or linear layer that a node calls; None where it calls none."""
        return layer_of(node, self.module_of(node))

    def quantizer(self, node: Any) -> FakeQuant | None:
        """The quantizer that a node calls."""
        module = self.module_of(node) if isinstance(node, fx.Node) else None
        return module if isinstance(module, FakeQuant) else None

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _classify(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            if node not in self._written:
                self._constants.add(node)
        elif isinstance(self.module_of(node), Mode):
            self._modes.add(node)
        elif node.op in ("call_function", "call_method") and not writes(node):
            fixed = all(n in self._constants for n in node.all_input_nodes)
            if fixed and Trait.RANDOM not in kind_of(node).traits:
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
        """Runs a constant expression on the tensors that `fetch` gives."""
        if node.op == "get_attr":
            return fetch(str(node.target))
        with torch.no_grad():
            value: Tensor = call(node, fetch)
        return value
