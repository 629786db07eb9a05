"""Tracer: runs a module on an example and returns the graph of what its forward does.

- A layer of torch.nn is one node. Hooks and parametrizations are part of the forward, so a layer
  that has some is entered, and its weight is recorded as the expression it is.
- A module whose forward cannot be recorded becomes a leaf, with the reason. Tracing goes on.
- `self.training` is not fixed by the trace: see `repfx.graph.modes`.
- A BatchNorm subclass that calls `F.batch_norm` itself is recorded as a batch norm.
- Whatever the forward writes into the model's attributes is undone.
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only, tree_structure

from repfx.capture.caches import uncached
from repfx.capture.recorder import Recorder, Untraceable, fresh
from repfx.capture.running import Attributes, PythonRandom, plain_modules, undone
from repfx.capture.structures import Contents, leaves
from repfx.capture.symbols import ranges_ask, symbol
from repfx.capture.two_modes import Comparison, Part, TooDifferent
from repfx.errors import Declined
from repfx.graph.guards import is_guard
from repfx.graph.modes import Asked, Mode, ModeFlag, TrainOnly
from repfx.graph.traits import Trait
from repfx.graph.vocabulary import kind_of

MODE, PART = "_mode", "_train_only"
BRANCHES = "its forward branches on self.training"
_CALL = nn.Module.__call__
KNOWN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls this module and does not enter it.

    True for layers of torch.nn that have no hooks and no parametrized tensors, for scripted
    modules, GraphModules, and modules that say so with the attribute `is_graph_leaf`."""
    if is_layer(module):
        return True
    if isinstance(module, (Mode, TrainOnly, fx.GraphModule, torch.jit.ScriptModule)):
        return True
    return bool(getattr(module, "is_graph_leaf", False))


