"""Rules of the operators that move channels: concatenations, slices, shuffles, permutations, ...

Each is read as a sum of values with moved channels. So a convolution of a concatenation, or of a
slice, needs no rule of its own:

    cat(a, b) = [a; 0] + [0; b]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import fx

from repfx.algebra import Axis, Geometry
from repfx.errors import Inexact
from repfx.graph.ops import Constants, Op, Opaque, Sum
from repfx.graph.wiring import moved_axes

_END = 2**31  # where exported programs write 2**63 - 1 for "to the end"


def cat(c: Constants, tensors: Any, dim: Any = 0, *, axis: Any = None) -> Op:
    dim = dim if axis is None else axis
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
        return Opaque()
    if not all(isinstance(t, fx.Node) and not c.is_constant(t) for t in tensors):
        return Opaque("a concatenation with a constant")

    def arrange(values: list[Any]) -> list[Any]:
        _check_dim(c, dim, values[0].geometry, tensors[0])
        sizes = [v.geometry.outputs for v in values]
        return [
            v.moved((-1,) * sum(sizes[:i]) + tuple(range(n)) + (-1,) * sum(sizes[i + 1 :]))
            for i, (v, n) in enumerate(zip(values, sizes, strict=True))
        ]

    return Sum(tuple((t, 1.0) for t in tensors), "concat", arrange)


def chunk(c: Constants, input: Any, chunks: Any, dim: Any = 0) -> Op:
    return _split(c, input, dim, lambda n: -(-n // chunks)) if isinstance(chunks, int) else Opaque()


def split(c: Constants, input: Any, sizes: Any, dim: Any = 0) -> Op:
    """`sizes`: the size of each piece, or one size; then the last piece may be smaller."""
    if isinstance(sizes, int):
        return _split(c, input, dim, lambda _: sizes)
    if not all(isinstance(s, int) for s in sizes):
        return Opaque()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return _pieces(
        c, input, dim, lambda _: [range(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    )


def getitem(c: Constants, input: Any, index: Any) -> Op:
    """A piece from `chunk` or `split`, or a slice x[:, a:b, c:-d]: some channels, cropped space."""
    whole = c.ops.get(input)
    if isinstance(whole, Sum) and whole.pieces is not None:
        found, at = whole.pieces, index
        if not isinstance(at, int):
            return Opaque()

        def piece(values: list[Any]) -> list[Any]:
            return [values[0].moved(tuple(found(values[0].geometry.outputs)[at]))]

        return Sum(((input, 1.0),), "slice", piece)
    return _sliced(c, input, list(index) if isinstance(index, tuple) else [index])


def narrow(c: Constants, input: Any, dim: Any, start: Any, length: Any) -> Op:
    return (
        slice_dim(c, input, dim, start, start + length)
        if isinstance(start, int) and isinstance(length, int)
        else Opaque()
    )


def slice_dim(
    c: Constants, input: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Op:
    if not isinstance(dim, int):
        return Opaque()
    one = slice(start, end, step)
    if dim < 0:
        return _sliced(c, input, [Ellipsis, one] + [slice(None)] * (-dim - 1))
    return _sliced(c, input, [slice(None)] * dim + [one])


def index_select(c: Constants, input: Any, dim: Any, index: Any) -> Op:
    if not isinstance(dim, int) or not c.is_constant(index) or c.tensor(index).dim() != 1:
        return Opaque()
    rows = tuple(int(i) for i in c.tensor(index))
    return _moved(c, input, dim, "index_select", lambda n: rows)


def flip(c: Constants, input: Any, *given: Any, dims: Any = None) -> Op:
    dims = given if dims is None else (dims,)
    flat = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    if len(flat) != 1 or not isinstance(flat[0], int):
        return Opaque()
    return _moved(c, input, flat[0], "flip", lambda n: tuple(reversed(range(n))))


def channel_shuffle(c: Constants, input: Any, groups: Any) -> Op:
    if not isinstance(groups, int):
        return Opaque()
    return _moved(
        c,
        input,
        1,
        "shuffle",
        lambda n: tuple(g * (n // groups) + k for k in range(n // groups) for g in range(groups)),
    )


def permute(c: Constants, input: Any, *given: Any, dims: Any = None) -> Op:
    """The permutation (0, 2, 3, 1), which moves the channels to the last axis, or (0, 3, 1, 2)."""
    dims = given if dims is None else (dims,)
    flat = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    if not all(isinstance(d, int) for d in flat):
        return Opaque()
    rank = len(flat)
    order = tuple(d % rank for d in flat)
    axes = tuple(range(1, rank))
    last, first = (0, *axes[1:], 1) == order, (0, rank - 1, *axes[:-1]) == order
    if rank < 3 or not (last or first):
        return Opaque()

    def arrange(values: list[Any]) -> list[Any]:
        g = values[0].geometry
        if (
            len(g.axes) != rank - 2
            or (g.channel_axis == 1 and not last)
            or (g.channel_axis == -1 and not first)
        ):
            raise Inexact("a permutation of the spatial axes")
        return [values[0].turned_to(-g.channel_axis)]

    return Sum(
        ((input, 1.0),),
        "permute",
        arrange,
        space=(rank - 2, None if last and first else 1 if last else -1),
    )


def transpose(c: Constants, input: Any, *given: Any, **named: Any) -> Op:
    """A transpose from (N, C, L) to (N, L, C) or back. In more dimensions it would reorder space.

    The axes may be called dim0, dim1 or axis0, axis1."""
    dim0, dim1 = (*given, *named.values())
    swaps = {dim0, dim1} in ({1, 2}, {1, -1}, {2, -2}, {-1, -2}) and c.rank(input) == 3
    return permute(c, input, 0, 2, 1) if swaps else Opaque()


def movedim(c: Constants, input: Any, source: Any, destination: Any) -> Op:
    rank = c.rank(input)
    return Opaque() if rank is None else permute(c, input, *moved_axes(rank, source, destination))


def _split(c: Constants, input: Any, dim: Any, size: Callable[[int], int]) -> Op:
    def ranges(n: int) -> list[range]:
        return [range(a, min(a + size(n), n)) for a in range(0, n, size(n))]

    return _pieces(c, input, dim, ranges)


def _pieces(c: Constants, input: Any, dim: Any, ranges: Callable[[int], list[range]]) -> Op:
    if not isinstance(dim, int):
        return Opaque()

    def arrange(values: list[Any]) -> list[Any]:
        _check_dim(c, dim, values[0].geometry, input)
        return values

    return Sum(((input, 1.0),), "chunk", arrange, ranges)


def _moved(
    c: Constants, input: Any, dim: int, kind: str, rows: Callable[[int], tuple[int, ...]]
) -> Op:
    def arrange(values: list[Any]) -> list[Any]:
        _check_dim(c, dim, values[0].geometry, input)
        return [values[0].moved(rows(values[0].geometry.outputs))]

    return Sum(((input, 1.0),), kind, arrange)


def _sliced(c: Constants, input: Any, index: list[Any]) -> Op:
    if any(i is not Ellipsis and not _is_plain(i) for i in index) or index.count(Ellipsis) > 1:
        return Opaque()

    def arrange(values: list[Any]) -> list[Any]:
        g = values[0].geometry
        rank = len(g.axes) + 2 if g.channel_axis == 1 or g.axes else c.rank(input)
        if rank is None:
            raise Inexact("a slice of a value of unknown rank", "pass an example")
        dims = _per_dimension(index, rank)
        channels = dims.pop(g.channel_axis)
        if dims[0] != slice(None):
            raise Inexact("a slice of the batch")
        if g.channel_axis == -1 and any((s.step or 1) != 1 for s in dims):
            raise Inexact("a slice with steps, along positions in a value with channels last")
        taken = values[0].moved(tuple(range(g.outputs)[channels]))
        axes = [_axis(s) for s in dims[1:]]
        if all(a.is_point for a in axes):
            return [taken]
        if not g.axes:
            raise Inexact("a crop of the positions of a linear layer")
        return [taken.cropped(tuple(axes))]

    steps = (
        [i.step or 1 for i in _per_dimension(index, len(index))[2:]]
        if Ellipsis not in index
        else []
    )
    if Ellipsis in index and any(i is not Ellipsis and (i.step or 1) != 1 for i in index):
        return Opaque("a slice with steps")
    return Sum(((input, 1.0),), "slice", arrange, stride=prod(steps))


def _axis(s: slice) -> Axis:
    """A slice along a spatial axis, as an Axis: it crops each end, which is negative padding."""
    start, stop = s.start or 0, s.stop
    stop = 0 if stop is None or stop >= _END else stop
    if start < 0 or stop > 0 or (s.stop == 0):
        raise Inexact("a crop to a fixed size", "count from both ends, as in x[:, :, 1:-1]")
    return Axis(1, s.step or 1, -start, stop)


def _per_dimension(index: Sequence[Any], rank: int) -> list[slice]:
    found = list(index)
    if Ellipsis in found:
        at = found.index(Ellipsis)
        found[at : at + 1] = [slice(None)] * (rank - len(found) + 1)
    found = [slice(None) if _is_whole(s) else s for s in found]
    return found + [slice(None)] * (rank - len(found))


def _is_whole(s: slice) -> bool:
    return not s.start and (s.stop is None or s.stop >= _END) and s.step in (None, 1)


def _is_plain(s: Any) -> bool:
    whole = isinstance(s, slice) and all(
        v is None or isinstance(v, int) for v in (s.start, s.stop, s.step)
    )
    return whole and (s.step is None or s.step > 0)


def _check_dim(c: Constants, dim: int, g: Geometry, node: fx.Node) -> None:
    """Raises Inexact unless `dim` is the channel axis of a value with geometry g."""
    rank = len(g.axes) + 2 if g.channel_axis == 1 or g.axes else c.rank(node)
    if dim == g.channel_axis or (rank is not None and dim % rank == g.channel_axis % rank):
        return
    raise Inexact("it joins, splits or moves along an axis that is not the channel axis")
