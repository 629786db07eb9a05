"""Contexts that switch quantizers off, observe values, or put a model into eval mode.

Afterwards each quantizer and each module is in the state it had before, even after an error.

    with in_eval(model), in_float(weights), observing(activations) as seen:
        model(x)    # runs in float, and shows each activation quantizer's input to its observer
    seen[quantizer].scale("mse")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from repfx.quant.fake_quant import FakeQuant, warns
from repfx.quant.observers import Observer


def quantizers_of(model: nn.Module, of_weight: bool | None = None) -> dict[str, FakeQuant]:
    """The model's quantizers by path: of weights (True), of activations (False), or all (None)."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, FakeQuant) and of_weight in (None, m.of_weight)
    }


@contextmanager
def in_float(quantizers: Iterable[FakeQuant]) -> Iterator[None]:
    """Inside, these quantizers are off: they pass values through."""
    before = [(quant, quant.on) for quant in quantizers]
    try:
        for quant, _ in before:
            quant.on = False
        yield
    finally:
        for quant, on in before:
            quant.on = on


@contextmanager
def observing(
    quantizers: Iterable[FakeQuant],
    observer: Callable[[FakeQuant], Observer] = lambda quant: Observer(quant.grid),
) -> Iterator[dict[FakeQuant, Observer]]:
    """Inside, these quantizers pass values through, and each shows them to an observer of its own.

    Yields the observers by quantizer."""
    seen = {quant: observer(quant) for quant in quantizers}
    try:
        for quant, looks in seen.items():
            quant.observer = looks
        yield seen
    finally:
        for quant in seen:
            quant.observer = None


@contextmanager
def unset_is_fine() -> Iterator[None]:
    """Inside, quantizers that are not calibrated pass values through without a warning."""
    before = warns.set(False)
    try:
        yield
    finally:
        warns.reset(before)


@contextmanager
def same_modes(*models: nn.Module) -> Iterator[None]:
    """Inside, modules may change between training and eval mode. Afterwards each is set back."""
    before = [(m, m.training) for model in models for m in model.modules()]
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Inside, every module of the model is in eval mode."""
    with same_modes(model):
        model.eval()
        yield
