"""What a node calls, with the operator's own arguments, whichever way it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from repfx.graph.ops import Ref
from repfx.graph.traits import Trait
from repfx.graph.vocabulary import UNKNOWN, Kind, kind_of


@dataclass(frozen=True)
class Call:
    """A call that the vocabulary knows: `args` and `kwargs` are those of the kind's rule."""

    kind: Kind
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def traits(self) -> Trait:
        return self.kind.of_call(self.args, self.kwargs)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as a node calls it, its weight quantized or not.

    `x` is what it reads. `weight` and `bias` are nodes, or paths where a module is called. `path`
    is where the weight lives, "" where it is computed. `rest` are the other arguments by name:
    stride, padding, ..."""

    node: fx.Node
    kind: Kind
    x: fx.Node
    weight: Ref
    bias: Ref | None
    path: str
    rest: dict[str, Any]

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in what it gives."""
        return -1 if self.kind.name == "linear" else 1


def call_of(node: fx.Node, module: nn.Module | None = None) -> Call | None:
    """What a node calls; None where the vocabulary has no row. `module`: what a call_module node
    calls."""
    kind, args, kwargs = kind_of(node, module), node.args, dict(node.kwargs)
    if kind is UNKNOWN:
        return None
    if module is not None and kind.leaf is not None:
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], fx.Node):
            return None
        return Call(kind, inputs, kind.leaf.arguments(str(node.target), module))
    if "self" in kwargs:  # the name in aten of what functions call the input
        kwargs["input"] = kwargs.pop("self")
    return Call(kind, args, kwargs)


def layer_of(node: fx.Node, module: nn.Module | None = None) -> Layer | None:
    """The convolution or linear layer that a node calls; None where it calls none."""
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
