"""Quantizers that are worth their rounding only if it turns out to be fine.

`ptq` puts them where they save memory traffic (see `repfx.placement.stored`). The first scales
decide: what rounds too coarsely is taken out of the graph, and what stays is like any other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from repfx.capture.model import graphs
from repfx.graph.view import GraphView
from repfx.placement.stored import leave_out, uneven
from repfx.quant import FakeQuant, quantizers_of


def set_scales(model: nn.Module, scales: Mapping[FakeQuant, Tensor]) -> None:
    """Sets these scales in place, after taking out the optional quantizers that they do not suit.

    An optional one without a scale is taken out, too."""
    optional = {quant for quant in quantizers_of(model).values() if quant.optional}
    if optional:
        views = [GraphView(graph) for _, graph in graphs(model)]
        coarse = [uneven(view, scales) for view in views]
        leave_out(model, (optional - scales.keys()).union(*coarse))
    for quant, scale in scales.items():
        quant.set_scale(scale.to(quant.scale))
        quant.optional = False
