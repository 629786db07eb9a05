"""The input to try a model on: random numbers of --shape, or the first of --data at that size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repfx.cli.options import numbers, pixels, whole
from repfx.data.archive import both_sides
from repfx.data.folders import Images
from repfx.data.preprocessing import Preprocessing
from repfx.errors import InputError
from repfx.graph.inputs import noted_inputs, noted_preprocessing

USUAL = "3,224,224"


def preprocessing(model: object, **options: Any) -> Preprocessing:
    """How images become inputs: as the model records, but for what the options say.

    `options`: those of the command line by the names of `Preprocessing`; None is not given."""
    own = noted_preprocessing(model) or Preprocessing()
    given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    for name in ("mean", "std"):
        if name in given:
            given[name] = numbers(name, given[name])
    if "size" in given:
        given["size"] = pixels(given["size"])
    return replace(own, **given)


def images(path: Path, how: Preprocessing, **options: Any) -> Images:
    """The images of a folder, a zip or an array file as inputs."""
    return Images(path, **vars(how), **options)


def example_for(net: object, data: Path | None, shape: str | None) -> tuple[Tensor, ...]:
    """The inputs to lower a model on.

    They are the first of `data`, or random ones of `shape`. With neither they are random ones of
    the sizes that the model was transformed or calibrated on, if it was saved with them, else one
    image of the usual size."""
    if data is not None:
        return (real_input(data, shape, noted_preprocessing(net)),)
    noted = noted_inputs(net)
    if shape is not None or not noted:
        return (random_input(USUAL if shape is None else shape, 2),)
    found = [
        random_input(",".join(map(str, size)), 2) if size else torch.zeros(2, device="cpu")
        for _, size in noted
    ]
    return tuple(
        (x if kind.is_floating_point else x.abs()).to(kind)
        for x, (kind, _) in zip(found, noted, strict=True)
    )


def usual_shape(net: object, how: Preprocessing | None = None) -> str:
    """The shape of one input as `how` or the model records it, else the usual one."""
    noted, how = noted_inputs(net), how or noted_preprocessing(net)
    if how is not None and how.size is not None:
        return ",".join(map(str, (how.channels, *both_sides(how.size))))
    return ",".join(map(str, noted[0][1])) if len(noted) == 1 and noted[0][1] else USUAL


def random_input(shape: str, batch: int) -> Tensor:
    """A random input (batch, *shape), the same at every call.

    Raises InputError where `shape` cannot be read or the input does not fit into memory."""
    dims = whole("shape", shape)
    try:
        return torch.randn(batch, *dims, generator=torch.Generator().manual_seed(0), device="cpu")
    except RuntimeError as error:
        raise _too_large(shape, error) from error


def real_input(
    data: Path, shape: str | None, own: Preprocessing | None = None, most: int = 8
) -> Tensor:
    """Real inputs (N, *shape) with N up to `most`.

    Images are prepared as the model records in `own`, but for a size that is given. An array is
    used unchanged, and gives the shape if there is none. Raises InputError where the data cannot be
    read or does not have this shape."""
    array, how = data.suffix.lower() == ".npy", own or Preprocessing()
    dims = None if shape is None else whole("shape", shape)
    if dims is not None and not array:
        if len(dims) != 3 or dims[0] != how.channels:
            raise InputError(
                f"{data} holds images, so --shape is {how.channels},HEIGHT,WIDTH, not {shape}"
            )
        how = replace(how, size=dims[1:])
    try:
        found = next(iter(images(data, how).batches(most)))
    except (MemoryError, OverflowError) as error:
        raise _too_large(shape, error) from error
    if dims is not None and tuple(found.shape[1:]) != dims:
        raise InputError(
            f"--shape is {shape}, but an input in {data} is {','.join(map(str, found.shape[1:]))}"
        )
    inputs: Tensor = found
    return inputs


def _too_large(shape: str | None, error: BaseException) -> InputError:
    return InputError(
        f"inputs of --shape {shape} do not fit into memory "
        f"({str(error).strip() or type(error).__name__})"
    )