def is_layer(module: nn.Module) -> bool:
    """Whether it is a layer of torch.nn that has no hooks and no parametrized tensors."""
    name = type(module).__module__
    if not name.startswith("torch.nn.") or name.startswith("torch.nn.utils."):
        return False
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return "parametrizations" not in module._modules and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Tracer:
    """Traces one module.

    `opaque` collects the paths of modules that became leaves, with the reasons. `branching`
    collects those that did so because of an `if self.training`, "" for the root; `unlike` those
    whose training branch raises an error or returns values of another structure. `training` lists
    the paths of modules whose training branch is traced. `eval_only`: whether the root's own
    training branch does not matter. With `deploy`, the training branch of a module that calls
    layers itself is left out; `deployed` collects these modules."""

    def __init__(
        self,
        value: bool = False,
        training: frozenset[str] = frozenset(),
        eval_only: bool = False,
        deploy: bool = False,
    ) -> None:
        self.eval_only, self.deploy = eval_only, deploy
        self.deployed: set[str] = set()
        self.branching: set[str] = set()
        self.unlike: set[str] = set()
        self.training = training
        self.opaque: dict[str, Declined] = {}
        self.train_only: set[str] = set()
        self.plain_norms: set[str] = set()
        self.parts: dict[str, TrainOnly] = {}  # what is done in training only
        self.cut: set[fx.Node] = set()  # the calls of these
        self.asked = Asked(value)
        self.modes: dict[str, fx.Node] = {}
        self.stack: list[nn.Module] = []
        self.norm_asked = 0
        self.result: Any = None
        self.inputs: dict[str, bool] = {}  # the arguments that are inputs, and which are tensors

    def trace(self, root: nn.Module, args: tuple[Any, ...]) -> fx.Graph:
        """The graph of the root's forward on these arguments.

        Raises whatever the forward raises, and Untraceable if a graph cannot express it."""
        self.root = root
        self.paths = {id(m): path for path, m in reversed(list(root.named_modules()))}
        self.asked.training = {id(root.get_submodule(path)) for path in self.training}
        self.recorder = Recorder(_names(root))
        self.recorder.mode_node, self.recorder.answer = self._mode_node, lambda flag: False
        self.recorder.special[F.batch_norm] = self._own_norm
        self.recorder.module_of, self.recorder.paths = self._module_of, self.paths
        numbers = PythonRandom()
        with self._prepared(root):
            given = self._placeholders(root, args)
            with ranges_ask(), self.recorder:
                mark = next(iter(reversed(self.recorder.graph.nodes)))
                kept = State(root, given)
                self.result = _CALL(root, *given)
                if numbers.drawn():
                    raise Untraceable("its Python draws a random number")
                if self.asked.times and not self.eval_only:
                    try:
                        self.result = self._settled(mark, self.result, kept, tuple(given), {})
                    except TooDifferent as error:
                        self._note(error, "")
                        if not self._deploys(mark, ""):
                            raise Untraceable(BRANCHES) from None
                    self.asked.times = 0
            out = self.recorder.argument(self.result)
            self.recorder.graph.output(out)
        for name, tensor in self.recorder.constants.items():
            root.__dict__[name] = tensor.detach().clone()
        return self.recorder.graph

    @contextlib.contextmanager
    def _prepared(self, root: nn.Module) -> Iterator[None]:
        """Calls of modules come to this tracer. Afterwards the model is what it was before."""
        self.stack = [root]
        tracer = self

        def call(m: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return tracer.call_module(m, args, kwargs)

        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            if tracer.recorder.paused:
                return applied.__func__(cls, *args, **kwargs)
            raise Untraceable(f"it calls {cls.__name__}, an autograd function of its own")

        check, applied = torch._assert, torch.autograd.Function.__dict__["apply"]
        modules = plain_modules(root)
        with undone(root), uncached(modules):
            for m in modules:
                m.__dict__["training"] = False if is_leaf(m) else ModeFlag(self.asked, m)
            nn.Module.__call__ = call  # type: ignore[method-assign]
            torch._assert = lambda *_: None
            torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
            try:
                yield
            finally:
                self.recorder.paused += (
                    1  # a size that is kept somewhere is just a number from now on
                )
                nn.Module.__call__ = _CALL  # type: ignore[method-assign]
                torch._assert = check
                torch.autograd.Function.apply = applied  # type: ignore[method-assign]
                if self.asked.times:
                    self.branching.add("")

    def _placeholders(self, root: nn.Module, args: tuple[Any, ...]) -> list[Any]:
        """The arguments, each bound to a placeholder with the name it has in the signature."""
        names = _argument_names(root, len(args))
        parameters = inspect.signature(root.forward).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        given: list[Any] = []
        for name, value in zip(names, args, strict=True):
            copied = tree_map_only(Tensor, lambda t: t.clone(), value)
            if name in defaults and value is defaults[name]:
                given.append(value)
                continue
            for leaf in leaves(value):
                if not isinstance(leaf, KNOWN):  # what is read from it would be fixed for good
                    raise Untraceable(f"it is given a {type(leaf).__name__}")
            node = self.recorder.add("placeholder", name, (), {})
            self.inputs[name] = isinstance(value, Tensor)
            given.append(symbol(copied, self.recorder, partial(_itself, node)))
            if isinstance(value, (bool, str, type(None))):
                self.recorder.fact_of(node, "==", value)
                continue
            if isinstance(value, (list, tuple, dict)):  # a longer one would lose its end
                length = self.recorder.add("call_function", len, (node,), {})
                self.recorder.fact_of(length, "==", len(value))
            self.recorder.bind(copied, node)
        if not any(n.op == "placeholder" for n in self.recorder.graph.nodes):
            raise Untraceable(
                "its forward requires no argument; pass an example with the arguments it is called "
                "with"
            )
        return given

    # ---- modules ----------------------------------------------------------------------------

    def call_module(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.recorder.paused:
            return _CALL(m, *args, **kwargs)
        if type(m) is nn.Identity and len(args) == 1 and not kwargs and not has_hooks(m):
            return args[0]
        path = self.paths.get(id(m))
        if path is None:
            if is_leaf(m) and m.state_dict():
                raise Untraceable("it calls a module that is not a part of it")
            return _CALL(m, *args, **kwargs)  # without state, or a container made on the way
        if path in self.opaque or is_leaf(m):
            return self._leaf(m, path, args, kwargs)
        return self._enter(m, path, args, kwargs)

    def _enter(self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = self.recorder
        mark = next(iter(reversed(recorder.graph.nodes)), None)
        asked, kept = self.asked.times, State(m, (args, kwargs))
        self.norm_asked = asked
        self.stack.append(m)
        recorder.scope.append((path, type(m)))
        depth, opened = len(self.stack), len(recorder.scope)
        try:
            result = _CALL(m, *args, **kwargs)
            if self.asked.times == asked:
                return result
            # The question is settled here, either way, and does not count for the parents.
            self.asked.times = asked
            if args and result is args[0] and not m.state_dict():
                self.train_only.add(path)
                return self._leaf(m, path, args, kwargs)
            return self._settled(mark, result, kept, args, kwargs)
        except TooDifferent as error:
            self._note(error, path)
            if self._deploys(mark, path):
                return result
            reason = BRANCHES
            self.branching.add(path)
        except Exception as error:
            reason = f"its forward cannot be traced: {first_line(error)}"
            if self.asked.times > asked:
                self.branching.add(path)
                self.asked.times = asked
        finally:
            del self.stack[depth - 1 :], recorder.scope[opened - 1 :]
        kept.restore()
        self.opaque[path] = Declined(path, reason)
        if self.eval_only:
            raise Untraceable(reason)  # a graph with such a leaf is no use, so end it here
        recorder.forget_after(mark)
        return self._leaf(m, path, args, kwargs)

    def _leaf(self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a module without recording what is inside, and records the call."""
        recorder = self.recorder
        node = recorder.add("call_module", path, recorder.argument(args), recorder.argument(kwargs))
        flags = [(c, c.__dict__["training"]) for c in plain_modules(m)]
        recorder.paused += 1
        for child, _ in flags:
            child.__dict__["training"] = False
        try:
            result = _CALL(m, *recorder.bare(args), **recorder.bare(kwargs))
        finally:
            recorder.paused -= 1
            for child, flag in flags:
                child.__dict__["training"] = flag
        own = result if getattr(m, "inplace", False) else fresh(result, (args, kwargs))
        return recorder.bind_whole(own, node)

    def _note(self, error: TooDifferent, path: str) -> None:
        if error.__cause__ is not None:
            self.unlike.add(path)

    def _deploys(self, mark: fx.Node | None, path: str) -> bool:
        """Whether the graph may leave out what this module does in training.

        Only if it calls layers itself, or computes the weight of one: they could not be merged or
        quantized otherwise."""
        if not self.deploy:
            return False
        module = self.root.get_submodule(path)
        if type(module).__module__.startswith("torch.nn.utils."):
            self._deploy(module, path)
            return True
        nodes = list(self.recorder.graph.nodes)
        for node in nodes[nodes.index(mark) + 1 if mark else 0 :]:
            kind = kind_of(node, self._module_of(node))
            scope = list(node.meta.get("nn_module_stack", {"": ""}))[-1]
            if scope == path and (Trait.LAYER in kind.traits or kind.name == "bn"):
                self._deploy(module, path)
                return True
        return False

    def _deploy(self, module: nn.Module, path: str) -> None:
        self.deployed.add(path)
        self.asked.deployed.add(id(module))
        self.branching.add(path)  # both branches may be one function

    def _settled(
        self, mark: fx.Node | None, result: Any, before: State, args: Any, kwargs: Any
    ) -> Any:
        """Records the forward in training too, and cuts out what it does in training only.

        Returns the result, which may now be that of such a part. Raises TooDifferent."""
        recorder, graph = self.recorder, self.recorder.graph
        end, asked = next(iter(reversed(graph.nodes)), None), self.asked.times
        kept = State(before.module, (args, kwargs))
        before.restore()
        self.asked.value = True
        numbers = PythonRandom()
        try:
            again = _CALL(before.module, *args, **kwargs)
            if numbers.drawn():  # the training branch is another one each time
                raise TooDifferent
            if type(result) is not type(again) or tree_structure(result) != tree_structure(again):
                raise Untraceable("its training branch returns something else")
            nodes = list(graph.nodes)
            start, stop = nodes.index(mark) + 1 if mark else 0, nodes.index(end) + 1 if end else 0
            first = {n for n in nodes[start:stop] if not _shared(n)}
            second = {n for n in nodes[stop:] if not _shared(n)}
            found = Comparison(first, second, recorder.origin_of)
            found.match()
            # The root's own forward stays for training where it makes an object: a trainer may call
            # it with more arguments, such as labels, and get another one.
            split = list if before.module is self.root else leaves
            one, other = (recorder.argument(split([r])) for r in (result, again))
            found.compare(one, other, None)
            for part in found.parts():
                result = self._cut_out(before.module, part, found.same, result)
        except TooDifferent:
            raise
        except Exception as error:  # the training branch cannot be traced
            raise TooDifferent from error
        finally:
            self.asked.value, self.asked.times = False, asked
            kept.restore()
            recorder.forget_after(end, self.cut)
        return result

    def _cut_out(self, m: nn.Module, part: Part, same: dict[fx.Node, fx.Node], result: Any) -> Any:
        """Puts a call of the part behind the value that it changes in training."""
        recorder = self.recorder
        module, inputs = part.module(same)
        if None in part.readers and not isinstance(result, Tensor):
            raise TooDifferent
        path = f"{self.paths[id(m)]}.{PART}".lstrip(".")
        path += f"_{len(self.parts)}" if self.parts else ""
        self.parts[path] = module
        # In the order of the forward, as far as the readers come after.
        last = max([*inputs, *self.cut])
        if any(reader is not None and reader < last for reader in part.readers):
            last = max(inputs)
        with recorder.graph.inserting_after(last):
            node = recorder.add("call_module", path, tuple(inputs), {})
        self.cut.add(node)
        node.meta |= {k: part.before.meta[k] for k in ("dtype", "shape") if k in part.before.meta}
        recorder.shapes[node] = recorder.shapes[part.before]
        for reader in part.readers:
            if reader is not None:
                reader.replace_input_with(part.before, node)
        if None not in part.readers:
            return result
        # A tensor object of its own: the value before the part may still be read elsewhere.
        return recorder.bind(torch.ops.aten.alias.default(result), node)

    def _module_of(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module" or str(node.target) in (*self.parts, *self.modes):
            return None
        return self.root.get_submodule(str(node.target))

    # ---- modes and norms --------------------------------------------------------------------

    def _mode_node(self, flag: ModeFlag) -> fx.Node | bool:
        if self.eval_only and flag.owner is self.root:
            return False  # the graph runs in eval mode only
        path = f"{self.paths[id(flag.owner)]}.{MODE}".lstrip(".")
        if path not in self.modes:
            graph = self.recorder.graph
            with graph.inserting_before(next(iter(graph.nodes))):
                self.modes[path] = self.recorder.add("call_module", path, (), {})
        return self.modes[path]

    def _own_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records F.batch_norm of a norm's own state, mode and eps as a call of that layer."""
        m: Any = self.stack[-1]
        if not isinstance(m, _NormBase):
            return NotImplemented
        names = [
            "input",
            "running_mean",
            "running_var",
            "weight",
            "bias",
            "training",
            "momentum",
            "eps",
        ]
        given: dict[str, Any] = {"weight": None, "bias": None, "eps": 1e-5}
        given |= {**dict(zip(names, args, strict=False)), **kwargs}
        own = [m._parameters.get(n, m._buffers.get(n)) for n in names[1:5]]
        if any(given[n] is not mine for n, mine in zip(names[1:5], own, strict=True)):
            return NotImplemented
        flag = isinstance(given.get("training"), ModeFlag)
        if given["eps"] != m.eps or not (flag or self.asked.times > self.norm_asked):
            return NotImplemented
        path = self.paths[id(m)]
        self.plain_norms.add(path)
        self.asked.times = self.norm_asked  # the norm's own `if self.training` does not count
        recorder = self.recorder
        node = recorder.add("call_module", path, (recorder.argument(given["input"]),), {})
        result = F.batch_norm(given["input"], own[0], own[1], own[2], own[3], False, 0.0, m.eps)
        return recorder.bind(result, node)


class State:
    """What a forward may change: the attributes of its modules, and the lists and dicts it gets.

    Layers of torch.nn do not change in eval mode."""

    def __init__(self, module: nn.Module, arguments: Any) -> None:
        self.module = module
        self.attributes = Attributes(m for m in plain_modules(module) if not is_layer(m))
        self.arguments = Contents(arguments)

    def restore(self) -> None:
        self.attributes.restore()
        self.arguments.restore()


def _itself(node: fx.Node) -> fx.Node:
    return node


def _names(root: nn.Module) -> dict[int, str]:
    """The path of every parameter, buffer and other tensor of a model, by id."""
    names: dict[int, str] = {}
    modules = list(root.named_modules())
    for table in ("_parameters", "_buffers", "__dict__"):
        for path, module in modules:
            for name, value in getattr(module, table).items():
                if isinstance(value, Tensor):
                    names.setdefault(id(value), f"{path}.{name}" if path else name)
    return names


def _argument_names(root: nn.Module, count: int) -> list[str]:
    """The names of the first `count` positional arguments of the root's forward."""
    names: list[str] = []
    for p in inspect.signature(root.forward).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            names += [f"{p.name}_{i}" for i in range(count - len(names))]
        elif p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            names.append(p.name)
    if len(names) < count:
        raise Untraceable(f"its forward takes {len(names)} arguments, not {count}")
    return names[:count]


def is_mode(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).rpartition(".")[2] == MODE


def _shared(node: fx.Node) -> bool:
    """Whether a node is no step of a forward: a weight, a mode or a guard."""
    return node.op == "get_attr" or is_mode(node) or is_guard(node)


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return textwrap.shorten(text[0], 160, placeholder=" …") if text else type(error).__name__
