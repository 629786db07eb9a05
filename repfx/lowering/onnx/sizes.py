"""Sizes that a file leaves open: the batch, and with `dynamic` all that comes after the channels.

torch.export notes what a model asks of its sizes, but the file does not hold it: a model that pools
to 4 x 4 is exported as one that divides by 4. So a file with free sizes is compared with the model
at sizes other than the example's too."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from repfx.capture.running import describe, run_eval
from repfx.errors import CheckError, InputError

NAMES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
# What is added to each size: a multiple of what strides usually ask for, and odd numbers, which few
# models refuse.
_STEPS = ((64, 64, 64), (1, 3, 5))


def free(args: tuple[Tensor, ...], dynamic: bool) -> tuple[dict[int, Any], ...]:
    """Which dimensions of each input are free, as torch.export takes it. Raises InputError for a
    size of 1.
    """
    batch, auto = torch.export.Dim("batch"), torch.export.Dim.AUTO
    for i, a in enumerate(args):
        for d, name in _sizes(a, dynamic).items():
            if a.shape[d] == 1:
                raise InputError(
                    f"the {name} of input {i + 1} is 1 in the example; to be free it has to "
                    "be larger there"
                )
    return tuple({0: batch, **dict.fromkeys(_sizes(a, dynamic), auto)} for a in args)


def name(proto: onnx.ModelProto, args: tuple[Tensor, ...], dynamic: bool) -> None:
    """Names the free dimensions batch, height, width; those of a further input, where they are
    others, height_2.

    Raises InputError where the model fixes one.
    """
    names: dict[str, str] = {}
    for i, (info, a) in enumerate(zip(proto.graph.input, args, strict=True)):
        for d, word in {0: "batch", **_sizes(a, dynamic)}.items():
            symbol = info.type.tensor_type.shape.dim[d].dim_param
            if d > 0 and (symbol.isdigit() or not symbol):
                raise InputError(
                    f"the model fixes the {word} of its input {info.name}, {a.shape[d]}: "
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
    """Compares file and model at other sizes, those that the model takes; `compare` does it and
    raises CheckError.

    Raises CheckError where they differ, InputError where the model takes no other size.
    """
    taken = 0
    for steps in _STEPS:
        other = tuple(_grown(a, steps) for a in args)
        try:
            run_eval(model, other)
        except Exception:  # what the model itself refuses
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
            f"the model fixes {words}, it takes {describe(args)} and nothing larger: lower "
            "it without dynamic"
        )


def _sizes(x: Tensor, dynamic: bool) -> dict[int, str]:
    """The names of the free dimensions after the channels."""
    return dict(enumerate(NAMES.get(x.dim(), ()), 2)) if dynamic else {}


def _grown(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """One picture of an input, repeated to be larger."""
    x = x[:1]
    for d, step in zip(_sizes(x, True), steps, strict=False):
        size = x.shape[d]
        x = x.index_select(d, torch.arange(size + step, device=x.device) % size)
    return x
