"""Wiring: which axes of the input an axis of the output holds, for operators that are no maps.

    x.flatten(2).transpose(1, 2)      (N, C, H, W) -> (N, C, HW) -> (N, HW, C)

A scale and a shift per channel may move through every operator that treats all channels alike. The
functions below have the signatures of their operators, after `at`, which knows the input. They
return None for a call that this module cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

# The size of an axis: a number, or the node and the axis that have this size whatever the input is.
Size: TypeAlias = Any
Sizes: TypeAlias = tuple[Size | None, ...]


@dataclass(frozen=True)
class At:
    """What a call is applied to: a value of `rank` axes.

    `size` turns an argument into a Size, `sizes_of` a value or its shape into its sizes. Both give
    None where that is not known. `channels`: an axis and its size, if the caller knows one."""

    rank: int
    size: Callable[[Any], Size | None]
    sizes_of: Callable[[Any], Sizes | None]
    channels: tuple[int, int] | None = None


@dataclass(frozen=True)
class Wiring:
    """For each axis of the output, the axes of the input that it holds, in `sources`.

    Along `mixed` axes of the input, entries are averaged, picked or repeated. `ones` are axes of
    the output of size 1, `needs` axes of the input that must have size 1. `shifts`: a constant that
    is added to the input is added to the output."""

    sources: tuple[tuple[int, ...], ...]
    mixed: frozenset[int] = frozenset()
    ones: frozenset[int] = frozenset()
    needs: frozenset[int] = frozenset()
    shifts: bool = True


def same(at: At, *_: Any, **__: Any) -> Wiring:
    return Wiring(tuple((i,) for i in range(at.rank)))


def spatial(at: At, *_: Any, **__: Any) -> Wiring:
    """A resize: the weights of its sums add up to 1. The first two axes are images and channels."""
    return replace(same(at), mixed=frozenset(range(2, at.rank)))


def mean(
    at: At, input: Any, dim: Any, keepdim: bool = False, *, dtype: None = None
) -> Wiring | None:
    gone = _axes(dim, at.rank)
    if not gone:  # all of them
        return None
    if keepdim:
        return replace(same(at), mixed=gone, ones=gone)
    return Wiring(tuple((i,) for i in range(at.rank) if i not in gone), mixed=gone)


def adaptive_pool(at: At, input: Any, output_size: Any, *, axes: int) -> Wiring:
    last = frozenset(range(at.rank - axes, at.rank))
    sizes = output_size if isinstance(output_size, (list, tuple)) else (output_size,)
    ones = last if all(n == 1 for n in sizes) else frozenset[int]()
    return replace(same(at), mixed=last, ones=ones)


def avg_pool(
    at: At,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
    *,
    axes: int,
) -> Wiring | None:
    if divisor_override is not None:
        return None
    pads = padding if isinstance(padding, (list, tuple)) else (padding,)
    shifts = not (any(pads) and count_include_pad)
    return replace(same(at), mixed=frozenset(range(at.rank - axes, at.rank)), shifts=shifts)


def pad(at: At, input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Wiring | None:
    if not all(isinstance(v, int) for v in pad) or (mode == "constant" and value not in (None, 0)):
        return None
    sides = [(i, n) for i, n in enumerate(pad) if n]
    mixed = frozenset(at.rank - 1 - i // 2 for i, _ in sides)
    return replace(same(at), mixed=mixed, shifts=mode != "constant" or all(n < 0 for _, n in sides))


def constant_pad(at: At, input: Any, pad_: Any, value: Any = 0) -> Wiring | None:
    return pad(at, input, pad_, "constant", value)


def flatten(at: At, input: Any, start_dim: int = 0, end_dim: int = -1) -> Wiring:
    start, end = start_dim % at.rank, end_dim % at.rank
    kept = tuple((i,) for i in range(at.rank))
    return Wiring((*kept[:start], tuple(range(start, end + 1)), *kept[end + 1 :]))


def along(at: At, input: Any, dim: int = 0, *_: Any, **__: Any) -> Wiring:
    """A slice, and other choices of positions along one axis."""
    return replace(same(at), mixed=_axes(dim, at.rank))


def flip(at: At, input: Any, *given: Any, dims: Any = None) -> Wiring:
    dims = given if dims is None else (dims,)
    flat = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    return replace(same(at), mixed=_axes(flat, at.rank))


def permute(at: At, input: Any, *given: Any, dims: Any = None) -> Wiring:
    dims = given if dims is None else (dims,)
    flat = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    return Wiring(tuple((d % at.rank,) for d in flat))


def transpose(at: At, input: Any, *given: Any, **named: Any) -> Wiring:
    a, b = ((d % at.rank) for d in (*given, *named.values()))
    order = list(range(at.rank))
    order[a], order[b] = b, a
    return permute(at, input, *order)


def movedim(at: At, input: Any, source: Any, destination: Any) -> Wiring:
    return permute(at, input, *moved_axes(at.rank, source, destination))


def moved_axes(rank: int, source: Any, destination: Any) -> list[int]:
    """The order of axes for `permute` that moves axes as `movedim` does."""
    one = isinstance(source, int)
    pairs = [(destination, source)] if one else zip(destination, source, strict=True)
    moved = {to % rank: axis % rank for to, axis in pairs}
    rest = iter(sorted(set(range(rank)) - set(moved.values())))
    return [moved[to] if to in moved else next(rest) for to in range(rank)]


def squeeze(at: At, input: Any, dim: Any) -> Wiring:
    gone = _axes(dim, at.rank)
    return Wiring(tuple((i,) for i in range(at.rank) if i not in gone), needs=gone)


def unsqueeze(at: At, input: Any, dim: int) -> Wiring:
    new, kept = dim % (at.rank + 1), [(i,) for i in range(at.rank)]
    return Wiring((*kept[:new], (), *kept[new:]), ones=frozenset({new}))


def getitem(at: At, input: Any, index: Any) -> Wiring | None:
    """x[:, :, 0, 1:-1]: an integer picks a position, a slice some of them."""
    found = list(index) if isinstance(index, tuple) else [index]
    if not all(i is Ellipsis or type(i) in (int, slice) for i in found):
        return None
    if Ellipsis in found:
        here = found.index(Ellipsis)
        found[here : here + 1] = [slice(None)] * (at.rank - len(found) + 1)
    found += [slice(None)] * (at.rank - len(found))
    mixed = frozenset(i for i, v in enumerate(found) if v != slice(None))
    return Wiring(tuple((i,) for i, v in enumerate(found) if isinstance(v, slice)), mixed=mixed)


def reshape(at: At, input: Any, *shape: Any, **named: Any) -> Wiring | None:
    """Axes of equal size at the front and at the end stay. One axis between them holds the rest."""
    given = (*shape, *named.values())
    one = given[0] if len(given) == 1 else given
    before, after = at.sizes_of(input), at.sizes_of(one)
    if isinstance(one, (list, tuple)):
        after = tuple(map(at.size, one))
    elif isinstance(one, int) and not isinstance(one, bool):
        after = (at.size(one),)
    if before is None or after is None:
        return None
    return _between(before, after, at.channels)


def reshape_as(at: At, input: Any, other: Any) -> Wiring | None:
    return reshape(at, input, other)


def _between(before: Sizes, after: Sizes, channels: tuple[int, int] | None) -> Wiring:
    def equal(i: int, j: int) -> bool:
        return before[i] is not None and (before[i] == after[j] or (i, after[j]) == channels)

    m, n = len(before), len(after)
    start = next((i for i in range(min(m, n)) if not equal(i, i)), min(m, n))
    most = min(m, n) - start
    end = next((i for i in range(most) if not equal(m - 1 - i, n - 1 - i)), most)
    middle, new = tuple(range(start, len(before) - end)), len(after) - start - end
    kept = [(i,) for i in range(len(before))]
    held = (middle,) if new == 1 else ((),) * new
    ones = frozenset() if middle else frozenset(range(start, start + new))
    mixed = frozenset() if new == 1 else frozenset(middle)
    return Wiring((*kept[:start], *held, *kept[len(before) - end :]), mixed, ones)


def _axes(dim: Any, rank: int) -> frozenset[int]:
    dims: Iterable[int] = dim if isinstance(dim, (list, tuple)) else (dim,)
    return frozenset(d % rank for d in dims)
