"""The input to try a model on: random numbers of --shape, or the first of --data at that size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from repfx.cli.options import whole
from repfx.data.folders import Images
from repfx.errors import InputError
from repfx.graph.inputs import noted_inputs

USUAL = "3,224,224"


def example_for(net: object, data: Path | None, shape: str | None) -> tuple[Tensor, ...]:
    """The inputs to lower a model on.

    They are the first of `data`, or random ones of `shape`. With neither they are random ones of
    the sizes that the model was transformed or calibrated on, if it was saved with them, else one
    image of the usual size."""
    if data is not None:
        return (real_input(data, shape),)
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


def random_input(shape: str, batch: int) -> Tensor:
    """A random input (batch, *shape), the same at every call.

    Raises InputError where `shape` cannot be read or the input does not fit into memory."""
    dims = whole("shape", shape)
    try:
        return torch.randn(batch, *dims, generator=torch.Generator().manual_seed(0), device="cpu")
    except RuntimeError as error:
        raise _too_large(shape, error) from error


def real_input(data: Path, shape: str | None, most: int = 8) -> Tensor:
    """Real inputs (N, *shape) with N up to `most`.

    Images are resized and cropped around the centre to the shape. An array is used unchanged, and
    gives the shape if there is none. Raises InputError where the data cannot be read or does not
    have this shape."""
    array = data.suffix.lower() == ".npy"
    if shape is None and not array:
        shape = USUAL
    dims = None if shape is None else whole("shape", shape)
    if array or dims is None:
        found = next(iter(Images(data).batches(most)))
    elif len(dims) != 3 or dims[0] != 3:
        raise InputError(f"{data} holds images, so --shape is 3,HEIGHT,WIDTH, not {shape}")
    else:
        side = max(dims[1:])
        try:
            found = next(iter(Images(data, size=side).batches(most)))
        except (MemoryError, OverflowError) as error:
            raise _too_large(shape, error) from error
        top, left = ((side - d) // 2 for d in dims[1:])
        found = found[:, :, top : top + dims[1], left : left + dims[2]].contiguous()
    if dims is not None and tuple(found.shape[1:]) != dims:
        raise InputError(
            f"--shape is {shape}, but an input in {data} is {','.join(map(str, found.shape[1:]))}"
        )
    images: Tensor = found
    return images


def _too_large(shape: str | None, error: BaseException) -> InputError:
    return InputError(
        f"inputs of --shape {shape} do not fit into memory "
        f"({str(error).strip() or type(error).__name__})"
    )
