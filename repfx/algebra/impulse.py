"""impulse_response: measures the kernel of an affine, shift-invariant function by running it.

    b = f(0),    K[:, i, t] = f(delta_(i, t)) - f(0)

No formula is needed, so this works for operators that have none here. It shares no code with
`Kernel`, so it can check it. The result is differentiable in the parameters of f."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from repfx.algebra.geometry import Geometry
from repfx.algebra.kernel import Kernel


def impulse_response(
    f: Callable[[Tensor], Tensor],
    geometry: Geometry,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Kernel:
    """The Kernel of f, whose geometry is known. f takes (N, in, ...), or (N, in) if it is linear.

    All groups are measured at once, in one run with a batch of 1 + in / groups * places.
    """
    width = geometry.inputs // geometry.groups
    # The first output position that reads no padding, and an input just large enough for what it
    # reads.
    first = [max(0, -(-a.before // a.stride)) for a in geometry.axes]
    start = [n * a.stride - a.before for n, a in zip(first, geometry.axes, strict=True)]
    sizes = [s + a.taps + max(0, -a.after) for s, a in zip(start, geometry.axes, strict=True)]
    probes = list(product(range(width), *(a.places for a in geometry.axes)))
    x = torch.zeros((1 + len(probes), geometry.inputs, *sizes), dtype=dtype, device=device)
    for row, (channel, *taps) in enumerate(probes, start=1):
        where: Any = (
            row,
            slice(channel, None, width),
            *(s + t for s, t in zip(start, taps, strict=True)),
        )
        x[where] = 1
    y = f(x)
    middle: Any = (slice(None), slice(None), *first)
    at = y[middle]
    weight = (
        (at[1:] - at[:1])
        .t()
        .reshape((geometry.outputs, width, *(len(a.places) for a in geometry.axes)))
    )
    return Kernel(replace(geometry, links=None), weight, at[0] if geometry.bias else None)
