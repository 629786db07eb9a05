"""Recorder: writes down what a model's own Python does to tensors while it runs on an example.

    y = F.relu(x) + x[:, :1]      runs as always, and leaves     relu(x), getitem(x, ...), add(., .)

Every value is a plain tensor. The recorder knows which node each tensor came from, so a size, a
dtype and a type are what they are, and `isinstance`, `len` and libraries work. Only the entries of
a tensor that depends on the input are out of reach: code that looks at them raises `Untraceable`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from repfx.capture.origins import Origins
from repfx.capture.structures import leaves, parts, tensors_in
from repfx.capture.symbols import Integer, Real, Symbol, plain, symbol
from repfx.graph.effects import writes_by_name
from repfx.graph.guards import holds, in_words
from repfx.graph.modes import ModeFlag
from repfx.graph.traits import Trait
from repfx.graph.vocabulary import kind_of


class Untraceable(Exception):
    """The forward does something that a graph cannot express; the text says what."""


class Depends(IntEnum):
    """What the value of a node depends on."""

    NOTHING = 0  # weights and constants only
    SIZES = 1
    DATA = 2


# Methods that say something about a tensor, whatever its entries are.
_ABOUT = frozenset(
    """dim ndimension is_floating_point is_complex is_signed is_contiguous get_device element_size
    stride storage_offset type is_pinned is_shared is_inference has_names data_ptr untyped_storage
    __hash__ __repr__ __str__ __format__ is_same_size __dir__ register_hook requires_grad_
    retain_grad""".split()  # noqa: SIM905
)
_VALUES = ("T", "mT", "H", "mH", "real", "imag")
_REFLECTED = {"rdiv": operator.truediv, "ror": operator.or_, "rand": operator.and_}
_SIGNS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}
_SIGNS |= {f"{name}_": getattr(operator, f"i{f.__name__}") for name, f in _SIGNS.items()}
_LEAST = (type(None), bool, int, float, complex, str, type(Ellipsis), torch.layout)
_PLAIN = (*_LEAST, torch.memory_format, torch.dtype, torch.device)

_BASES: dict[type, Any] = {
    int: int.__int__,
    float: float.__float__,
    complex: complex.__complex__,
    str: str.__str__,
}


def _printed(value: Any) -> Any:
    """A number or string as code can print it: one of a class of its own is of the class below.

    Such as numpy's numbers of 64 bits and members of an IntEnum or StrEnum."""
    if type(value) in _LEAST:
        return value
    return next((cut(value) for base, cut in _BASES.items() if isinstance(value, base)), value)


