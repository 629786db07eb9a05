"""Judge: how far a quantized net is from the float one, on the images held out.

    SQNR       10 log10( sum y^2 / sum (y^ - y)^2 ) of the outputs, the worst of several, in dB
    agreement  how often both nets name the same class, in percent, for an output (N, classes)
    accuracy   top-1 in percent, where the images have labels (N,)
    metric     what the caller's function gives for a net; larger is better

What a net loses is in the unit of the budget: that of the metric; points of accuracy; points of
agreement; else the relative error of the output, 100 * 10^(-SQNR / 20), in percent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repfx.calibration.feed import feed
from repfx.data.batches import Batch
from repfx.errors import InputError, OutOfTime
from repfx.ladder.results import Score
from repfx.quant import in_eval
from repfx.rewrite.difference import tensors_of

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Failed(Exception):
    """The caller's metric failed on a net: it raised, or gave no number."""

    why: str


class Judge:
    """Judges nets against the float net on the batches held out.

    `right`: the float net's own score, accuracy or metric. `seconds`: how long that took. `unit`:
    what a loss is counted in.

    Raises InputError for a float net whose outputs are no numbers or not finite, and for a metric
    that fails on it."""

    def __init__(self, plain: nn.Module, held: list[Batch], metric: Metric | None) -> None:
        self.held, self.metric = held, metric
        self.truth = [self._outputs(plain, batch) for batch in held]
        first = self.truth[0]
        if not first:
            raise InputError("the model's outputs hold no decimal numbers: give a metric")
        if not all(bool(torch.isfinite(t).all()) for ts in self.truth for t in ts):
            raise InputError("the model gives NaN or infinity on the data: check both")
        self.classes = len(first) == 1 and first[0].dim() == 2 and first[0].shape[1] > 1
        labels = [_labels(batch) for batch in held] if self.classes else []
        self.labels = [v for v in labels if v is not None]
        self.labelled = bool(labels) and len(self.labels) == len(labels)
        self.right: float | None = None
        begun = time.perf_counter()
        try:
            self.right = self._measured(plain, self.truth)
        except Failed as error:
            raise InputError(f"the metric failed on the float model: {error.why}") from error
        self.seconds = time.perf_counter() - begun

    @property
    def unit(self) -> str:
        if self.metric is not None:
            return "of the metric"
        if self.labelled:
            return "points of accuracy"
        return "points of agreement" if self.classes else "% relative error"

    def __call__(self, net: nn.Module) -> Score:
        """The score of a net. Raises Failed where the metric fails on it."""
        outputs = [self._outputs(net, batch) for batch in self.held]
        sqnr = min(
            (_sqnr(list(pairs)) for pairs in zip(*map(_paired, self.truth, outputs), strict=True)),
            default=math.inf,
        )
        agreement = None
        if self.classes:
            same = [
                (a[0].argmax(1) == b[0].argmax(1)).double()
                for a, b in zip(self.truth, outputs, strict=True)
            ]
            agreement = 100 * float(torch.cat(same).mean())
        value = self._measured(net, outputs)
        if value is not None and self.right is not None:
            lost = self.right - value
        else:
            lost = 100 - agreement if agreement is not None else 100 * 10 ** (-sqnr / 20)
        return Score(sqnr, agreement, value, lost)

    def _measured(self, net: nn.Module, outputs: list[list[Tensor]]) -> float | None:
        """The metric, or else the accuracy, or else None."""
        if self.metric is not None:
            return _called(self.metric, net)
        if not self.labelled:
            return None
        right = [
            (out[0].argmax(1) == label.to(out[0].device)).double()
            for out, label in zip(outputs, self.labels, strict=True)
        ]
        return 100 * float(torch.cat(right).mean())

    @torch.no_grad()
    def _outputs(self, net: nn.Module, batch: Batch) -> list[Tensor]:
        with in_eval(net):
            return [t for t in tensors_of(feed(net, batch)) if t.is_floating_point()]


def _called(metric: Metric, net: nn.Module) -> float:
    try:
        with in_eval(net), torch.no_grad():
            value = float(metric(net))
    except (KeyboardInterrupt, OutOfTime):
        raise
    except Exception as error:  # the caller's code can raise anything
        raise Failed(f"{type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise Failed(f"it gave {value}")
    return value


def _labels(batch: Batch) -> Tensor | None:
    """Labels (N,) of classes, or None for anything else."""
    given = batch.labels
    if isinstance(given, (list, tuple)) and all(isinstance(v, int) for v in given):
        given = torch.tensor(given)
    whole = isinstance(given, Tensor) and not given.is_floating_point() and given.dim() == 1
    return given if whole and len(given) == len(batch) else None


def _paired(truth: list[Tensor], found: list[Tensor]) -> list[tuple[float, float]]:
    """The energy of each output and of its error."""
    return [
        (float(t.double().square().sum()), float((t - y).double().square().sum()))
        for t, y in zip(truth, found, strict=True)
    ]


def _sqnr(pairs: list[tuple[float, float]]) -> float:
    signal, noise = (sum(p) for p in zip(*pairs, strict=True))
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise) if math.isfinite(noise) else -math.inf
