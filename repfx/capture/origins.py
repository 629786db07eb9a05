"""Origins: the first value on the way from the input that has the size that was asked for.

    y = relu(bn(conv(x)))        y.size(0) is x.size(0), y.size(1) is 64 whatever x is

So a graph reads sizes from its inputs, where nothing that merges is in the way, and the number of
channels behind a layer is a number.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from repfx.graph.traits import Trait
from repfx.graph.vocabulary import kind_of

_CHANNELS_FIXED = ("conv", "conv_transpose", "bn", "linear")
_ELEMENTWISE = Trait.ACTIVATION | Trait.SAME
_IMAGES = ("conv", "conv_transpose", "max_pool", "adaptive_max_pool", "avgpool", "average")
_SUMS = ("add", "sub", "mul", "div")

Shapes = dict[fx.Node, tuple[int, ...]]


def origin(
    node: fx.Node, axis: int, shapes: Shapes, module_of: Callable[[fx.Node], nn.Module | None]
) -> fx.Node | int:
    """A value with the same size along this axis, as early as it is sure; or the size itself."""
    while True:
        kind = kind_of(node, module_of(node))
        shape = shapes[node]
        channel = len(shape) - 1 if kind.name == "linear" else 1
        if axis == channel and kind.name in _CHANNELS_FIXED and len(shape) > 1:
            return shape[axis]
        before = _same_along(node, axis, shapes, kind.name, kind.traits)
        if before is None:
            return node
        node = before


def _same_along(
    node: fx.Node, axis: int, shapes: Shapes, name: str, traits: Trait
) -> fx.Node | None:
    """The input of an operator that has the same size along this axis for every input."""
    inputs = [n for n in node.all_input_nodes if n in shapes]
    if not inputs or any(len(shapes[n]) != len(shapes[node]) for n in inputs[:1]):
        return None
    first = inputs[0]
    plain = traits & _ELEMENTWISE or name in ("bn", "dropout")
    images = name in _IMAGES and axis < 2 and (axis == 0 or "conv" not in name)
    if plain or images or (name == "linear" and axis == 0):
        return first
    if name in _SUMS and len(inputs) == 2 and shapes[inputs[0]] == shapes[inputs[1]]:
        return min(inputs)  # the earlier one
    return None
