"""Tracer: a torch.fx tracer for models found in practice.

It differs from `torch.fx.Tracer` in these points:

- A module whose forward cannot be traced becomes a leaf, with the reason. Tracing goes on.
- Parameters and buffers are proxies with a concrete shape, so that expressions of weights are
  recorded as expressions.
- `self.training` is not fixed by the trace: see `repfx.graph.modes`.
- A BatchNorm subclass that calls `F.batch_norm` itself is recorded as a batch norm.
- Assertions are not recorded.
- Arguments with defaults keep these unless the example has a value for them.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _NormBase

from repfx.capture.proxies import ConstantProxy, Value, pieces
from repfx.errors import Declined
from repfx.graph.effects import writes_by_name
from repfx.graph.modes import Asked, Mode, ModeFlag, TrainOnly

MODE = "_mode"
BRANCHES = "its forward branches on self.training"


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls this module and does not enter it.

    True for layers of torch.nn, parametrized modules, GraphModules, and modules that say so with
    the attribute `is_graph_leaf`."""
    if isinstance(module, (Mode, TrainOnly, fx.GraphModule)) or getattr(
        module, "is_graph_leaf", False
    ):
        return True
    if nn.utils.parametrize.is_parametrized(module):
        return True
    return type(module).__module__.startswith("torch.nn.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


class Tracer(fx.Tracer):
    """Traces one module.

    `opaque` collects the paths of modules that became leaves, with the reasons. `branching`
    collects those that did so because of an `if self.training`, "" for the root. `training` lists
    the paths of modules whose training branch is traced."""

    def __init__(
        self,
        example_names: frozenset[str],
        value: bool = False,
        training: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(param_shapes_constant=False)
        self.branching: set[str] = set()
        self.training = training
        self.example_names = example_names
        self.opaque: dict[str, Declined] = {}
        self.train_only: set[str] = set()
        self.plain_norms: set[str] = set()
        self.asked = Asked(value)
        self.modes: dict[str, fx.Node] = {}
        self.stack: list[nn.Module] = []
        self.names: dict[int, str] = {}
        self.constants: dict[str, ConstantProxy] = {}
        self.norm_asked = 0

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        modules = list(root.modules())
        # A forward may store proxies in attributes and buffers.
        kept = [(m, dict(m.__dict__), dict(m._buffers)) for m in modules]
        self.asked.training = {id(root.get_submodule(path)) for path in self.training}
        for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
            self.names.setdefault(id(tensor), name)
        try:
            for m in modules:
                if not is_leaf(m):
                    m.__dict__["training"] = ModeFlag(self.asked, m)
            self.stack = [root]
            with torch.random.fork_rng(devices=[]):
                graph = super().trace(root)
            # Tensors that are not parameters; fx stores them on the root. One from a closure or a
            # global variable belongs to the caller, so the graph gets a copy.
            before = kept[0][1]
            stored = {
                str(n.target): vars(root)[n.target]
                for n in graph.nodes
                if n.op == "get_attr" and n.target in vars(root) and n.target not in before
            }
            before.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in stored.items()})
            return graph
        finally:
            if self.asked.times:
                self.branching.add("")
            for m, attributes, held in kept:
                m.__dict__.clear()
                m.__dict__.update(attributes)
                m._buffers.clear()
                m._buffers.update(held)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or is_leaf(m)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the arguments without defaults, and for those that the example gives."""
        args: list[Any] = [self.root]
        for p in list(inspect.signature(root_fn).parameters.values())[1:]:
            if p.kind is p.VAR_POSITIONAL and len(args) == 1:
                raise TraceError("its forward takes any number of arguments")
            if p.kind is p.VAR_KEYWORD or p.kind is p.VAR_POSITIONAL:
                continue
            if p.kind is p.KEYWORD_ONLY and p.default is p.empty:
                raise TraceError(f"its forward has a required keyword-only argument {p.name!r}")
            wanted = p.default is p.empty or p.name in self.example_names
            if p.kind is not p.KEYWORD_ONLY:
                args.append(
                    self.create_proxy("placeholder", p.name, (), {}) if wanted else p.default
                )
        if not any(isinstance(a, fx.Proxy) for a in args):
            raise TraceError(
                "its forward requires no argument; pass an example with the arguments it is called "
                "with"
            )
        return root_fn, args

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def iter(self, obj: fx.Proxy) -> Any:
        """The pieces of a chunk or a split, for code that loops over them."""
        count, piece = pieces(obj.node), cast(Any, obj)
        return super().iter(obj) if count is None else iter([piece[i] for i in range(count)])

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in self.constants:
            node = self.create_node("get_attr", name, (), {})
            self.constants[name] = ConstantProxy(node, self, attr_val)
        return self.constants[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, ModeFlag):
            path = f"{self.path_of_module(a.owner)}.{MODE}".lstrip(".")
            if path not in self.modes:
                with self.graph.inserting_before(next(iter(self.graph.nodes))):
                    self.modes[path] = self.create_node("call_module", path, (), {})
            return self.modes[path]
        if isinstance(a, Tensor) and id(a) in self.names:
            return self.create_node("get_attr", self.names[id(a)], (), {})
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        if target is torch._assert:
            return None
        if (
            target is F.batch_norm
            and isinstance(self.stack[-1], _NormBase)
            and self._is_own_norm(args, kwargs)
        ):
            path = self.path_of_module(self.stack[-1])
            self.plain_norms.add(path)
            # The norm's own `if self.training` does not count.
            self.asked.times = self.norm_asked
            return super().create_proxy(
                "call_module", path, (args[0] if args else kwargs["input"],), {}
            )
        constants = _constants((args, kwargs)) if kind in ("call_function", "call_method") else None
        if constants:
            if writes_by_name(target, kwargs):
                raise TraceError(f"it changes a parameter or buffer in place ({target})")
            values = fx.node.map_aggregate(
                (args, kwargs), lambda v: v.value if isinstance(v, ConstantProxy) else v
            )
            with torch.no_grad():
                call_args, call_kwargs = values
                f = target if kind == "call_function" else getattr(type(call_args[0]), target)
                value = f(*call_args, **call_kwargs)
            if isinstance(value, Tensor):
                node = self.create_node(
                    kind, target, self.create_arg(args), self.create_arg(kwargs)
                )
                return ConstantProxy(node, self, value)
            if not isinstance(value, (tuple, list)):
                return value
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if type(m) is nn.Identity and len(args) == 1 and not m._forward_hooks:
            return args[0]
        try:
            path = self.path_of_module(m)
        except NameError:
            if m.state_dict():
                raise
            # Not a part of the model, and without state: as good as a function.
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        mark = next(iter(reversed(self.graph.nodes)), None)
        asked, scopes = self.asked.times, dict(self.module_stack)
        self.norm_asked = asked
        self.stack.append(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if self.asked.times == asked:
                return result
            # The question is settled here, either way, and does not count for the parents.
            self.asked.times = asked
            if args and result is args[0] and not m.state_dict():
                self.train_only.add(path)
                return self.create_proxy("call_module", path, args, kwargs)
            if self._same_in_training(mark, result, forward, args, kwargs):
                return result
            reason = BRANCHES
            self.branching.add(path)
        except Exception as error:
            reason = f"its forward cannot be traced: {first_line(error)}"
            if self.asked.times > asked:
                self.branching.add(path)
                self.asked.times = asked
        finally:
            self.stack.pop()
        self.module_stack.clear()
        self.module_stack.update(scopes)
        self.opaque[path] = Declined(path, reason)
        self._forget_after(mark)
        return self.create_proxy("call_module", path, args, kwargs)

    def _is_own_norm(self, args: Any, kwargs: Any) -> bool:
        """Whether F.batch_norm got the module's own state, mode and eps, as in the plain layer."""
        m: Any = self.stack[-1]
        names = (
            "input",
            "running_mean",
            "running_var",
            "weight",
            "bias",
            "training",
            "momentum",
            "eps",
        )
        given = {
            "weight": None,
            "bias": None,
            "eps": 1e-5,
            **dict(zip(names, args, strict=False)),
            **kwargs,
        }
        for name in names[1:5]:
            own = m._parameters.get(name, m._buffers.get(name))
            mine = given[name].value if isinstance(given[name], ConstantProxy) else given[name]
            if mine is not own:
                return False
        follows = isinstance(given.get("training"), ModeFlag) or self.asked.times > self.norm_asked
        return follows and given["eps"] == m.eps

    def _same_in_training(
        self, mark: fx.Node | None, result: Any, forward: Any, args: Any, kwargs: Any
    ) -> bool:
        """Whether the module's forward records the same operators if `self.training` is true."""
        end, asked = next(iter(reversed(self.graph.nodes)), None), self.asked.times
        self.asked.value = True
        try:
            again = forward(*args, **kwargs)
            same = _signature(self.graph, mark, end, result) == _signature(
                self.graph, end, None, again
            )
        except Exception:  # the training branch cannot be traced, so it is not the same
            same = False
        finally:
            self.asked.value, self.asked.times = False, asked
            self._forget_after(end)
        return same

    def _forget_after(self, mark: fx.Node | None) -> None:
        for node in reversed(self.graph.nodes):
            if node is mark:
                break
            if node.op != "placeholder" and not is_mode(node) and not node.users:
                self.graph.erase_node(node)
        self.constants = {
            name: proxy for name, proxy in self.constants.items() if not proxy.node._erased
        }


