"""calibrate: one pass over the batches gives every activation quantizer its scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx, nn

from repfx.calibration.biases import PICTURES, check_correctable, correct_biases, first_of
from repfx.capture.running import quiet
from repfx.errors import InputError, unknown
from repfx.graph.effects import is_foreign
from repfx.graph.signs import non_negative
from repfx.graph.view import GraphView
from repfx.quant import METHODS, FakeQuant, Observer


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "max",
    bias: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Sets the scales of the model's activation quantizers in place and returns the model.

    `batches` yields inputs: a tensor (N, ...), a tuple or list whose first entry is one, as a
    DataLoader of (image, label) gives, or a dict of keyword arguments. Values are seen as the
    unquantized model computes them, in eval mode; activations run in place where nothing else reads
    what they are given. Memory does not grow with the number of batches. `method`: max, percentile,
    mse, mae or entropy. `bias`: whether biases then take off what rounding adds on average
    (`correct_biases`), on the first 128 inputs.

    Raises InputError for an unknown method, no batch, a batch the model does not take or that gives
    NaN, a model without quantizers, and, with `bias`, one that was not traced whole. Whatever
    happens, no quantizer is left half set."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if bias:
        check_correctable(model)
    if not isinstance(batches, Iterable):
        raise InputError(f"batches is an iterable of inputs, not {batches!r}")
    quants = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuant)}
    acts = {name: m for name, m in quants.items() if not m.of_weight}
    if not acts:
        raise InputError("the model has no quantizers: run repfx.transform(model, ['ptq']) first")
    kept = [(m, m.training) for m in model.modules()]
    weights_on = [(m, m.calibrated) for m in quants.values() if m.of_weight]
    device = next(iter([*model.parameters(), *model.buffers()])).device
    seen, first = 0, list[Any]()
    views = [GraphView(m) for m in model.modules() if isinstance(m, fx.GraphModule)]
    positive, in_place = (
        _of_non_negative(views),
        _activations(views[0]) if isinstance(model, fx.GraphModule) else [],
    )
    try:
        model.eval()
        for activation in in_place:
            activation.inplace = True
        for quant in acts.values():
            quant.observer = Observer(quant.grid, method != "max", non_negative=quant in positive)
        for quant, _ in weights_on:
            quant.calibrated = False
        with torch.no_grad():
            for batch in track(batches, "calibrating", disable=not progress):
                feed(model, batch, device)
                seen += 1
                if bias:
                    first += first_of([batch], PICTURES - sum(len(b) for b in first))
        if not seen:
            raise InputError("the calibration set is empty: give at least one batch")
        scales = {name: m.observer.scale(method) for name, m in acts.items() if m.observer.seen}
    finally:
        for quant in acts.values():
            quant.observer = None
        for quant, on in weights_on:
            quant.calibrated = on
        for activation in in_place:
            activation.inplace = False
        for m, training in kept:
            m.training = training
    for name, scale in scales.items():
        acts[name].set_scale(scale.to(acts[name].scale))
    if bias:
        correct_biases(model, first)
    return model


def _of_non_negative(views: Iterable[GraphView]) -> set[FakeQuant]:
    """The quantizers that only read values which cannot be below zero."""
    reads: dict[FakeQuant, bool] = {}
    for view in views:
        for node in view.nodes:
            quant = view.modules[str(node.target)] if node.op == "call_module" else None
            if isinstance(quant, FakeQuant):
                reads[quant] = reads.get(quant, True) and non_negative(
                    view, node.all_input_nodes[0]
                )
    return {quant for quant, positive in reads.items() if positive}


def _activations(view: GraphView) -> list[Any]:
    """The activations that may run in place, which saves time and memory: nothing else reads what
    they are given.

    None in a model with code that was not traced, which may call them as well.
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


def feed(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """What the model gives of a batch as `calibrate` takes them, run on a copy: some models
    overwrite their input.

    Raises InputError for one it does not take.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    try:
        if isinstance(batch, Mapping):
            with quiet():
                return model(
                    **{
                        k: v.to(device, copy=True) if isinstance(v, Tensor) else v
                        for k, v in batch.items()
                    }
                )
        elif isinstance(batch, Tensor):
            if batch.shape[:1] == (0,):
                raise InputError("a calibration batch is empty")
            with quiet():
                return model(batch.to(device, copy=True))
        raise InputError(f"a calibration batch is a tensor, a tuple or a dict, not a {type(batch)}")
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
        raise InputError(f"the model does not take a calibration batch{shape}: {error}") from error
