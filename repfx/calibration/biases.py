"""Bias correction: what rounding adds to a layer's output on average is taken off its bias (Nagel
et al., 2019).

b' = b + mean over pictures and places of (y - y^),

y^ with every layer before it rounded and corrected
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra import CONVS
from repfx.capture.running import quiet
from repfx.errors import InputError
from repfx.graph.run_node import last_readers, step
from repfx.quant import Affine, FakeQuant

PICTURES = 128  # activations of so many are held at a time


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[Any]) -> tuple[str, ...]:
    """Corrects the biases of a calibrated model in place and names the layers it left alone:
    without a bias of their own.

    `batches`: tensors (N, ...), or tuples that begin with one; the first 128 pictures are used. It
    is the last step: a model learned on afterwards would take the corrected biases for those of the
    float net.

    Raises InputError for a model that is no GraphModule, has several inputs or is not calibrated,
    where there is no picture, and for one with NaN or of a shape the model does not take."""
    model = check_correctable(model)
    raw = [
        name for name, m in model.named_modules() if isinstance(m, FakeQuant) and not m.calibrated
    ]
    if raw:
        raise InputError(f"{raw[0]} is not calibrated: run repfx.calibrate first")
    device = next(iter([*model.parameters(), *model.buffers()])).device
    inputs = [x.to(device) for x in first_of(batches, PICTURES)]
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
                    try:
                        _both(model, node, x, exact[i], rounded[i])
                    except (RuntimeError, ValueError, TypeError, IndexError) as error:
                        why = str(error).partition("\n")[0]
                        raise InputError(
                            f"the model does not take a batch of shape {tuple(x.shape)}: {why}"
                        ) from error
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
    if (
        not isinstance(model, fx.GraphModule)
        or sum(n.op == "placeholder" for n in model.graph.nodes) != 1
    ):
        raise InputError("biases are corrected in a model of one input that was traced whole")
    return model


def tensors_of(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The inputs of batches. Raises InputError for what is no tensor."""
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise InputError(
                f"a batch is a tensor (N, ...), or a tuple that begins with one, not {type(x)}"
            )
        yield x


def first_of(batches: Iterable[Any], count: int) -> Iterator[Tensor]:
    """Copies of the first `count` inputs of batches. Raises InputError where they hold NaN or
    infinity.
    """
    for x in tensors_of(batches) if count > 0 else ():
        if not bool(torch.isfinite(x).all()):
            raise InputError("a batch to correct biases with holds NaN or infinity")
        if len(x):
            yield x[:count].clone()
        count -= len(x)
        if count <= 0:
            return


def _both(
    model: fx.GraphModule,
    node: fx.Node,
    x: Tensor,
    exact: dict[fx.Node, Any],
    rounded: dict[fx.Node, Any],
) -> None:
    if node.op == "placeholder":
        exact[node], rounded[node] = x.clone(), x.clone()
        return
    rounded[node] = step(model, node, rounded.__getitem__)
    called = _called(model, node)
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
    tensor: Tensor | None
    if weight.op == "call_function" and isinstance(
        affine := _called(model, weight.args[0]), Affine
    ):
        weight, tensor = (
            weight.args[0].args[0],
            affine.eps,
        )  # what is added to the bias, and to none where there is none
    else:
        tensor = _constant(model, bias)
        shared = [
            n for n in model.graph.nodes if tensor is not None and _constant(model, n) is tensor
        ]
        tensor = None if len(shared) > 1 or (tensor is not None and len(bias.users) > 1) else tensor
    if not isinstance(_called(model, weight), FakeQuant):
        return  # in float
    if tensor is None:
        left.append(str(weight.target).rpartition(".")[0])
        return
    axis = -1 if node.target is F.linear else 1
    offs = [
        (e[node] - r[node]).movedim(axis, 0).flatten(1) for e, r in zip(exact, rounded, strict=True)
    ]
    off = sum(o.sum(1) for o in offs) / sum(o.shape[1] for o in offs)
    tensor.add_(off)
    for r in rounded:
        y = r[node]
        y += off if axis == -1 else off.reshape(-1, *(1,) * (y.dim() - 2))


def _called(model: fx.GraphModule, node: Any) -> nn.Module | None:
    return (
        model.get_submodule(str(node.target))
        if isinstance(node, fx.Node) and node.op == "call_module"
        else None
    )


def _constant(model: fx.GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that a node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = attrgetter(str(node.target))(model)
    return found if isinstance(found, Tensor) else None
