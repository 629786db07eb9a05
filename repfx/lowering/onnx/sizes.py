"""Sizes that are dynamic in a file: none, the batch, or all, with those after the channels.

torch.export records what a model requires of its sizes, but the file does not: a model that pools
to 4 x 4 is exported as one that divides by 4. So a file with dynamic sizes is also compared with
the model at sizes other than the example's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn

from repfx.capture.running import describe, run_eval
from repfx.errors import CheckError, InputError

NAMES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
# What is added to each size: a multiple of the usual strides, then odd numbers. Few models refuse
# both.
_STEPS = ((64, 64, 64), (1, 3, 5))


Free = Literal["none", "batch", "all"]


def free(args: tuple[Tensor, ...], which: Free) -> tuple[dict[int, Any], ...] | None:
    """The dynamic dimensions of each input for torch.export. Raises InputError for a size of 1."""
    if which == "none":
        return None
    dynamic = which == "all"
    batch, auto = torch.export.Dim("batch"), torch.export.Dim.AUTO
    for i, a in enumerate(args):
        for d, name in _sizes(a, dynamic).items():
            if a.shape[d] == 1:
                raise InputError(
                    f"the {name} of input {i + 1} is 1 in the example; to be dynamic it has to "
                    "be larger there"
                )
    return tuple({0: batch, **dict.fromkeys(_sizes(a, dynamic), auto)} for a in args)


def name(proto: onnx.ModelProto, args: tuple[Tensor, ...], which: Free) -> None:
    """Names the dynamic dimensions batch, height and width.

    Where those of a second input may differ, they are height_2 and width_2. Raises InputError where
    the model fixes one."""
    if which == "none":
        return
    names: dict[str, str] = {}
    for i, (info, a) in enumerate(zip(proto.graph.input, args, strict=True)):
        for d, word in {0: "batch", **_sizes(a, which == "all")}.items():
            symbol = info.type.tensor_type.shape.dim[d].dim_param
            if d > 0 and (symbol.isdigit() or not symbol):
                raise InputError(
                    f"the model fixes the {word} of its input {info.name} at {a.shape[d]}: "
                    "lower it without dynamic"
                )
            names.setdefault(symbol, word if word not in names.values() else f"{word}_{i + 1}")
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), dim.dim_param)


def check(
    model: nn.Module, args: tuple[Tensor, ...], compare: Callable[[tuple[Tensor, ...]], object]
) -> None:
    """Compares file and model at other sizes that the model accepts.

    `compare` runs both on one input and raises CheckError where they differ. Raises CheckError in
    that case, InputError where the model accepts no other size."""
    taken = 0
    for steps in _STEPS:
        other = tuple(_grown(a, steps) for a in args)
        try:
            run_eval(model, other)
        except Exception:  # the model itself refuses this size
            continue
        taken += 1
        try:
            compare(other)
        except CheckError as error:
            raise CheckError(
                f"for inputs of {describe(other)} {error}: lower it without dynamic"
            ) from error
    if not taken:
        words = " and ".join(dict.fromkeys(word for a in args for word in _sizes(a, True).values()))
        raise InputError(
            f"the model fixes {words}; it takes {describe(args)} and nothing larger: lower "
            "it without dynamic"
        )


def _sizes(x: Tensor, dynamic: bool) -> dict[int, str]:
    """The names of the dynamic dimensions after the channels."""
    return dict(enumerate(NAMES.get(x.dim(), ()), 2)) if dynamic else {}


def _grown(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """The first image of an input, made larger by repeating it."""
    x = x[:1]
    for d, step in zip(_sizes(x, True), steps, strict=False):
        size = x.shape[d]
        x = x.index_select(d, torch.arange(size + step, device=x.device) % size)
    return x