class Recorder(TorchFunctionMode):
    """The graph of what runs while this mode is on.

    `names`: the path of each parameter, buffer and other tensor of the model, by id. `constants`
    are tensors from elsewhere that the forward used, by the name of their node."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.names = names
        self.paused = 0
        self.scope: list[tuple[str, type]] = []
        self.constants: dict[str, Tensor] = {}
        self.depends: dict[fx.Node, Depends] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._origins = Origins(self.shapes, lambda node: self.module_of(node))
        self.held: set[fx.Node] = set()  # nodes that may share memory with a tensor of the model
        # The first node of the memory that a node may share, and what was written there.
        self._memory: dict[fx.Node, fx.Node] = {}
        self._written: dict[fx.Node, Depends] = {}
        self.mode_node: Callable[[ModeFlag], fx.Node | bool] = lambda flag: NotImplemented
        self.answer: Callable[[ModeFlag], bool] = lambda flag: False
        self.paths: dict[int, str] = {}  # of the model's modules, by id
        self.module_of: Callable[[fx.Node], nn.Module | None] = lambda node: None
        self.special: dict[Any, Callable[..., Any]] = {}  # functions that are recorded otherwise
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._rebound: list[tuple[int, tuple[weakref.ref[Tensor], fx.Node], fx.Node]] = []
        self._wholes: dict[int, tuple[Any, list[int], fx.Node]] = {}
        self._read: dict[str, fx.Node] = {}
        # (of an input?, dtype or device that was read): whose, the last at the end
        self._asked: dict[Any, list[fx.Node]] = {}
        self.measured = False  # whether the forward read a size
        self._of_weights = False
        self._known: dict[fx.Node, int] = {}
        self._facts: dict[str, fx.Node] = {}

    # ---- what runs --------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if func in self.special:
            done = self.special[func](args, kwargs)
            if done is not NotImplemented:
                return done
        if name == "__get__":
            return self._attribute(func, func.__self__.__name__, args[0])
        if name == "__set__":
            return self._assign(func, args)
        if name in ("size", "__len__", "numel", "nelement") and self._of(args[0]) > 0:
            return self._measure(name, args, kwargs)
        if name == "__iter__" and self._of(args[0]) > 0:
            return iter(args[0].unbind(0))
        self._refuse_writes(name, args, kwargs)
        result = func(*self.bare(args), **self.bare(kwargs))
        if name in _ABOUT and not tensors_in(result):
            return result
        if tensors_in(result) or name == "__setitem__":
            return self._record(func, name, args, kwargs, result)
        if result is None or func is torch._C._set_grad_enabled:
            return result
        self._look(name, args, kwargs)
        return result

    def bare(self, value: Any) -> Any:
        """Arguments without symbols and flags, for the functions that run."""
        if isinstance(value, (Integer, Real)):
            return plain(value)
        if isinstance(value, ModeFlag):
            return self.answer(value)
        kind = type(value)
        if kind in (tuple, list):
            return kind(map(self.bare, value))
        if kind is torch.Size:
            return torch.Size(map(self.bare, value))
        if isinstance(value, dict):
            return {k: self.bare(v) for k, v in value.items()} if kind is dict else value
        if kind is slice:
            return slice(*map(self.bare, (value.start, value.stop, value.step)))
        return value

    def _attribute(self, func: Any, name: str, tensor: Tensor) -> Any:
        value = func(tensor)
        level = self._of(tensor)
        if name == "shape" and level > 0:
            return torch.Size(self._sizes(tensor))
        if name in ("dtype", "device"):
            self._asked.setdefault((level > 0, value), []).append(self.node_of(tensor))
            return value
        if name == "data":
            return self._record(torch.Tensor.detach, "detach", (tensor,), {}, tensor.detach())
        if name in _VALUES:
            node = self.add("call_function", getattr, (self.node_of(tensor), name), {})
            return self.bind(fresh(value, (tensor,)), node)
        return value

    def _assign(self, func: Any, args: tuple[Any, ...]) -> Any:
        if func.__self__.__name__ != "requires_grad":
            raise Untraceable(f"it assigns to the attribute {func.__self__.__name__} of a tensor")
        return func(*args)

    def _record(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        op, target, ordered = spelling(func, name, args, bool(kwargs))
        given = tensors_in([*args, *kwargs.values()])
        # A dtype of its own: that of an input has no place in an expression of weights.
        self._of_weights = bool(given) and all(self._of(t) is Depends.NOTHING for t in given)
        writes = writes_by_name(target, kwargs) or name == "__setitem__"
        node = self.add(op, target, self.argument(ordered), self.argument(kwargs))
        kind = kind_of(node)
        if Trait.RANDOM in kind.traits:
            self.depends[node] = Depends.DATA
        if writes:
            for t in tensors_in(kwargs.get("out", args[0] if args else None)):
                memory = self._memory.get(self.node_of(t), self.node_of(t))
                self._written[memory] = max(self._level(memory), self._level(node))
        # What is not fresh shares memory with its first argument: an index is not shared.
        shared = {self.node_of(t) for t in tensors_in(args[0])} if args else set()
        if Trait.FRESH not in kind.traits and self.held & shared:
            self.held.add(node)
        if name in ("unbind", "split"):
            self._count_pieces(name, args, kwargs)
        return self.bind(result if writes else fresh(result, (args, kwargs)), node)

    def _count_pieces(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records as a fact how many pieces Python gets, where a size says it."""
        rest = dict(zip(("dim",) if name == "unbind" else ("each", "dim"), args[1:], strict=False))
        each = rest.get("each", kwargs.get("split_size_or_sections", kwargs.get("split_size", 1)))
        tensor: Any = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        axis = self.bare(rest.get("dim", kwargs.get("dim", 0))) % tensor.dim()
        if axis == 1 and tensor.dim() > 3:
            return  # channels of images, as many as the weights say: nothing between layers asks
        count: Any = self._sizes(tensor)[axis]
        if isinstance(count, Integer) and isinstance(each, int):
            count = count if each == 1 else (count + each - 1) // each
            self.fact(count, "==", plain(count))

    def _refuse_writes(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name != "__setitem__" and not writes_by_name(name, kwargs):
            return
        written = kwargs.get("out", args[0] if args else None)
        if self.held & {self.node_of(t) for t in tensors_in(written)}:
            raise Untraceable(f"it changes a parameter or buffer in place ({name.strip('_')})")

    def _look(self, name: str, args: Any, kwargs: Any) -> None:
        """Python is about to see entries of these tensors."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        level = max((self._of(t) for t in given), default=Depends.NOTHING)
        if level is Depends.DATA:
            raise Untraceable(f"its Python reads the entries of a tensor ({name.strip('_')})")
        if level is Depends.SIZES:
            for t in given:
                self._fix(t)

    def _fix(self, tensor: Tensor) -> None:
        """Records as a fact the number that a tensor holds, as in `mask.all()`.

        Of a larger one, all sizes that it is computed from."""
        node = self.node_of(tensor)
        if tensor.numel() == 1:
            self.paused += 1
            value = tensor.item()
            self.paused -= 1
            self.fact_of(node, "==", value)
            return
        seen, todo = {node}, [node]
        while todo:
            at = todo.pop()
            if at.target in ("size", "numel"):
                self.fact_of(at, "==", self._known[at])
                continue
            for n in at.all_input_nodes:
                if n not in seen:
                    seen.add(n)
                    todo.append(n)

    # ---- sizes ------------------------------------------------------------------------------

    def _measure(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if name == "__len__":
            return self._sizes(tensor)[0]
        if name == "size":
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            sizes = self._sizes(tensor)
            return torch.Size(sizes) if axis is None else sizes[self.bare(axis)]
        self.measured = True
        node = self.node_of(tensor)
        return symbol(tensor.numel(), self, lambda: self._size_node(node, "numel", ()))

    def _sizes(self, tensor: Tensor) -> list[Any]:
        self.measured = True
        node, found = self.node_of(tensor), []
        for axis, size in enumerate(tensor.shape):
            source = self.origin_of(node, axis)
            if isinstance(source, fx.Node):
                # Never between a convolution and its norm: they could not merge.
                source = source if source.op == "placeholder" else node
                size = symbol(size, self, partial(self._size_node, source, "size", (axis,)))
            found.append(size)
        return found

    def origin_of(self, node: fx.Node, axis: int) -> fx.Node | int:
        return self._origins.of(node, axis % len(self.shapes[node]))

    def _size_node(self, of: fx.Node, method: str, rest: tuple[int, ...]) -> fx.Node:
        key = f"{of.name}.{method}{rest}"
        if key not in self._read or self._read[key]._erased:
            made = self.add("call_method", method, (of, *rest), {})
            self.depends[made] = Depends.SIZES
            shape = torch.Size(self.shapes[of])
            self._known[made] = shape[rest[0]] if rest else shape.numel()
            self._read[key] = made
        return self._read[key]

    def operation(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        """The node of an operation on numbers, some of them symbols."""
        node = self.add("call_function", function, self.argument(args), {})
        self.depends[node] = Depends.SIZES
        return node

    def fact(self, left: Any, relation: str, right: Any) -> None:
        """Records what a decision of the model's Python, or a number it needed, rests on."""
        if not self.paused:
            self.fact_of(self.argument(left), relation, self.argument(right))

    def fact_of(self, left: Any, relation: str, right: Any) -> None:
        text = f"{in_words(left)} {relation} {in_words(right)}"
        if left is right or (text in self._facts and not self._facts[text]._erased):
            return
        where = self.scope[-1][0] if self.scope else ""
        words = f"{text} ({where})" if where else text
        args = (left, relation, right, words)
        self._facts[text] = self.add("call_function", holds, args, {})

    # ---- nodes ------------------------------------------------------------------------------

    def add(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        levels = [self._level(n) for n in node.all_input_nodes]
        data = op in ("placeholder", "call_module")
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and Trait.FRESH not in kind_of(node).traits:
            self._memory[node] = self._memory.get(first, first)
        self.depends[node] = Depends.DATA if data else max(levels, default=Depends.NOTHING)
        if self.scope:
            node.meta["nn_module_stack"] = {path: (path, cls) for path, cls in self.scope}
        return node

    def bind(self, value: Any, node: fx.Node) -> Any:
        """Notes that this value, with all tensors inside, is what the node returns."""
        if isinstance(value, Tensor):
            before = self._nodes.get(id(value))
            if before is not None and before[0]() is value:  # changed in place
                self._rebound.append((id(value), before, node))
            self._nodes[id(value)] = (weakref.ref(value), node)
            self.paused += 1  # reading the size here is not the model's doing
            self.shapes[node] = node.meta["shape"] = tuple(value.shape)
            node.meta["dtype"] = value.dtype
            self.paused -= 1
        else:
            for key, part, read in parts(value):
                if tensors_in(part):
                    self.bind(part, self.add("call_function", read, (node, key), {}))
        return value

    def bind_whole(self, value: Any, node: fx.Node) -> Any:
        """As `bind`. A structure that is passed on unchanged is the node itself.

        What a module returns in training may have other parts."""
        if not isinstance(value, Tensor):
            self._wholes[id(value)] = (value, _identities(value), node)
        return self.bind(value, node)

    def _whole(self, value: Any) -> fx.Node | None:
        held, known, node = self._wholes.get(id(value), (None, None, None))
        same = held is value and value is not None and known == _identities(value)
        return node if same and node is not None and not node._erased else None

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor. One that no node returned is a constant."""
        held, node = self._nodes.get(id(tensor), (None, None))
        if node is not None and held is not None and held() is tensor and not node._erased:
            return node
        name = self.names.get(id(tensor))
        if name is None:
            name = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name, (), {})
        self.depends[node] = Depends.NOTHING
        self.held.add(node)
        self.bind(tensor, node)
        return node

    def _of(self, value: Any) -> Depends:
        if not isinstance(value, Tensor):
            return Depends.NOTHING
        return self._level(self.node_of(value))

    def _level(self, node: fx.Node) -> Depends:
        """What the value of a node depends on now; others may have written into its memory."""
        written = self._written.get(self._memory.get(node, node), Depends.NOTHING)
        return max(self.depends.get(node, Depends.NOTHING), written)

    def argument(self, value: Any) -> Any:
        """A value as an argument of a node. Raises Untraceable if a graph cannot hold it."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, Symbol):  # one of an earlier trace, from a cache, is just a number
            return value.node if value.recorder is self else plain(value)
        if isinstance(value, ModeFlag):
            return self.mode_node(value)
        if isinstance(value, (torch.dtype, torch.device)):
            asked = self._asked.get((not self._of_weights, value), [])
            while asked and asked[-1]._erased:
                asked.pop()
            name = "dtype" if isinstance(value, torch.dtype) else "device"
            return self._described(asked[-1], name) if asked else value
        if isinstance(value, _PLAIN):
            return _printed(value)
        if (whole := self._whole(value)) is not None:
            return whole
        if isinstance(value, (list, tuple)):
            made = [self.argument(v) for v in value]
            named = hasattr(value, "_fields")
            return type(value)(*made) if named else made if isinstance(value, list) else tuple(made)
        if type(value) is dict:
            return {k: self.argument(v) for k, v in value.items()}
        if isinstance(value, dict) and not is_dataclass(value):  # such as an OrderedDict
            held = {k: self.argument(v) for k, v in value.items()}
            return self.add("call_function", type(value), (held,), {})
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        if isinstance(value, range):
            return [self.argument(v) for v in value]
        if is_dataclass(value) and not isinstance(value, type):
            given = {f.name: self.argument(getattr(value, f.name)) for f in fields(value)}
            return self.add("call_function", type(value), (), given)
        if id(value) in self.paths:  # a module, for a leaf that calls it
            return self.graph.create_node("get_attr", self.paths[id(value)], (), {})
        if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a number of numpy
            return value.item()
        raise Untraceable(f"it passes on a {type(value).__name__}, which a graph cannot hold")

    def _described(self, node: fx.Node, name: str) -> fx.Node:
        key = f"{node.name}.{name}"
        if key not in self._read or self._read[key]._erased:
            self._read[key] = self.add("call_function", getattr, (node, name), {})
            if self.depends[node] is not Depends.NOTHING:
                self.depends[self._read[key]] = Depends.SIZES
        return self._read[key]

    def forget_after(self, mark: fx.Node | None, keep: Iterable[fx.Node] = ()) -> None:
        """Erases the nodes that were recorded after `mark`, but those to keep."""
        for node in reversed(self.graph.nodes):
            if node is mark:
                break
            if node.op != "placeholder" and not node.users and node not in keep:
                self.graph.erase_node(node)
                self.held.discard(node)
        while self._rebound and self._rebound[-1][2]._erased:
            key, before, _ = self._rebound.pop()
            self._nodes[key] = before


def spelling(
    func: Any, name: str, args: tuple[Any, ...], named: bool
) -> tuple[str, Any, tuple[Any, ...]]:
    """How a node calls this function: op, target and arguments.

    `named`: whether there are arguments by name too."""
    if name.startswith("__") and name.endswith("__"):
        core = name.strip("_")
        direct = getattr(operator, core, None) or getattr(operator, f"{core}_", None)
        if direct is not None:
            return "call_function", direct, args
        function = _REFLECTED.get(core) or getattr(operator, core[1:])
        return "call_function", function, (args[1], args[0])
    if name in _SIGNS and len(args) == 2 and not named:  # x + y and x.add(y) are one function
        return "call_function", _SIGNS[name], args
    of_tensor = getattr(func, "__qualname__", "").startswith(("Tensor.", "TensorBase."))
    if of_tensor or getattr(torch.Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


def _identities(value: Any) -> list[int]:
    return [id(v) for v in leaves(value)]


def fresh(result: Any, given: Any) -> Any:
    """The result, as a tensor object of its own where it is one of the arguments.

    Two values that are one object now, as in a dropout that is off, may differ in training."""
    if type(result) in (list, tuple):
        return type(result)(fresh(v, given) for v in result)
    same = isinstance(result, Tensor) and any(t is result for t in tensors_in(given))
    return torch.ops.aten.alias.default(result) if same else result
