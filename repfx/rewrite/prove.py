"""The oracle: runs a region itself, in float64 and eval mode, on inputs of odd and even sizes.

It runs the model's own modules and functions and shares no code with the algebra that it checks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.algebra import Geometry, Kernel
from repfx.errors import CheckError
from repfx.graph.ops import Ref
from repfx.graph.regions import Region
from repfx.graph.run_node import call
from repfx.graph.view import GraphView
from repfx.tolerances import MERGED

EXACT = MERGED[torch.float64]


def prove(view: GraphView, region: Region, kernel: Kernel, fetch: Callable[[Ref], Tensor]) -> float:
    """The relative difference between a region and its kernel.

    Raises CheckError if the difference is larger than rounding.
    """
    worst = 0.0
    twins: dict[fx.Node, nn.Module] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for sizes in input_sizes(kernel.geometry):
            x, want = _first_run(view, region, sizes, generator, fetch, twins)
            got = kernel(x)
            if got.shape != want.shape:
                raise CheckError(
                    f"the merge of {view.name(region.sink)!r} has shape {got.shape}, not "
                    f"{want.shape}"
                )
            off, largest = float((got - want).abs().amax()), float(want.abs().amax())
            if not off <= EXACT * largest:
                # Where branches cancel, rounding is relative to them and not to what is left.
                seen: list[float] = []
                _run(view, region, x, fetch, twins, seen)
                largest = max(seen) or 1.0
            relative = off / largest if largest else off
            worst = max(worst, relative) if relative == relative else float("inf")
    if not worst <= EXACT:
        raise CheckError(
            f"the merge of {view.name(region.sink)!r} differs from the original by {worst:.2e}; "
            "this is a bug in repfx"
        )
    return worst


def _first_run(
    view: GraphView,
    region: Region,
    sizes: tuple[int, ...],
    generator: torch.Generator,
    fetch: Callable[[Ref], Tensor],
    twins: dict[fx.Node, nn.Module],
) -> tuple[Tensor, Tensor]:
    """An input of these sizes, or larger if an operator needs it, and the region's output."""
    for more in (0, 4, 12):
        space = slice(1, -1) if len(sizes) < 3 else slice(2, None)
        grown = list(sizes)
        grown[space] = [n + more for n in sizes[space]]
        x = torch.randn(grown, generator=generator, dtype=torch.float64, device="cpu")
        try:
            return x, _run(view, region, x, fetch, twins)
        except RuntimeError:
            if more == 12:
                raise
    raise AssertionError


def input_sizes(g: Geometry) -> list[tuple[int, ...]]:
    """Input shapes with both borders and an interior.

    Each axis is odd once and even once. Without a stride, one shape is enough: only a stride tells
    odd sizes from even ones.
    Where a dilation makes a kernel wide, every tap reads the image at some position, which takes
    half the size: outputs of a linear map that are right one by one are right together."""
    if g.source_axis == -1:
        return [(3, *range(4, 4 + len(g.axes)), g.inputs)]
    if g.transposed:
        return [
            (1, g.inputs, *(3 + more + i % 2 + a.before for i, a in enumerate(g.axes)))
            for more in (0, 1)
        ]
    least = []
    for a in g.axes:
        taps = a.taps if a.gap == 1 else a.taps - max(min(a.before, a.after), 0) + a.stride - 1
        reach = max(taps, a.taps - a.before - a.after + a.stride)
        least.append(max(reach, 1 + a.before, 1 + a.after) if g.mode != "zeros" else reach)
    steps = (0, 1) if any(a.stride != 1 for a in g.axes) else (0,)
    return [(1, g.inputs, *(n + more + i % 2 for i, n in enumerate(least))) for more in steps]


def _run(
    view: GraphView,
    region: Region,
    x: Tensor,
    fetch: Callable[[Ref], Tensor],
    twins: dict[fx.Node, nn.Module],
    seen: list[float] | None = None,
) -> Tensor:
    """The region's output on x; `seen` collects the largest magnitude of each value inside."""
    # A copy, because an operator may change its input in place.
    values: dict[fx.Node, Any] = {region.source: x.clone()}

    def value(v: fx.Node) -> Any:
        if view.follows_mode(v):
            return False
        return values[v] if v in values else fetch(v)

    last = {v: node for node in region.nodes for v in node.all_input_nodes}
    for node in region.nodes:
        if node.op == "call_module" and node not in twins:
            twins[node] = twin(view.modules[str(node.target)], str(node.target), fetch)
        values[node] = call(node, value, twins.get(node))
        if seen is not None and isinstance(values[node], Tensor):
            seen.append(float(values[node].abs().amax()))
        for v in node.all_input_nodes:
            if last[v] is node and v is not region.source:
                values.pop(v, None)
    output: Tensor = values[region.sink]
    return output


def twin(module: nn.Module, path: str, fetch: Callable[[Ref], Tensor]) -> nn.Module:
    """A copy of the module in eval mode, with the fetched tensors, which are in float64."""
    if nn.utils.parametrize.is_parametrized(module):
        return copy.deepcopy(module).cpu().double().eval()
    copied = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        tensors = {
            k: t if t is None else fetch(f"{path}.{k}") for k, t in module.__dict__[kind].items()
        }
        copied.__dict__[kind] = tensors
    copied.__dict__["_modules"] = {
        k: m and twin(m, f"{path}.{k}", fetch) for k, m in module._modules.items()
    }
    copied.__dict__["training"] = False
    return copied
