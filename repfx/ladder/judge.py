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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repfx.calibration.feed import feed
from repfx.data.batches import Batch
from repfx.errors import InputError, OutOfTime
from repfx.ladder.results import Score
from repfx.quant import in_eval
from repfx.rewrite.difference import tensors_of

Metric = Callable[[nn.Module], float]
ACCURACY = "accuracy"
ROOM = 2**30  # bytes of the float net's outputs that are kept; the rest is computed again


@dataclass(frozen=True)
class Failed(Exception):
    """The caller's metric failed on a net: it raised, or gave no number."""

    why: str


class Judge:
    """Judges nets against the float net on the batches held out.

    `metric`: the caller's, or "accuracy", for which the images must have labels. `right`: the float
    net's own accuracy or metric. `seconds`: how long judging it took. `unit`: what a loss is
    counted in. `notes`: what else to know of the judge.

    Raises InputError for a float net whose outputs cannot be judged without a metric, for labels
    that are not among the classes, and for a metric that fails on the float net."""

    def __init__(self, plain: nn.Module, held: list[Batch], metric: Metric | str | None) -> None:
        begun = time.perf_counter()
        self.plain, self.held, self.notes = plain, held, list[str]()
        self.metric = metric if callable(metric) else None
        self.truth: list[list[Tensor] | None] = []
        room, shapes, finite = float(ROOM), list[list[torch.Size]](), True
        for batch in held:
            outputs = self._outputs(plain, batch)
            room -= sum(t.nbytes for t in outputs)
            self.truth.append(outputs if room >= 0 else None)
            shapes.append([t.shape for t in outputs])
            finite &= all(bool(torch.isfinite(t).all()) for t in outputs)
        usable = bool(shapes[0]) and finite
        if not usable and self.metric is None:
            raise InputError(
                "the model gives NaN or infinity on the data: check both, or give a metric"
                if shapes[0]
                else "the model's outputs hold no decimal numbers: give a metric"
            )
        self.usable = usable
        self.classes = usable and all(
            len(s) == 1 and len(s[0]) == 2 and s[0][1] > 1 and s[0][0] == len(b)
            for s, b in zip(shapes, held, strict=True)
        )
        self.labels = self._labels(shapes[0][0][1], metric) if self.classes else []
        if metric == ACCURACY and not self.labels:
            raise InputError(
                "accuracy needs a label (N,) for each image, and one output (N, classes)"
            )
        self.right: float | None = None
        try:
            right = sum(self._hits(i, batch, plain) for i, batch in enumerate(held))
            self.right = self._measured(plain, right)
        except Failed as error:
            raise InputError(f"the metric failed on the float model: {error.why}") from error
        self.seconds = time.perf_counter() - begun

    @property
    def unit(self) -> str:
        if self.metric is not None:
            return "of the metric"
        if self.labels:
            return "points of accuracy"
        return "points of agreement" if self.classes else "% relative error"

    @property
    def images(self) -> int:
        return sum(map(len, self.held))

    def __call__(self, net: nn.Module) -> Score:
        """The score of a net.

        Raises Failed where the metric fails on it, and InputError where its outputs have other
        shapes than those of the float net and there is no metric."""
        sums: list[list[float]] = []
        same = right = 0
        for i, batch in enumerate(self.held):
            truth, found = self._truth(i, batch), self._outputs(net, batch)
            if [t.shape for t in truth] != [t.shape for t in found]:
                if self.metric is None:
                    raise InputError(
                        "the outputs of the quantized net have other shapes than those of the "
                        "float one, as boxes that passed a threshold do: give a metric"
                    )
                sums = [[0.0, math.inf]]
                break
            sums = sums or [[0.0, 0.0] for _ in truth]
            for total, t, y in zip(sums, truth, found, strict=True):
                total[0] += float(t.double().square().sum())
                total[1] += float((t - y).double().square().sum())
            if self.classes:
                same += int((truth[0].argmax(1) == found[0].argmax(1)).sum())
            right += self._right(i, found)
        sqnr = min((_decibel(*total) for total in sums), default=-math.inf)
        sqnr = sqnr if self.usable else -math.inf
        agreement = 100 * same / self.images if self.classes else None
        value = self._measured(net, right)
        if value is not None and self.right is not None:
            lost = self.right - value
        else:
            lost = 100 - agreement if agreement is not None else 100 * 10 ** (-sqnr / 20)
        return Score(sqnr, agreement, value, lost)

    def _truth(self, i: int, batch: Batch) -> list[Tensor]:
        kept = self.truth[i]
        return self._outputs(self.plain, batch) if kept is None else kept

    def _hits(self, i: int, batch: Batch, plain: nn.Module) -> int:
        return self._right(i, self._truth(i, batch)) if self.labels else 0

    def _right(self, i: int, outputs: list[Tensor]) -> int:
        if not self.labels:
            return 0
        return int((outputs[0].argmax(1) == self.labels[i].to(outputs[0].device)).sum())

    def _measured(self, net: nn.Module, right: int) -> float | None:
        """The metric, or else the accuracy, or else None."""
        if self.metric is not None:
            return _called(self.metric, net)
        return 100 * right / self.images if self.labels else None

    def _labels(self, classes: int, metric: Metric | str | None) -> list[Tensor]:
        """The labels of each batch, or none where they are not those of classes."""
        given = [batch.labels for batch in self.held]
        if all(v is None for v in given) or callable(metric):
            return []
        found = [_whole(v, len(b)) for v, b in zip(given, self.held, strict=True)]
        labels = [v for v in found if v is not None]
        if len(labels) < len(found):
            self.notes.append(
                "what the data gives beside images is no label (N,) of whole numbers for each, so "
                "agreement with the float net judges"
            )
            return []
        low = min(int(v.min()) for v in labels)
        high = max(int(v.max()) for v in labels)
        if low < 0 or high >= classes:
            raise InputError(
                f"labels are from 0 to {classes - 1}, as the model has {classes} classes, not from "
                f"{low} to {high}"
            )
        return labels

    @torch.no_grad()
    def _outputs(self, net: nn.Module, batch: Batch) -> list[Tensor]:
        with in_eval(net):
            return [t for t in tensors_of(feed(net, batch)) if t.is_floating_point()]


def _called(metric: Metric, net: nn.Module) -> float:
    try:
        with in_eval(net), torch.no_grad():
            value = metric(net)
        value = float(value)
    except (KeyboardInterrupt, OutOfTime):
        raise
    except Exception as error:  # the caller's code can raise anything
        raise Failed(f"{type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise Failed(f"it gave {value}")
    return value


def _whole(given: Any, count: int) -> Tensor | None:
    """Labels (N,) of classes as whole numbers, or None for anything else."""
    try:
        labels = torch.as_tensor(np.asarray(given) if isinstance(given, list) else given)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != 1 or len(labels) != count or labels.dtype == torch.bool:
        return None
    if labels.is_floating_point() or labels.is_complex():
        return None
    return labels


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise) if math.isfinite(noise) else -math.inf
