"""Layers called from Python as people write it: sizes, containers, keywords, modes, shared modules.

Each way of writing gives a linear map of its steps, so what is inside may merge."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.testing.convolutions import CONV, NORM
from repfx.testing.plan import Draft, Recipe

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    """What a model of a library returns: values by name, some of them missing."""

    last: Tensor
    hidden: tuple[Tensor, ...] = ()
    loss: Tensor | None = None


class Step(nn.Module):
    """A layer with optional arguments, which may also note its result in a list it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        *,
        scale: float = 1.0,
        skip: Tensor | None = None,
        seen: list[Tensor] | None = None,
        **switches: bool,
    ) -> Tensor:
        y: Tensor = self.layer(x)
        if scale != 1.0:
            y = y * scale
        if skip is not None and not switches.get("alone", False):
            y = y + skip
        if seen is not None:
            seen.append(y)
        return y


class Written(nn.Module):
    """Steps that keep the shape, called in one `way` of writing it."""

    def __init__(self, way: str, steps: list[nn.Module], channels: int, axes: int) -> None:
        super().__init__()
        self.way, self.channels, self.axes = way, channels, axes
        self.steps = nn.ModuleList(map(Step, steps))
        self.seen: list[Tensor] = []
        self.table: Tensor | None = None
        self.scale = nn.Parameter(torch.ones(channels, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way](self, x)

    def first(self, x: Tensor) -> Tensor:
        y: Tensor = self.steps[0](x)
        return y

    def features(self, x: Tensor) -> Iterator[Tensor]:
        for step in self.steps:
            x = step(x)
            yield x

    def extra_repr(self) -> str:
        return self.way


def _sizes_checked(m: Written, x: Tensor) -> Tensor:
    n, c, *sizes = x.shape
    assert c == m.channels, f"{m.channels} channels, not {c}"
    if x.dim() != m.axes + 2 or min(sizes) < 1:
        raise ValueError("not an image")
    rows = m.first(x).movedim(1, -1).contiguous().view(n, -1)  # a view reads the layout
    return rows.view(n, -1, c).transpose(1, 2).reshape(n, c, *sizes)


def _sizes_flattened(m: Written, x: Tensor) -> Tensor:
    y = m.first(x)
    tokens = y.flatten(2).transpose(1, 2)
    assert tokens.shape[1] == math.prod(y.shape[2:])
    return tokens.transpose(1, 2).view(y.size(0), -1, *y.size()[2:])


def _odd_sizes_padded(m: Written, x: Tensor) -> Tensor:
    sides = [side for s in reversed(x.shape[2:]) for side in (0, s % 2)]
    if any(sides):
        x = F.pad(x, sides)
    return m.first(x)


def _large_images_cropped(m: Written, x: Tensor) -> Tensor:
    y = m.first(x)
    return y[:, :, 1:] if y.shape[2] > 9 and y.shape[-1] > 5 else y


def _positions_added(m: Written, x: Tensor) -> Tensor:
    width = x.shape[-1]
    ramp = torch.arange(width, dtype=x.dtype, device=x.device) / max(width, 1)
    return m.first(x) + ramp.view(*(1,) * (x.dim() - 1), -1)


def _table_kept(m: Written, x: Tensor) -> Tensor:
    if m.table is None or m.table.shape[1:] != x.shape[1:]:
        m.table = torch.full((1, *x.shape[1:]), 0.25, dtype=x.dtype)
    return m.first(x) + m.table


def _resized_to_another(m: Written, x: Tensor) -> Tensor:
    half: Any = [max(s // 2, 1) for s in x.shape[2:]]
    small = F.adaptive_avg_pool2d(x, half) if m.axes == 2 else x
    return m.first(F.interpolate(small, size=x.shape[2:], mode="nearest") + x)


def _list_of_values(m: Written, x: Tensor) -> Tensor:
    values = [x]
    for i, step in enumerate(m.steps):
        values.append(step(values[-1]) if i % 2 == 0 else step(values[i]) + values[i])
    total = values.pop()
    while values:
        total = total + values.pop(0)
    return total


def _dict_of_values(m: Written, x: Tensor) -> Tensor:
    values: OrderedDict[str, Tensor] = OrderedDict(x=x)
    for i, step in enumerate(m.steps):
        values[f"step{i}"] = step(next(reversed(values.values())))
    values.update(x=values["x"] * 0.5)
    kept = {k: v for k, v in values.items() if k != "step1"}
    return functools.reduce(lambda a, b: a + b, kept.values())


def _named_results(m: Written, x: Tensor) -> Tensor:
    pair = Pair(m.first(x), second=x)
    out = Output(pair.first, hidden=(pair.second, *pair))
    assert out.loss is None and len(out.hidden) == 3
    return out.last - 0.5 * out.hidden[0]


def _generated(m: Written, x: Tensor) -> Tensor:
    *_, before, last = (x, *m.features(x))
    return last + before


def _written_into_a_list(m: Written, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    for step in m.steps:
        x = step(x, seen=seen)
    seen[0] = seen[0] * 0.5
    return sum(seen[1:], seen[0])


def _written_into_its_own_list(m: Written, x: Tensor) -> Tensor:
    m.seen.clear()
    y = x
    for step in m.steps:
        y = step(y, seen=m.seen)
    return y + m.seen[0]


def _keywords(m: Written, x: Tensor) -> Tensor:
    options: dict[str, Any] = {"scale": 0.5, "skip": x}
    y = m.first(x)
    for step in m.steps[1:]:
        y = step(x=y, **options, alone=len(m.steps) > 2)
    return y


def _in_another_order(m: Written, x: Tensor) -> Tensor:
    for i in range(len(m.steps) - 1, -1, -1):
        x = m.steps[i](x)
    return x


def _cut_and_reversed(m: Written, x: Tensor) -> Tensor:
    for step in [*m.steps[1:], *reversed(m.steps[:1])]:
        x = step(x) if isinstance(step, Step) else x
    return x


def _one_called_twice(m: Written, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.steps[-1](m.steps[-1](y)) if len(m.steps) > 1 else y + m.first(y)


def _inside_of_modules(m: Written, x: Tensor) -> Tensor:
    layer: Any = m.steps[0].layer
    inner = [child for child in layer.children() if not isinstance(child, nn.Identity)]
    for child in inner or [layer]:
        x = child(x)
    return x


def _by_name(m: Written, x: Tensor) -> Tensor:
    for name, step in m.steps.named_children():
        x = getattr(m.steps, name)(x) if hasattr(step, "layer") else x
    return torch.mul(x, other=m.scale)


def _other_in_training(m: Written, x: Tensor) -> Tensor:
    y = m.first(x)
    if m.training:
        keep = y.new_empty((y.shape[0], *(1,) * (y.dim() - 1))).bernoulli_(0.5)
        y = y * keep
    return y + x


def _one_step_in_training_only(m: Written, x: Tensor) -> Tensor:
    y = m.first(x)
    for step in m.steps[1:]:
        y = step(y) if m.training else step(y) + y
    return y


def _returns_early(m: Written, x: Tensor) -> Tensor:
    y = m.first(x)
    if not m.training:
        return y
    return F.dropout(y, 0.1, training=m.training)


def _tries(m: Written, x: Tensor) -> Tensor:
    try:
        return m.steps[7](x)  # type: ignore[no-any-return]
    except IndexError:
        return m.first(x)


def _entries_read(m: Written, x: Tensor) -> Tensor:
    y = m.first(x)
    with torch.no_grad():
        large = float(y.abs().max()) > 1e6
    return y if large else y + x


def _recomputed(m: Written, x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    y: Tensor = checkpoint(m.first, x, use_reentrant=False)
    return y


def _recursive(m: Written, x: Tensor, depth: int = 0) -> Tensor:
    return x if depth == len(m.steps) else _recursive(m, m.steps[depth](x), depth + 1)


WAYS: dict[str, Callable[[Written, Tensor], Tensor]] = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        *(_sizes_checked, _sizes_flattened, _odd_sizes_padded, _large_images_cropped),
        *(_positions_added, _table_kept, _resized_to_another),
        *(_list_of_values, _dict_of_values, _named_results, _generated),
        *(_written_into_a_list, _written_into_its_own_list, _keywords),
        *(_in_another_order, _cut_and_reversed, _one_called_twice, _inside_of_modules, _by_name),
        *(_other_in_training, _one_step_in_training_only, _returns_early, _tries),
        *(_entries_read, _recomputed, _recursive),
    )
}


def _step(d: Draft, channels: int) -> nn.Module:
    """A convolution that keeps the shape, perhaps with a norm."""
    k = d.one(1, 3, 3)
    bias = d.odds(0.4)
    layer = CONV[d.axes](channels, channels, k, padding=k // 2, bias=bias)
    return nn.Sequential(layer, NORM[d.axes](channels)) if d.odds(0.6) else layer


def written(way: str) -> Callable[[Draft, int], int]:
    def draw(d: Draft, a: int) -> int:
        channels = d.channels(a)
        steps = [_step(d, channels) for _ in range(d.one(1, 2, 3))]
        return d.add(Written(way, steps, channels, d.axes), a)

    return draw


RECIPES = {f"python: {way}": Recipe(written(way), 0.35) for way in WAYS}
