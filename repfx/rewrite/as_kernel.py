"""lift: computes the one convolution that a module equals, from the module's own forward.

lift(block)(x) == block(x) in eval mode, in float64
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from repfx.algebra import Kernel
from repfx.capture.assemble import graph_module
from repfx.capture.normalise import normalise
from repfx.capture.running import guess_example
from repfx.capture.tracer import Tracer
from repfx.errors import Inexact, InputError
from repfx.graph.regions import Region, is_linear, nodes_between
from repfx.graph.view import GraphView
from repfx.rewrite.kernel_of import kernel_of
from repfx.rewrite.prove import prove
from repfx.rewrite.weights import InFloat64


@dataclass(frozen=True)
class Lifted:
    """A module with one input and one output, as a region of its own graph.

    It is traced once; `kernel` follows the weights."""

    module: fx.GraphModule
    view: GraphView
    region: Region

    @property
    def kernel(self) -> Kernel:
        """The convolution that the module equals with its current weights."""
        return kernel_of(self.view, self.region, InFloat64(self.view, keep=False)).plain

    def prove(self) -> float:
        """The relative error of `kernel` against the module's own forward.

        Raises CheckError if it is larger than rounding."""
        return prove(self.view, self.region, self.kernel, InFloat64(self.view, keep=True))


def lifted(module: nn.Module) -> Lifted:
    """Traces a module (N, in, ...) -> (N, out, ...).

    Raises InputError if it is not linear between one input and one output.
    """
    example, _ = guess_example(module)
    if example is None:
        raise InputError("the module does not run on one image or batch of features")
    tracer = Tracer()
    graph = tracer.trace(module, example)
    normalise(graph)
    result = graph_module(module, graph, tracer)
    view = GraphView(result)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    sink = next(n for n in graph.nodes if n.op == "output").args[0]
    nodes = (
        nodes_between(view, inputs[0], sink)
        if len(inputs) == 1 and isinstance(sink, fx.Node)
        else None
    )
    if not nodes or not is_linear(view, sink):
        raise InputError("the module is not linear between one input and one output")
    return Lifted(result, view, Region(inputs[0], sink, nodes, frozenset()))


def lift(module: nn.Module) -> Kernel:
    """The Kernel of a module in eval mode.

    Raises InputError if the module is not exactly one convolution for every input size.
    """
    try:
        return lifted(module).kernel
    except Inexact as why:
        raise InputError(f"the module is not one convolution: {why.reason}") from why


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Writes a tensor into the parameter `name`, in the parameter's dtype."""
    with torch.no_grad():
        module.get_parameter(name).copy_(value)
