"""Operators on channels: cat, chunk, split, slices, shuffles and permutations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.testing.convolutions import NORM, again, conv, keeping, per_axis, plain_norm
from repfx.testing.plan import Draft, Recipe, Unfit

CATS: dict[str, Callable[..., Tensor]] = {
    "torch.cat(v, 1)": lambda *v: torch.cat(v, 1),
    "torch.cat(v, dim=1)": lambda *v: torch.cat(list(v), dim=1),
    "torch.concat(v, dim=-n)": lambda *v: torch.concat(v, dim=1 - v[0].dim()),
    "torch.cat(tensors=v, dim=1)": lambda *v: torch.cat(tensors=v, dim=1),
}


def cat(d: Draft, *values: int) -> int:
    text = d.one(*CATS)
    return d.call(text, CATS[text], *values)


def cat_any(d: Draft, a: int) -> int:
    """Concatenates 2 or 3 values of one spatial shape, from anywhere in the plan."""
    return cat(d, a, *(d.one(*d.like(a, spatial=True)) for _ in range(d.one(1, 1, 2))))


def cat_branches(d: Draft, a: int) -> int:
    """Concatenates branches of one value, perhaps with a 1x1 convolution or a norm after them."""
    branches = [size_kept(d, a) for _ in range(d.one(2, 2, 3))]
    if d.odds(0.3):
        branches[d.rng.randrange(len(branches))] = a
    y = cat(d, *branches)
    return d.do(
        lambda: y,
        lambda: conv(d, y, kernel_size=(1,) * d.axes, padding=0),
        lambda: plain_norm(d, y),
    )


def size_kept(d: Draft, a: int, same_channels: bool = False) -> int:
    """A convolution or norm that keeps the spatial sizes."""
    kernel, fixed = per_axis(d, 1, 1, 3), {"out": d.channels(a)} if same_channels else {}
    return d.do(
        lambda: conv(d, a, kernel_size=kernel, padding=keeping(kernel, (1,) * d.axes), **fixed),
        lambda: conv(d, a, kernel_size=kernel, padding=keeping(kernel, (1,) * d.axes), **fixed),
        lambda: d.add(NORM[d.axes](d.channels(a)), a),
    )


def sizes_of(d: Draft, channels: int) -> list[int]:
    """Sizes of two or three parts that add up to the channels."""
    cuts = sorted(d.rng.sample(range(1, channels), d.rng.randint(1, min(2, channels - 1))))
    return [b - a for a, b in zip([0, *cuts], [*cuts, channels], strict=True)]


def taken_apart(d: Draft, a: int) -> list[int]:
    """The pieces of a chunk or split."""
    c = d.channels(a)
    if c < 2:
        raise Unfit("one channel")
    n, sizes = d.rng.randint(2, min(c, 3)), sizes_of(d, c)
    ways: dict[str, Callable[[Tensor], Any]] = {
        f"v.chunk({n}, 1)": lambda v: v.chunk(n, 1),
        f"torch.chunk(v, {n}, dim=1)": lambda v: torch.chunk(v, n, dim=1),
        f"v.split({(c + 1) // 2}, dim=1)": lambda v: v.split((c + 1) // 2, dim=1),
        f"torch.split(v, {sizes}, dim=1)": lambda v: torch.split(v, sizes, dim=1),
        f"v.split({sizes}, 1)": lambda v: v.split(sizes, 1),
        f"torch.tensor_split(v, {n}, dim=1)": lambda v: torch.tensor_split(v, n, dim=1),
        "by slices": lambda v: (v[:, : sizes[0]], v[:, sizes[0] :]),
    }
    text = d.one(*ways)
    whole = d.call(text, ways[text], a)
    return [d.call(f"[{i}]", _item(i), whole) for i in range(len(d.values[whole]))]


def _item(i: int) -> Callable[[Any], Tensor]:
    return lambda v: v[i]


def pieces(d: Draft, a: int) -> int:
    """One piece of a value; the other pieces stay in the plan for later operators."""
    return d.rng.choice(taken_apart(d, a))


def pieces_joined(d: Draft, a: int) -> int:
    """Puts pieces through layers of their own and concatenates them, perhaps in another order."""
    parts = [p if d.odds(0.3) else size_kept(d, p) for p in taken_apart(d, a)]
    if d.odds(0.3):
        d.rng.shuffle(parts)
    return cat(d, *parts)


def pieces_added(d: Draft, a: int) -> int:
    parts = taken_apart(d, a)
    if len({d.channels(p) for p in parts}) > 1:
        return cat(d, *reversed(parts))
    return d.call(
        "sum",
        lambda *v: sum(v),
        *(p if d.odds(0.4) else size_kept(d, p, same_channels=True) for p in parts),
    )


def some_channels(d: Draft, a: int) -> int:
    c = d.channels(a)
    if c < 2:
        raise Unfit("one channel")
    first = d.rng.randrange(c - 1)
    n = d.rng.randint(1, c - first)
    some = d.rng.sample(range(c), d.rng.randint(1, c))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        f"v[:, {first}:{first + n}]": lambda v: v[:, first : first + n],
        f"v[:, {first + 1}:, ...]": lambda v: v[:, first + 1 :, ...],
        f"v[:, -{n}:]": lambda v: v[:, -n:],
        "v[:, ::2]": lambda v: v[:, ::2],
        f"v[:, {some}]": lambda v: v[:, some],
        f"torch.narrow(v, 1, {first}, {n})": lambda v: torch.narrow(v, 1, first, n),
        f"v.narrow(1, {first}, {n})": lambda v: v.narrow(1, first, n),
        f"v[:, {first}].unsqueeze(1)": lambda v: v[:, first].unsqueeze(1),
        f"v.select(1, {first}).unsqueeze(1)": lambda v: v.select(1, first).unsqueeze(1),
    }
    text = d.one(*ways)
    return d.call(text, ways[text], a)


def permuted(d: Draft, a: int) -> int:
    """A flip, or the channels in any order, some of them perhaps twice."""
    c = d.channels(a)
    order = d.rng.sample(range(c), c) if d.odds(0.8) else d.rng.choices(range(c), k=c)
    ways: dict[str, Callable[..., Tensor]] = {
        "v.flip(1)": lambda v: v.flip(1),
        "torch.flip(v, [1])": lambda v: torch.flip(v, [1]),
        f"v[:, {order}]": lambda v: v[:, order],
        f"v.roll({c // 2}, 1)": lambda v: v.roll(c // 2, 1),
    }
    if d.odds(0.5):
        index = torch.tensor(order)
        function = d.one(
            lambda v, w: v.index_select(1, w),
            lambda v, w: torch.index_select(v, 1, w),
            lambda v, w: v[:, w],
        )
        return d.add(IndexedBy(function, index), a)
    text = d.one(*ways)
    return d.call(text, ways[text], a)


class IndexedBy(nn.Module):
    """Selects channels with an index that is a buffer."""

    index: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], index: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.index)

    def extra_repr(self) -> str:
        return str(self.index.tolist())


def shuffled(d: Draft, a: int) -> int:
    c, n = d.channels(a), d.axes
    g = d.one(*(g for g in range(1, c + 1) if c % g == 0 and (g > 1 or c == 1)))
    spatial = tuple(range(3, n + 3))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        f"by view, {g}": _by_view(g, n),
        f"by sizes, {g}": _by_sizes(g),
        f"by shape, {g}": lambda v: (
            v.view(v.shape[0], g, c // g, *v.shape[2:]).transpose(1, 2).reshape(v.shape)
        ),
        f"by unflatten, {g}": lambda v: v.unflatten(1, (g, c // g)).transpose(1, 2).flatten(1, 2),
        f"by permute, {g}": lambda v: (
            v.unflatten(1, (g, -1)).permute(0, 2, 1, *spatial).flatten(1, 2)
        ),
        f"F.channel_shuffle(v, {g})": lambda v: F.channel_shuffle(v, g),
        f"torch.channel_shuffle(v, {g})": lambda v: torch.channel_shuffle(v, g),
    }
    text = d.one("layer", *ways)
    if n != 2 and text.startswith("by sizes"):
        raise Unfit("for images")
    return d.add(nn.ChannelShuffle(g), a) if text == "layer" else d.call(text, ways[text], a)


def _by_view(groups: int, axes: int) -> Callable[[Tensor], Tensor]:
    def shuffle(v: Tensor) -> Tensor:
        batch, channels, rest = v.size(0), v.size(1), [v.size(i) for i in range(2, axes + 2)]
        v = v.view(batch, groups, channels // groups, *rest)
        return torch.transpose(v, 1, 2).contiguous().view(batch, -1, *rest)

    return shuffle


def _by_sizes(groups: int) -> Callable[[Tensor], Tensor]:
    """A channel shuffle as ShuffleNet writes it."""

    def shuffle(v: Tensor) -> Tensor:
        batch, channels, height, width = v.size()
        v = v.reshape(batch, groups, channels // groups, height, width).permute(0, 2, 1, 3, 4)
        return v.reshape(batch, channels, height, width)

    return shuffle


def read_again(d: Draft, a: int) -> int:
    """Calls a layer of the plan on another value, and adds a second value of that shape."""
    y = again(d, a)
    others = [i for i in d.like(y) if i != y]
    return d.call("v + w", lambda v, w: v + w, y, d.rng.choice(others)) if others else y


RECIPES = {
    "cat": Recipe(cat_any, 1.2),
    "cat of branches": Recipe(cat_branches, 1.2),
    "pieces": Recipe(pieces),
    "pieces joined": Recipe(pieces_joined, 1.2),
    "pieces added": Recipe(pieces_added),
    "some channels": Recipe(some_channels, 1.5),
    "channels permuted": Recipe(permuted, 1.5),
    "channels shuffled": Recipe(shuffled, 1.8),
    "layer shared": Recipe(read_again, 1.8),
}
