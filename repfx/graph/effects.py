"""Changes in place and shared memory: the effects of operators that data flow does not show."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from repfx.graph.traits import Trait
from repfx.graph.vocabulary import UNKNOWN, kind_of, kind_of_layer


def writes_by_name(target: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator with this name overwrites its first argument, or `out`."""
    name = str(getattr(target, "__name__", target))
    says = kwargs.get("inplace") is True or kwargs.get("out") is not None
    # x += y is operator.iadd, which Python looks up as __iadd__.
    plain = f"__{name[1:]}__" if name[:1] == "i" else ""
    operators = hasattr(torch.Tensor, f"__{name}__") and hasattr(operator, plain)
    ends = name.endswith("_") and not name.endswith("__")
    return ends or says or operators or target is operator.setitem


def writes(node: fx.Node, module: nn.Module | None = None) -> bool:
    """Whether the node overwrites its first argument, or `out`.

    `module`: the module that a call_module node calls."""
    if module is not None:
        return bool(getattr(module, "inplace", False)) or is_foreign(module)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.op in ("call_function", "call_method") and writes_by_name(node.target, node.kwargs)


def is_dead(node: fx.Node) -> bool:
    """Whether the node can be removed. Calls of modules stay: they may have effects in training."""
    kinds = ("get_attr", "call_function", "call_method")
    return node.op in kinds and not node.users and not node.is_impure() and not writes(node)


class Writes:
    """The changes in place of a graph: `of` each value, the nodes that may change its memory."""

    def __init__(
        self, modules: dict[str, nn.Module], nodes: Iterable[fx.Node], index: dict[fx.Node, int]
    ) -> None:
        self.index = index
        self.modules = modules
        self.of: dict[fx.Node, list[fx.Node]] = {}
        self.by: dict[fx.Node, set[fx.Node]] = {}
        for node in nodes:
            called = modules[str(node.target)] if node.op == "call_module" else None
            if writes(node, called):
                self.by[node] = set().union(*map(self._aliases, _written(node, called)))
                for value in self.by[node]:
                    self.of.setdefault(value, []).append(node)

    def changed(self, value: fx.Node) -> bool:
        """Whether some reader of the value may see a changed value. A size never changes."""
        readers = [u for u in value.users if Trait.MEASURES not in kind_of(u).traits]
        return len(readers) > 1 and any(self._before(value, w) for w in self.of.get(value, ()))

    def through(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether the node overwrites memory of others through this value, a view of it.

        Memory that only this value reads, as after a stochastic depth, is not that of others."""
        if value not in self.by.get(node, ()):
            return False
        while self._may_alias(value):
            near = self._shared(value)
            readers = [u for n in near for u in n.users if Trait.MEASURES not in kind_of(u).traits]
            if len(near) != 1 or near[0].op in ("placeholder", "get_attr") or readers != [value]:
                return True
            (value,) = near
        return False

    def may_write(self, node: fx.Node) -> bool:
        """Whether the node may overwrite its first argument: fresh memory that only it reads."""
        value = node.args[0] if node.args else None
        if not isinstance(value, fx.Node) or value.op not in (
            "call_module",
            "call_function",
            "call_method",
        ):
            return False
        # Some aten operators return their input without declaring it.
        if isinstance(value.target, torch._ops.OpOverload):
            return False
        return list(value.users) == [node] and not self._may_alias(value)

    def disturb(
        self, source: fx.Node, nodes: tuple[fx.Node, ...], kept: frozenset[fx.Node]
    ) -> bool:
        """Whether values would differ if `nodes` were computed at once, in place of the last one.

        The source would be read after the nodes that change it, which is wrong for readers that
        came before such a change. Changes made by nodes that are not kept would be lost, which is
        wrong for readers that come after one, inside the region or outside."""
        if not self.of:
            return False
        inside, end = set(nodes), self.index[nodes[-1]]
        for value in (source, *nodes[:-1]):
            for w in self.of.get(value, ()):
                at = self.index[w]
                readers = [self.index[r] for r in value.users if r in inside]
                late = value is source and (w not in inside or w in kept)
                wrong = any(r <= at for r in readers) if late else any(r > at for r in readers)
                if at < end and self._before(value, w) and wrong:
                    return True
        for w in nodes:
            for value in self.by.get(w, ()):
                after = any(u not in inside and self.index[u] > self.index[w] for u in value.users)
                if w not in kept and self._before(value, w) and after:
                    return True
        return False

    def _before(self, value: fx.Node, writer: fx.Node) -> bool:
        """Whether a value is older than a write. Younger values include the change anyway."""
        return self.index[value] < self.index[writer]

    def _aliases(self, value: fx.Node) -> set[fx.Node]:
        found, todo = {value}, [value]
        while todo:
            node = todo.pop()
            near = [u for u in node.users if node in self._shared(u)] + self._shared(node)
            for other in near:
                if other not in found:
                    found.add(other)
                    todo.append(other)
        return found

    def _shared(self, node: fx.Node) -> list[fx.Node]:
        """The inputs whose memory the result may share. A writer returns what it overwrites."""
        if not self._may_alias(node):
            return []
        called = self.modules[str(node.target)] if node.op == "call_module" else None
        return _written(node, called) if writes(node, called) else node.all_input_nodes

    def _may_alias(self, node: fx.Node) -> bool:
        """Whether the result may be one of the inputs, or a part of one."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            # Modules of repfx may return their input.
            layer, kind = _is_layer(module), kind_of_layer(module)
            fresh = kind is UNKNOWN or Trait.FRESH in kind.traits
            return not layer or not fresh or writes(node, module)
        if isinstance(node.target, torch._ops.OpOverload):
            return any(a.alias_info is not None for a in node.target._schema.arguments)
        if node.op not in ("call_function", "call_method"):
            return False
        return Trait.FRESH not in kind_of(node).traits or writes(node)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of PyTorch with its own forward."""
    name = type(module).__module__
    return (
        name.startswith("torch.nn.")
        and not name.startswith("torch.nn.parallel.")
        and "forward" not in vars(module)
    )


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is unknown code: from neither PyTorch nor repfx, or with another forward."""
    return not (_is_layer(module) or type(module).__module__.startswith("repfx."))


def _written(node: fx.Node, module: nn.Module | None) -> list[fx.Node]:
    """The values that a node which writes may overwrite: `out` if given, else its first argument.

    Foreign code may overwrite all of its inputs."""
    if module is not None and is_foreign(module):
        return node.all_input_nodes
    first = (
        node.args[0]
        if node.args
        else next((node.kwargs[k] for k in ("input", "self") if k in node.kwargs), None)
    )
    if node.kwargs.get("out") is not None:
        first = node.kwargs["out"]
    found: list[fx.Node] = []
    fx.node.map_arg((first,), found.append)
    return found
