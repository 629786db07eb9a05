"""Operators that stop a merge: activations, gates, norms of the input, and changes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.testing.channels import size_kept
from repfx.testing.convolutions import NORM, conv, plain_norm
from repfx.testing.plan import Draft, Recipe, Unfit

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "v.relu()": lambda v: v.relu(),
    "torch.sigmoid": torch.sigmoid,
    "F.silu": F.silu,
    "F.gelu": F.gelu,
    "F.leaky_relu": lambda v: F.leaky_relu(v, 0.1),
    "v.clamp(min=0)": lambda v: v.clamp(min=0),
    "v * sigmoid(v)": lambda v: v * torch.sigmoid(v),
    "v.abs()": lambda v: v.abs(),
    "v ** 2": lambda v: v**2,
}
# Each of these changes its first value in place, or a part of it, and returns that value.
BENT_WRITES: dict[str, Callable[..., Tensor]] = {
    "F.relu(v, inplace=True)": lambda v: F.relu(v, inplace=True),
    "v.relu_()": lambda v: v.relu_(),
    "v.clamp_(min=0)": lambda v: v.clamp_(min=0),
    "torch.sigmoid_(v)": lambda v: torch.sigmoid_(v),
}


def _iadd(v: Tensor) -> Tensor:
    v += 1
    return v


def _imul(v: Tensor) -> Tensor:
    v *= 0.5
    return v


def _slice_iadd(v: Tensor) -> Tensor:
    y = v[:, :2]
    y += 1
    return v


def _slice_mul(v: Tensor) -> Tensor:
    v[:, -1:].mul_(2)
    return v


def _slice_augmented(v: Tensor) -> Tensor:
    v[:, :1] *= 0.5
    return v


def _slice_set(v: Tensor) -> Tensor:
    v[:, 1:] = 0.25
    return v


def _border_set(v: Tensor) -> Tensor:
    v[:, :, 0] = 0
    return v


def _through_view(v: Tensor) -> Tensor:
    v.view(v.shape[0], -1).add_(0.5)
    return v


def _through_chunk(v: Tensor) -> Tensor:
    p, q = v.chunk(2, 1)
    p.add_(q)
    return v


def _returns_view(v: Tensor) -> Tensor:
    y = v[:, 1:]
    y.mul_(-1)
    return y


WRITES: dict[str, Callable[..., Tensor]] = {
    "v.add_(1)": lambda v: v.add_(1),
    "v.mul_(2)": lambda v: v.mul_(2),
    "v.neg_()": lambda v: v.neg_(),
    "v.sub_(0.5)": lambda v: v.sub_(0.5),
    "v += 1": _iadd,
    "v *= 0.5": _imul,
}
VIEW_WRITES: dict[str, Callable[..., Tensor]] = {
    "v[:, :2] += 1, by a name": _slice_iadd,
    "v[:, -1:].mul_(2)": _slice_mul,
    "v[:, :1] *= 0.5": _slice_augmented,
    "v[:, 1:] = 0.25": _slice_set,
    "v[:, :, 0] = 0": _border_set,
    "v.view(n, -1).add_(0.5)": _through_view,
    "p.add_(q) of v.chunk(2, 1)": _through_chunk,
    "v[:, 1:].mul_(-1), the part": _returns_view,
}
TENSOR_WRITES: dict[str, Callable[..., Tensor]] = {
    "v.add_(w)": lambda v, w: v.add_(w),
    "v.mul_(w)": lambda v, w: v.mul_(w),
    "v.div_(w)": lambda v, w: v.div_(w),
    "v.sub_(w, alpha=2)": lambda v, w: v.sub_(w, alpha=2),
    "v[:] = v * w": lambda v, w: _assigned(v, v * w),
}


def _assigned(v: Tensor, new: Tensor) -> Tensor:
    v[:] = new
    return v


def _added(v: Tensor, w: Tensor) -> Tensor:
    v += w
    return v


PAIR_WRITES: dict[str, Callable[..., Tensor]] = {
    "v += w": _added,
    "v.add_(w)": lambda v, w: v.add_(w),
    "v.sub_(w)": lambda v, w: v.sub_(w),
    "v.add_(w, alpha=-0.5)": lambda v, w: v.add_(w, alpha=-0.5),
    "v.copy_(w)": lambda v, w: v.copy_(w),
}


def own(d: Draft, a: int) -> int:
    """The value itself, or a convolution of it if it is the caller's input."""
    return a if d.is_own(a) else conv(d, a)


