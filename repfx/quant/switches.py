"""What a model does for a while: values seen in float, observed, in eval mode. Whatever happens
inside, each quantizer and each module is as it was afterwards.

    with in_eval(model), in_float(weights), observing(activations) as seen:
        model(x)                # in float; each activation quantizer's observer has seen its input
    seen[quantizer].scale("mse")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from repfx.quant.fake_quant import FakeQuant
from repfx.quant.observers import Observer


def quantizers_of(model: nn.Module, of_weight: bool | None = None) -> dict[str, FakeQuant]:
    """The model's quantizers by path: all, those of weights (True) or of activations (False)."""
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
    """Inside, these quantizers pass values through and show them to observers of their own, which
    it gives by quantizer.
    """
    seen = {quant: observer(quant) for quant in quantizers}
    try:
        for quant, looks in seen.items():
            quant.observer = looks
        yield seen
    finally:
        for quant in seen:
            quant.observer = None


@contextmanager
def same_modes(*models: nn.Module) -> Iterator[None]:
    """Inside, modules may be put into training or eval mode; afterwards each is in its own."""
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
