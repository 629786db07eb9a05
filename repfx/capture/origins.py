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


class Origins:
    """Finds where sizes come from. `shapes` are those of the values on the example."""

    def __init__(self, shapes: Shapes, module_of: Callable[[fx.Node], nn.Module | None]) -> None:
        self._shapes, self._module_of = shapes, module_of
        self._known: dict[tuple[fx.Node, int], fx.Node | int] = {}

    def of(self, node: fx.Node, axis: int) -> fx.Node | int:
        """A value with the same size along this axis, as early as it is sure; or the size itself.

        A walk with a list of its own: a model may have thousands of sums, one behind another."""
        todo, known = [node], self._known
        while todo:
            at = todo[-1]
            found = self._size(at, axis)
            inputs = [] if found is not None else self._same_along(at, axis)
            missing = [n for n in inputs if (n, axis) not in known]
            if missing and (at, axis) not in known:
                todo += missing
                continue
            if (at, axis) not in known:
                sources = [known[n, axis] for n in inputs]
                known[at, axis] = found if found is not None else _common(sources, at, axis)
            todo.pop()
        return known[node, axis]

    def _size(self, node: fx.Node, axis: int) -> int | None:
        """The size, if it is one for all inputs of the model: that of a weight, or of channels."""
        shape, name = self._shapes[node], kind_of(node, self._module_of(node)).name
        channel = len(shape) - 1 if name == "linear" else 1
        fixed = axis == channel and name in _CHANNELS_FIXED and len(shape) > 1
        return shape[axis] if fixed or node.op == "get_attr" else None

    def _same_along(self, node: fx.Node, axis: int) -> list[fx.Node]:
        """The inputs of an operator that all have the same size along this axis as its output."""
        shapes, kind = self._shapes, kind_of(node, self._module_of(node))
        inputs = [n for n in node.all_input_nodes if n in shapes]
        if not inputs or len(shapes[inputs[0]]) != len(shapes[node]):
            return []
        plain = kind.traits & _ELEMENTWISE or kind.name in ("bn", "dropout")
        images = kind.name in _IMAGES and axis < 2 and (axis == 0 or "conv" not in kind.name)
        if plain or images or (kind.name == "linear" and axis == 0):
            return inputs[:1]
        if kind.name not in _SUMS or any(len(shapes[n]) != len(shapes[node]) for n in inputs):
            return []
        spread = [n for n in inputs if n.op != "get_attr" or shapes[n][axis] != 1]
        alike = all(shapes[n][axis] == shapes[node][axis] for n in spread)
        return sorted(spread) if alike else []


def _common(sources: list[fx.Node | int], node: fx.Node, axis: int) -> fx.Node | int:
    """The source of a value's size, given those of the values that are added to give it.

    A size of 1 may be broadcast. So the size of a weight decides, and that of two inputs of the
    model, or two numbers of images, may be either."""
    values = {s: None for s in sources if isinstance(s, fx.Node)}
    sizes = [s for s in sources if isinstance(s, int)]
    if sizes and (not values or max(sizes) > 1):
        return max(sizes)
    if not values or (
        len(values) > 1 and (axis == 0 or all(v.op == "placeholder" for v in values))
    ):
        return node
    return next(iter(values))