def written(table: dict[str, Callable[..., Tensor]]) -> Callable[[Draft, int], int]:
    """A change of a value in place; half of the time the old name is used afterwards."""

    def draw(d: Draft, a: int) -> int:
        text, v = d.one(*table), own(d, a)
        y = d.call(text, table[text], v)
        return v if d.odds(0.5) else y

    return draw


def written_by_tensor(d: Draft, a: int) -> int:
    text, v = d.one(*TENSOR_WRITES), own(d, a)
    c, ones = d.channels(v), (1,) * d.axes
    return d.call(
        text,
        TENSOR_WRITES[text],
        v,
        tensor=d.uniform(*d.one((c, *ones), (1, c, *ones), (), (d.shape(v)[-1],))),
    )


def written_by_value(d: Draft, a: int) -> int:
    """v += w, where both are values of the plan; both may have been read before."""
    text, v = d.one(*PAIR_WRITES), own(d, a)
    return d.call(text, PAIR_WRITES[text], v, d.one(*d.like(v)))


def between_readers(d: Draft, a: int) -> int:
    """Reads a value, changes it in place, reads it again, and adds the two results."""
    v = own(d, a)
    first = size_kept(d, v, same_channels=True)
    table = WRITES | VIEW_WRITES | (BENT_WRITES if d.nonlinear else {})
    text = d.one(*table)
    d.call(text, table[text], v)
    second = d.do(lambda: v, lambda: size_kept(d, v, same_channels=True))
    return d.call("v + w", lambda v, w: v + w, first, second)


def activation(d: Draft, a: int) -> int:
    text = d.one(*ACTIVATIONS)
    return d.call(text, ACTIVATIONS[text], a)


def layer(d: Draft, a: int) -> int:
    made: Any = d.one(
        nn.ReLU(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.PReLU(d.channels(a)),
        nn.ReLU(inplace=True),
        nn.ELU(),
    )
    if getattr(made, "inplace", False):
        a = own(d, a)
    return d.add(made, a)


def gate(d: Draft, a: int) -> int:
    """A gate as in squeeze-and-excitation."""
    dims = tuple(range(2, d.axes + 2))
    return d.call("v * sigmoid(mean)", lambda v: v * torch.sigmoid(v.mean(dims, keepdim=True)), a)


def norm_of_input(d: Draft, a: int) -> int:
    c = d.channels(a)
    made: Any = d.one(NORM[d.axes](c, track_running_stats=False), nn.GroupNorm(1, c))
    return d.add(made, a)


def dropped(d: Draft, a: int) -> int:
    made: Any = d.one(nn.Dropout(0.5), nn.Identity(), nn.Dropout2d(0.3))
    if isinstance(made, nn.Dropout2d) and d.axes != 2:
        raise Unfit("for images")
    y = d.add(made, a)
    return plain_norm(d, y) if d.odds(0.4) else y


RECIPES = {
    "activation": Recipe(activation, 1.5, bent=True),
    "activation layer": Recipe(layer, 1.2, bent=True),
    "relu in place": Recipe(written(BENT_WRITES), 1.6, bent=True),
    "gate": Recipe(gate, 1.6, bent=True),
    "norm of input": Recipe(norm_of_input, 1.3, bent=True),
    "dropout": Recipe(dropped),
    "write": Recipe(written(WRITES), 0.8),
    "write by view": Recipe(written(VIEW_WRITES), 1.2),
    "write by tensor": Recipe(written_by_tensor, 0.8),
    "write by value": Recipe(written_by_value, 0.8),
    "write between readers": Recipe(between_readers, 1.2),
}
