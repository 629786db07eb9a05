"""What a node calls, with the arguments of the operator, however the call is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from repfx.graph.ops import Ref
from repfx.graph.traits import Trait
from repfx.graph.vocabulary import UNKNOWN, Kind, kind_of


@dataclass(frozen=True)
class Call:
    """A call of a known operator. `args` and `kwargs` are arguments of the rule of its kind."""

    kind: Kind
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def traits(self) -> Trait:
        return self.kind.of_call(self.args, self.kwargs)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that a node calls. Its weight may be quantized.

    `x` is its input. `weight` and `bias` are nodes, or paths if the node calls a module. `path` is
    the module that owns the weight, "" if the weight is computed. `rest` has the other arguments by
    name: stride, padding, ..."""

    node: fx.Node
    kind: Kind
    x: fx.Node
    weight: Ref
    bias: Ref | None
    path: str
    rest: dict[str, Any]

    @property
    def channel_axis(self) -> int:
        """The channel axis of its output."""
        return -1 if self.kind.name == "linear" else 1


def call_of(node: fx.Node, module: nn.Module | None = None) -> Call | None:
    """What a node calls, or None if the vocabulary does not know it.

    `module`: the module that a call_module node calls."""
    kind, args, kwargs = kind_of(node, module), node.args, dict(node.kwargs)
    if kind is UNKNOWN:
        return None
    if module is not None and kind.leaf is not None:
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], fx.Node):
            return None
        return Call(kind, inputs, kind.leaf.arguments(str(node.target), module))
    if "self" in kwargs:  # what functions call `input` is `self` in aten
        kwargs["input"] = kwargs.pop("self")
    return Call(kind, args, kwargs)


def layer_of(node: fx.Node, module: nn.Module | None = None) -> Layer | None:
    """The convolution or linear layer that a node calls, or None."""
    call = call_of(node, module)
    if call is None or Trait.LAYER not in call.kind.traits:
        return None
    try:
        given = call.kind.bound(call.args, call.kwargs)
    except TypeError:
        return None
    x, weight, bias = (given.pop(name) for name in ("input", "weight", "bias"))
    if not isinstance(x, fx.Node) or not isinstance(weight, Ref):
        return None
    held = isinstance(weight, str) or weight.op == "get_attr"
    named = str(weight.target if isinstance(weight, fx.Node) else weight)
    return Layer(node, call.kind, x, weight, bias, named.rpartition(".")[0] if held else "", given)