def is_mode(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).rpartition(".")[2] == MODE


def signature(graph: fx.Graph) -> list[Any]:
    """What a graph computes, without node names: equal if two graphs have the same operators."""
    return _signature(graph, None, None, None)


def _signature(
    graph: fx.Graph, after: fx.Node | None, until: fx.Node | None, result: Any
) -> list[Any]:
    """The nodes in (after, until], by operator and position.

    Earlier values and mode nodes are identified by name."""
    position: dict[fx.Node, Any] = {}
    found: list[Any] = []
    inside = after is None

    def place(v: Any) -> Any:
        v = v.node if isinstance(v, fx.Proxy) else v
        return (
            repr(position.get(v, v.target if v.op == "get_attr" else v.name))
            if isinstance(v, fx.Node)
            else v
        )

    for node in graph.nodes:
        if inside and not is_mode(node) and node.op != "get_attr":
            position[node] = len(found)
            found.append(
                repr((node.op, node.target, fx.node.map_aggregate((node.args, node.kwargs), place)))
            )
        if node is after:
            inside = True
        if node is until:
            break
    found.append(repr(fx.node.map_aggregate(result, place)))
    return found


def _constants(values: Any) -> bool:
    """Whether there are proxies among the arguments, and all of them are constants."""
    found = {True: 0, False: 0}

    def count(v: Any) -> Any:
        if isinstance(v, (fx.Proxy, fx.Node, ModeFlag)):
            found[isinstance(v, ConstantProxy)] += 1
        return v

    fx.node.map_aggregate(values, count)
    return found[True] > 0 and found[False] == 0


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return textwrap.shorten(text[0], 160, placeholder=" …") if text else type(error).__name__
