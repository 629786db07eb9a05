"""Bias correction: what rounding adds to a layer's output on average is taken off its bias (Nagel et al., 2019).

b' = b + mean over pictures and places of (y - y^),    y^ with every layer before it rounded and corrected
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra import CONVS
from repfx.errors import InputError
from repfx.graph.calls import last_readers, step
from repfx.graph.running import quiet
from repfx.quant import FakeQuant

PICTURES = 128  # activations of so many are held at a time


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[Any]) -> tuple[str, ...]:
    """Corrects the biases of a calibrated model in place and names those it left alone: layers without a bias of their own.

    `batches`: tensors (N, ...), or tuples that begin with one; the first 128 pictures are used. It is the last step: a
    model learned on afterwards would take the corrected biases for those of the float net.

    Raises InputError for a model that is no GraphModule or has several inputs, and where there is no batch.
    """
    model = check_correctable(model)
    inputs: list[Tensor] = []
    for x in tensors_of(batches):
        inputs.append(x)
        if sum(map(len, inputs)) >= PICTURES:
            break
    if not inputs:
        raise InputError("there is nothing to correct biases with: give at least one batch")
    exact: list[dict[fx.Node, Any]] = [{} for _ in inputs]
    rounded: list[dict[fx.Node, Any]] = [{} for _ in inputs]
    left: list[str] = []
    ends = last_readers(model.graph)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with quiet():
            for node in model.graph.nodes:
                if node.op == "output":
                    break
                for i, x in enumerate(inputs):
                    _both(model, node, x, exact[i], rounded[i])
                if node.op == "call_function" and node.target in (*CONVS.values(), F.linear):
                    _correct(model, node, exact, rounded, left)
                for done in ends[node]:
                    for values in (*exact, *rounded):
                        values.pop(done, None)
    finally:
        for m, training in modes:
            m.training = training
    return tuple(left)


def check_correctable(model: nn.Module) -> fx.GraphModule:
    """The model, where its biases can be corrected. Raises InputError else."""
    if not isinstance(model, fx.GraphModule) or sum(n.op == "placeholder" for n in model.graph.nodes) != 1:
        raise InputError("biases are corrected in a model of one input that was traced whole")
    return model


def tensors_of(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The inputs of batches. Raises InputError for what is no tensor."""
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise InputError(f"a batch is a tensor (N, ...), or a tuple that begins with one, not {type(x)}")
        yield x


def _both(model: fx.GraphModule, node: fx.Node, x: Tensor, exact: dict[fx.Node, Any], rounded: dict[fx.Node, Any]) -> None:
    if node.op == "placeholder":
        exact[node], rounded[node] = x, x.clone()
        return
    rounded[node] = step(model, node, rounded.__getitem__)
    called = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if node.op == "get_attr":
        exact[node] = rounded[node]
    elif isinstance(called, FakeQuant):
        (source,) = node.all_input_nodes
        exact[node] = exact[source]
    else:
        exact[node] = step(model, node, exact.__getitem__)


def _correct(
    model: fx.GraphModule,
    node: fx.Node,
    exact: list[dict[fx.Node, Any]],
    rounded: list[dict[fx.Node, Any]],
    left: list[str],
) -> None:
    weight: Any = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    bias: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if weight.op != "call_module":
        return  # in float
    shared = [n for n in model.graph.nodes if bias is not None and n.op == "get_attr" and n.target == bias.target]
    if bias is None or bias.op != "get_attr" or len(shared) > 1 or len(bias.users) > 1:
        left.append(str(weight.target).rpartition(".")[0])
        return
    axis = -1 if node.target is F.linear else 1
    offs = [(e[node] - r[node]).movedim(axis, 0).flatten(1) for e, r in zip(exact, rounded, strict=True)]
    off = sum(o.sum(1) for o in offs) / sum(o.shape[1] for o in offs)
    model.get_parameter(str(bias.target)).add_(off)
    for r in rounded:
        y = r[node]
        y += off if axis == -1 else off.reshape(-1, *(1,) * (y.dim() - 2))
