"""Owned: a traced graph that is still an object of the user's class.

    result = as_object_of(graph_module, model)
    isinstance(result, type(model)), result.config, result.loss(...), copy.deepcopy, torch.save

Called with the kind of arguments that it was traced with, it runs the graph. Any other call goes to
the forward of the class, as `model(batch)` with a dict does in some trainers, and that may call the
graph in turn.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
from typing import Any

from torch import Tensor, fx, nn

from repfx.errors import InputError
from repfx.files.allowed import function_name, function_named
from repfx.graph.holders import TABLES, attributes_of

_MADE = frozenset(fx.GraphModule(nn.Module(), fx.Graph()).__dict__)
_GENERATED = ("_graph", "_code", "_lineno_map", "_prologue_start")
INPUTS = "_traced_inputs"
DEPLOYED = "_eval_mode_only"  # the modules whose forward in training is not in the graph


class Owned(fx.GraphModule):
    """A GraphModule in the class of the model it was traced from; see `as_object_of`."""

    user_class: type[nn.Module]
    user_signature: inspect.Signature
    eval_only = False

    def recompile(self) -> Any:
        code = super().recompile()
        cls: Any = type(self)
        cls.graph_forward, base = cls.forward, cls.user_class

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = self.graph_inputs(args, kwargs)
            if cls.eval_only and self.training:
                return base.forward(self, *args, **kwargs)
            if self.__dict__.get(DEPLOYED) and self.training:
                raise InputError(
                    f"this {base.__name__} does something else in training, and what was merged or "
                    "quantized is its forward in eval mode: call .eval(), or transform it with "
                    "passes for training, such as repq, alone"
                )
            if given is not None:
                return self.graph_forward(*given)
            try:
                return base.forward(self, *args, **kwargs)
            except Exception as error:
                names = ", ".join(self.__dict__[INPUTS])
                raise InputError(
                    f"this {base.__name__} was traced with the arguments ({names}); for other "
                    f"ones, transform the model with an example that has them ({error})"
                ) from error

        forward.__signature__ = cls.user_signature  # type: ignore[attr-defined]
        cls.forward = forward
        return code

    def graph_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The inputs of the graph among the arguments; None if it was not traced with such ones."""
        kinds: dict[str, bool] | None = self.__dict__.get(INPUTS)
        if kinds is None:
            return list(args)
        if not kwargs and [isinstance(v, Tensor) for v in args] == list(kinds.values()):
            return list(args)
        try:
            bound = type(self).user_signature.bind(self, *args, **kwargs)
        except TypeError:
            return None
        given: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            p = type(self).user_signature.parameters[name]
            if p.kind is p.VAR_POSITIONAL:
                given |= {f"{name}_{i}": v for i, v in enumerate(value, len(given))}
            elif name in kinds:
                given[name] = value
            elif p.kind is p.VAR_KEYWORD:
                # Switches without a default of their own, as in predict(x, augment=False): off.
                if any(v is not False and v is not None for v in value.values()):
                    return None
            elif value is not p.default:
                return None
        if {k: isinstance(v, Tensor) for k, v in given.items()} != kinds:
            return None
        return [given[name] for name in kinds]

    def __deepcopy__(self, memo: dict[int, Any]) -> Owned:
        made: Owned = object.__new__(_class(type(self).user_class, type(self).eval_only))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self._state(), memo))
        made.graph = copy.deepcopy(self.graph, memo)
        return made

    def __copy__(self) -> Owned:
        made: Owned = object.__new__(_class(type(self).user_class, type(self).eval_only))
        made.__dict__.update(self._state())
        made.graph = copy.deepcopy(self.graph)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        return _unpickled, (cls.user_class, cls.eval_only, self._state(), _encoded(self.graph))

    def _state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _GENERATED}


def as_object_of(result: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """Turns a GraphModule into an object of the model's class, with the model's attributes.

    Its graph is to be assigned afterwards, or anew."""
    base = getattr(type(model), "user_class", type(model))
    if base is nn.Module or issubclass(base, fx.GraphModule):
        return result
    kept = {k: v for k, v in attributes_of(model).items() if k not in _MADE and k not in TABLES}
    result.__dict__.update({k: v for k, v in kept.items() if k not in result.__dict__})
    result.__class__ = _class(base)
    return result


def in_eval_mode(model: nn.Module, graph: fx.Graph, inputs: dict[str, bool]) -> Owned:
    """The model with this graph for its forward in eval mode. In training its own forward runs.

    Both call the same modules, so no pass may rewrite the graph itself; see `is_eval_only`."""
    made: Owned = object.__new__(_class(type(model), True))
    made.__dict__.update(fx.GraphModule(nn.Module(), fx.Graph()).__dict__)
    made.__dict__.update(model.__dict__)
    made.__dict__[INPUTS] = inputs
    made.graph = graph
    return made


def is_eval_only(module: nn.Module) -> bool:
    return isinstance(module, Owned) and type(module).eval_only


def _class(base: type[nn.Module], eval_only: bool = False) -> Any:
    """A class of its own for each object: a GraphModule keeps its code in its class."""
    made: Any = types.new_class(
        base.__name__, (Owned, base), exec_body=lambda ns: ns.update(__module__=base.__module__)
    )
    made.user_class, made.eval_only = base, eval_only
    made.user_signature = inspect.signature(base.forward)
    return made


def _unpickled(
    base: type[nn.Module], eval_only: bool, state: dict[str, Any], nodes: list[Any]
) -> Owned:
    made: Owned = object.__new__(_class(base, eval_only))
    made.__dict__.update(state)
    made.graph = _decoded(nodes)
    return made


class _At(str):
    """The name of a node, where a pickled graph refers to it."""


def _encoded(graph: fx.Graph) -> list[Any]:
    def place(v: Any) -> Any:
        return _At(v.name)

    found = []
    for n in graph.nodes:
        target = n.target
        if n.op == "call_function":
            with contextlib.suppress(InputError):  # the user's own are pickled by their names
                target = _At(function_name(target))
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), place)
        meta = {k: n.meta[k] for k in ("rank", "shape", "dtype") if k in n.meta}
        found.append((n.name, n.op, target, args, kwargs, meta))
    return found


def _decoded(nodes: list[Any]) -> fx.Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def value(v: Any) -> Any:
        return made[v] if isinstance(v, _At) else v

    for name, op, target, args, kwargs, meta in nodes:
        f = function_named(target) if isinstance(target, _At) else target
        given = fx.node.map_aggregate((args, kwargs), value)
        made[_At(name)] = graph.create_node(op, f, *given, name=name)
        made[_At(name)].meta.update(meta)
    return graph
