"""TwoStreams: runs a quantized graph once on two streams of values, exact and rounded.

exact      y  = f(x)        a quantizer passes x through
rounded    y^ = Q(f)(x^)    a quantizer rounds x^
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.capture.running import quiet
from repfx.deadline import check_time
from repfx.errors import InputError
from repfx.graph.run_node import last_readers, step
from repfx.quant import FakeQuant, in_eval

Values = dict[fx.Node, Any]


class TwoStreams:
    """One graph, run node by node on several batches at a time.

    `exact` and `rounded` have, for each batch, the values of the nodes that are still to be read.
    `ends` maps each node to the values that nothing reads after it.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[tuple[Any, ...]]) -> None:
        self.module, self.inputs = module, inputs
        self.exact: list[Values] = [{} for _ in inputs]
        self.rounded: list[Values] = [{} for _ in inputs]
        self.ends = last_readers(module.graph)
        self._places = [n for n in module.graph.nodes if n.op == "placeholder"]

    @torch.no_grad()
    def walk(self, visit: Callable[[fx.Node], None]) -> None:
        """Runs the graph in eval mode, node by node on all batches.

        Calls `visit` with each node, except the output, once its values are there. If `visit`
        changes them, later nodes read the changed values. Raises InputError for a batch that the
        model does not take."""
        with in_eval(self.module):
            for node in self.module.graph.nodes:
                if node.op == "output":
                    return
                check_time()
                for args, exact, rounded in zip(self.inputs, self.exact, self.rounded, strict=True):
                    self._run(node, args, exact, rounded)
                visit(node)
                for done in self.ends[node]:
                    for values in (*self.exact, *self.rounded):
                        values.pop(done, None)

    def called(self, node: Any) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return self.module.get_submodule(str(node.target)) if is_call else None

    def _run(self, node: fx.Node, args: tuple[Any, ...], exact: Values, rounded: Values) -> None:
        if node.op == "placeholder":
            place = self._places.index(node)
            default = node.args[0] if node.args else None
            x = args[place] if place < len(args) else default
            # Copies, because the graph may write into its input.
            exact[node], rounded[node] = (v.clone() if isinstance(v, Tensor) else v for v in (x, x))
            return
        try:
            with quiet():
                rounded[node] = step(self.module, node, rounded.__getitem__)
                if node.op == "get_attr":
                    exact[node] = rounded[node]
                elif isinstance(self.called(node), FakeQuant):
                    exact[node] = exact[node.all_input_nodes[0]]
                else:
                    exact[node] = step(self.module, node, exact.__getitem__)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            why = str(error).partition("\n")[0]
            shapes = ", ".join(str(tuple(x.shape)) for x in args if isinstance(x, Tensor))
            raise InputError(f"the model does not take a batch of shape {shapes}: {why}") from error
