"""Arithmetic on two values, with numbers, and with tensors of every shape that broadcasts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repfx.testing.layers import Scale, Shift
from repfx.testing.plan import Draft, Recipe

# A value v and a tensor w. The entries of w are in [0.5, 1.5).
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "v * w": operator.mul,
    "w * v": lambda v, w: w * v,
    "torch.mul(v, w)": torch.mul,
    "v + w": operator.add,
    "w + v": lambda v, w: w + v,
    "v - w": operator.sub,
    "v.sub(w)": lambda v, w: v.sub(w),
    "w - v": lambda v, w: w - v,
    "torch.sub(w, v)": lambda v, w: torch.sub(w, v),
    "torch.rsub(v, w)": torch.rsub,
    "v / w": operator.truediv,
    "torch.div(v, w)": torch.div,
    "torch.add(v, w, alpha=-2)": lambda v, w: torch.add(v, w, alpha=-2),
    "torch.add(w, v, alpha=0.5)": lambda v, w: torch.add(w, v, alpha=0.5),
    "torch.sub(v, w, alpha=0.5)": lambda v, w: torch.sub(v, w, alpha=0.5),
    "torch.sub(w, v, alpha=2)": lambda v, w: torch.sub(w, v, alpha=2),
}
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "v / 2": lambda v: v / 2,
    "0.5 * v": lambda v: 0.5 * v,
    "v * -1.5": lambda v: v * -1.5,
    "v + 1": lambda v: v + 1,
    "v - 0.5": lambda v: v - 0.5,
    "1 - v": lambda v: 1 - v,
    "torch.rsub(v, 1)": lambda v: torch.rsub(v, 1),
    "torch.rsub(v, 1, alpha=2)": lambda v: torch.rsub(v, 1, alpha=2),
    "torch.add(v, 1, alpha=2)": lambda v: torch.add(v, 1, alpha=2),
    "torch.sub(v, 1, alpha=0.5)": lambda v: torch.sub(v, 1, alpha=0.5),
    "v.mul(2).div(3)": lambda v: v.mul(2).div(3),
    "-v": operator.neg,
    "v.neg()": lambda v: v.neg(),
    "torch.neg(v)": torch.neg,
    "0 + v": lambda v: 0 + v,
}
PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alpha": lambda v, w: torch.add(v, w, alpha=0.5),
    "negative alpha": lambda v, w: v.add(w, alpha=-2),
    "sub alpha": lambda v, w: torch.sub(v, w, alpha=0.5),
    "method": lambda v, w: v.sub(w, alpha=3),
    "keywords": lambda v, w: torch.add(input=v, other=w),
    "rsub": lambda v, w: torch.rsub(v, w, alpha=2),
}
SPELLED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "view": lambda w, n: w.view(1, -1, *[1] * n),
    "reshape": lambda w, n: w.reshape(-1, *[1] * n),
    "index": lambda w, n: w[(slice(None), *[None] * n)],
    "unsqueeze": lambda w, n: w.unsqueeze(-1) if n == 1 else w.unsqueeze(-1).unsqueeze(-1),
}


def per_channel(d: Draft, a: int) -> tuple[int, ...]:
    """A shape with one entry per channel, or a single entry."""
    c, ones = d.channels(a), (1,) * d.axes
    return d.one(
        (c, *ones), (1, c, *ones), (c, *ones), (1, c, *ones), (1, 1, *ones), (1,), (), (1, *ones)
    )


def not_per_channel(d: Draft, a: int) -> tuple[int, ...]:
    """A shape that varies along the positions or the batch."""
    n, c, *sizes = d.shape(a)
    ones = (1,) * d.axes
    columns = (*ones[1:], sizes[-1])
    rows = (sizes[0], *ones[1:])
    return d.one(
        (sizes[-1],),
        (c, *columns),
        (1, 1, *columns),
        (1, c, *columns),
        (c, *rows),
        rows,
        (1, c, *rows),
        tuple(sizes),
        (1, *sizes),
        (1, 1, *sizes),
        (c, *sizes),
        (n, 1, *ones),
        (n, c, *ones),
        (n, c, *sizes),
    )


def operand(d: Draft, a: int, shape: tuple[int, ...]) -> int:
    text = d.one(*OPERATIONS)
    return d.call(text, OPERATIONS[text], a, tensor=d.uniform(*shape))


def spelled(d: Draft, a: int) -> int:
    """An operation with a (C,) tensor that the forward reshapes to broadcast over the positions."""
    text, spelling, n = d.one(*OPERATIONS), d.one(*SPELLED), d.axes
    if n == 3 and spelling == "unsqueeze":
        spelling = "view"
    function, shaped = OPERATIONS[text], SPELLED[spelling]
    return d.call(
        f"{text}, w by {spelling}",
        lambda v, w: function(v, shaped(w, n)),
        a,
        tensor=d.uniform(d.channels(a)),
    )


def by_chance(d: Draft, a: int) -> int:
    """An operation with a (C,) tensor that broadcasts along a last axis of C positions."""
    c, width = d.channels(a), d.shape(a)[-1]
    if width > c:
        a = d.call(f"[..., :{c}]", lambda v: v[..., :c], a)
    return operand(d, a, (c,))


def number(d: Draft, a: int) -> int:
    text = d.one(*NUMBERS)
    return d.call(text, NUMBERS[text], a)


def pair(d: Draft, a: int) -> int:
    text = d.one(*PAIRS)
    return d.call(text, PAIRS[text], a, d.one(*d.like(a)))


def two(text: str, function: Callable[[Tensor, Tensor], Any]) -> Callable[[Draft, int], int]:
    return lambda d, a: d.call(text, function, *(d.rng.sample([a, d.one(*d.like(a))], 2)))


RECIPES = {
    "add": Recipe(two("v + w", operator.add), 4),
    "sub": Recipe(two("v - w", operator.sub), 2.5),
    "alpha": Recipe(pair, 1.5),
    "mul": Recipe(two("v * w", operator.mul), 1.6, bent=True),
    "number": Recipe(number, 2),
    "scale": Recipe(lambda d, a: d.add(Scale(d.uniform(*per_channel(d, a))), a), 1.2),
    "shift": Recipe(lambda d, a: d.add(Shift(d.uniform(*per_channel(d, a)) - 1), a), 1.2),
    "operand": Recipe(lambda d, a: operand(d, a, per_channel(d, a)), 2.5),
    "operand spelled": Recipe(spelled, 1.5),
    "operand by chance": Recipe(by_chance),
    "operand not per channel": Recipe(lambda d, a: operand(d, a, not_per_channel(d, a)), 2),
}
