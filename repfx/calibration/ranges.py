"""calibrate: sets the scale of every activation quantizer in one pass over the batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx, nn

from repfx.calibration.biases import IMAGES, correct_biases, input_of
from repfx.calibration.feed import arguments, feed
from repfx.calibration.optional import set_scales
from repfx.data.batches import Batch, Batches
from repfx.data.preprocessing import preprocessing_of
from repfx.data.share import Share
from repfx.errors import InputError, unknown
from repfx.graph.effects import is_foreign
from repfx.graph.inputs import note_inputs, note_preprocessing
from repfx.graph.signs import non_negative
from repfx.graph.view import GraphView
from repfx.processes import agreed, gathered
from repfx.quant import (
    METHODS,
    FakeQuant,
    Observer,
    in_eval,
    in_float,
    observing,
    quantizers_of,
    together,
)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "max",
    bias: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Sets the scales of the model's activation quantizers in place and returns the model.

    `batches`: any iterable of tensors (N, ...), of tuples or lists that start with one, as from a
    DataLoader of (image, label), or of dicts of keyword arguments (see the table in
    `repfx.data.Batches`). The ranges are those of the unquantized model in eval mode. Memory does
    not grow with the number of batches. `method`: max, percentile, mse, mae or entropy. `bias`:
    also corrects the biases with the first 128 images (see `correct_biases`). Quantizers that only
    save memory traffic are taken out of the graph if their ranges would cost too much accuracy (see
    `repfx.calibration.optional`).

    With several processes (`torchrun`) all must call it. They share the images (see
    `repfx.data.share`) and get the same scales, those that one process would set.

    Raises InputError for an unknown method, if there is no image, for a batch that the model does
    not take or that gives NaN, for a negative number in an input that `ptq` was told has none, for
    a model without quantizers and, with `bias`, for a model that was not traced whole or has
    several inputs. After an error either all scales are set or none."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    kept: list[tuple[int, Batch]] = []
    given = Batches(batches, finite=bias)
    acts = quantizers_of(model, of_weight=False)
    name = input_of(model) if bias else ""
    if not acts:
        raise InputError("the model has no quantizers: run repfx.transform(model, ['ptq']) first")
    share = Share(given)
    shares = track(share, "calibrating", total=length_hint(given) or None, disable=not progress)
    shown = _keeping(shares, name, kept) if bias else (batch for _, batch in shares)
    scales = _scales(model, acts.values(), shown, method)
    share.check()
    note_preprocessing(model, preprocessing_of(batches))
    set_scales(model, scales)
    if bias:
        every = sorted((pair for pairs in gathered(kept) for pair in pairs), key=lambda p: p[0])
        correct_biases(model, [batch for _, batch in every])
    return model


def ranges(model: nn.Module, batches: Iterable[Any]) -> dict[str, dict[FakeQuant, Tensor]]:
    """The scales of the activation quantizers by every method, from one pass over the batches.

    Raises InputError as `calibrate` does. The model does not change."""
    quants = quantizers_of(model, of_weight=False).values()
    seen = _seen(model, quants, Batches(batches), histogram=True)
    return {m: {q: looks.scale(m) for q, looks in seen.items()} for m in METHODS}


def _scales(
    model: nn.Module, quants: Iterable[FakeQuant], batches: Iterable[Batch], method: str
) -> dict[FakeQuant, Tensor]:
    """The scale of each quantizer that runs, measured while the model runs in float."""
    seen = _seen(model, quants, batches, histogram=method != "max")
    return {quant: looks.scale(method) for quant, looks in seen.items()}


def _seen(
    model: nn.Module, quants: Iterable[FakeQuant], batches: Iterable[Batch], histogram: bool
) -> dict[FakeQuant, Observer]:
    """What each quantizer that runs sees, while the model runs in float."""
    views = [GraphView(m) for m in model.modules() if isinstance(m, fx.GraphModule)]
    positive = _of_non_negative(views)
    told = _of_unsigned_inputs(quants, positive, views)
    in_place = _activations(views[0]) if isinstance(model, fx.GraphModule) else []

    def observer(quant: FakeQuant) -> Observer:
        return Observer(quant.grid, histogram, quant in positive, checked=quant in told)

    weights = quantizers_of(model, of_weight=True).values()
    with (
        torch.no_grad(),
        in_eval(model),
        _writing_in_place(in_place),
        in_float(weights),
        observing(quants, observer) as seen,
    ):
        with agreed():
            for i, batch in enumerate(batches):
                feed(model, batch)
                if i == 0:
                    note_inputs(model, arguments(model, batch.inputs))
        together(seen.values())
        return {quant: looks for quant, looks in seen.items() if looks.seen}


def _keeping(
    batches: Iterable[tuple[int, Batch]], name: str, kept: list[tuple[int, Batch]]
) -> Iterator[Batch]:
    """Yields the batches, and puts copies of the first images into `kept` for bias correction."""
    left = IMAGES
    for at, batch in batches:
        if left > 0:
            (x,) = batch.of_inputs([name])
            kept.append((at, Batch(x[:left].clone())))
            left -= len(x)
        yield batch


@contextmanager
def _writing_in_place(activations: Iterable[Any]) -> Iterator[None]:
    try:
        for activation in activations:
            activation.inplace = True
        yield
    finally:
        for activation in activations:
            activation.inplace = False


def _of_non_negative(views: Iterable[GraphView]) -> set[FakeQuant]:
    """The quantizers whose inputs can never be negative."""
    reads: dict[FakeQuant, bool] = {}
    for view in views:
        for node in view.nodes:
            quant = view.modules[str(node.target)] if node.op == "call_module" else None
            if isinstance(quant, FakeQuant):
                reads[quant] = reads.get(quant, True) and non_negative(
                    view, node.all_input_nodes[0]
                )
    return {quant for quant, positive in reads.items() if positive}


def _of_unsigned_inputs(
    quants: Iterable[FakeQuant], positive: set[FakeQuant], views: Iterable[GraphView]
) -> set[FakeQuant]:
    """The quantizers that are unsigned because the inputs of the graph were said to be."""
    unsure = {quant for quant in quants if not quant.grid.signed} - positive
    if not unsure:
        return unsure
    return unsure & _of_non_negative(GraphView(view.module, ("*",)) for view in views)


def _activations(view: GraphView) -> list[Any]:
    """The activations that can run in place, to save memory: nothing else reads their input.

    Empty for a model with code that was not traced, because that code may call them, too.
    """
    modules = view.modules
    calls: dict[str, bool] = {}
    for node in view.nodes:
        if node.op == "call_module":
            name = str(node.target)
            hooked = any(
                _is_hooked(modules[str(n.target)])
                for n in (node, *node.all_input_nodes)
                if n.op == "call_module"
            )
            calls[name] = calls.get(name, True) and view.writes.may_write(node) and not hooked
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        if name and is_foreign(module):
            return []
        if getattr(module, "inplace", True) is False:
            names.setdefault(module, []).append(name)
    return [module for module, of in names.items() if all(calls.get(name) for name in of)]


def _is_hooked(module: nn.Module) -> bool:
    every = nn.modules.module
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        every._global_forward_hooks,
        every._global_forward_pre_hooks,
    )
    return any(hooks)
