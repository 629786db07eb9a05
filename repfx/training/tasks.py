"""Task: what a model is trained for, as a loss and a metric.

Three tasks are built in; any object with these two methods is a task:

    class Depth:
        def loss(self, model, batch): ...   # a scalar; calls model(x) once
        def metric(self): ...               # update(model, batch), compute() -> {name: number}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repfx.data.archive import Size
from repfx.data.images import train_and_valid, validation_part
from repfx.data.packaged import PACKAGED
from repfx.data.super_resolution import Pairs
from repfx.errors import InputError, unknown
from repfx.training.detection import Detection
from repfx.training.metrics import pair, torchmetrics


class Score(Protocol):
    """A metric that is accumulated over batches.

    With several processes each one sees its share of the batches, and compute() covers them all.
    """

    def update(self, model: Callable[..., Any], batch: Any) -> None: ...

    def compute(self) -> Mapping[str, Any]: ...


class Task(Protocol):
    """What `fit` needs from a task. `metric` may return None.

    If the task has a method `distance(output, reference)` that returns a scalar, distillation uses
    it; otherwise it uses the mean absolute difference."""

    def loss(self, model: Callable[..., Any], batch: Any) -> Tensor: ...

    def metric(self) -> Score | None: ...


class Reader(Protocol):
    """A task that can read its training and validation data from a path or a name.

    `size` is the side of the images in pixels, or their (height, width) where the task takes that;
    `skip_broken` skips images that cannot be read."""

    def read(
        self, path: Any, *, size: Any = None, skip_broken: bool = False
    ) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Classification:
    """Classification: cross entropy, with top-1 and top-5 accuracy as metrics.

    The model returns logits (N, classes); labels are (N,), or probabilities (N, classes).
    `smoothing` is that of the labels, `temperature` that of distillation.
    """

    smoothing: float = 0.0
    temperature: float = 1.0

    def read(
        self, path: Any, *, size: Size | None = None, skip_broken: bool = False
    ) -> tuple[Any, Any]:
        """Reads a folder or zip of class folders, or "digits".

        The class folders may be inside `train/` and `test/` or `val/`.
        """
        if str(path) in PACKAGED and not Path(path).exists():
            return PACKAGED[str(path)]()
        return train_and_valid(path, size=size, skip_broken=skip_broken)

    def loss(self, model: Callable[..., Any], batch: Any) -> Tensor:
        x, y = pair(batch)
        logits = model(x)
        check_labels(logits, y)
        return F.cross_entropy(logits.float(), y, label_smoothing=self.smoothing)

    def distance(self, output: Tensor, reference: Tensor) -> Tensor:
        """T^2 KL(softmax(reference / T) | softmax(output / T)) (Hinton et al., 2015)."""
        t = self.temperature
        target = F.log_softmax(reference.float() / t, 1)
        return (
            t
            * t
            * F.kl_div(
                F.log_softmax(output.float() / t, 1), target, reduction="batchmean", log_target=True
            )
        )

    def metric(self) -> Score:
        return _Top()


class _Top:
    """Top-1 and top-5 accuracy; with fewer than five classes, top-5 covers all of them."""

    def __init__(self) -> None:
        self.metrics: Any = None

    def update(self, model: Callable[..., Any], batch: Any) -> None:
        x, y = pair(batch)
        logits = model(x)
        check_labels(logits, y)
        y = y.argmax(1) if y.dim() > 1 else y
        if self.metrics is None:
            accuracy, classes = torchmetrics().classification.MulticlassAccuracy, logits.shape[1]
            top = {
                f"top{k}": accuracy(classes, top_k=min(k, classes), average="micro") for k in (1, 5)
            }
            self.metrics = torchmetrics().MetricCollection(top).to(logits.device)
        self.metrics.update(logits.float(), y)

    def compute(self) -> Mapping[str, Any]:
        return {} if self.metrics is None else self.metrics.compute()


@dataclass(frozen=True)
class SuperResolution:
    """Super-resolution: L1 between model(low) and high (N, C, H, W), with PSNR in dB as metric.

    Images are Y (C = 1) or RGB (C = 3) in 0..`peak`. PSNR is computed for each image on Y (BT.601
    for RGB), clamped to 0..`peak`, without `scale` pixels at each border. `high` is cropped to the
    size of the output."""

    scale: int = 2
    peak: float = 255.0
    channels: int = 1

    def read(
        self, path: Any, *, size: Size | None = None, skip_broken: bool = False
    ) -> tuple[Any, Any]:
        """Reads a folder or zip of images; validation needs `train/` and `test/` or `val/` in it.

        Training uses random patches with a side of `size` pixels (by default 64 times the scale),
        sixteen per image and epoch. Validation uses whole images, one at a time. See `Pairs` for
        how the small images are found or made."""
        same: dict[str, Any] = {
            "scale": self.scale,
            "channels": self.channels,
            "skip_broken": skip_broken,
        }
        if not isinstance(size, int | None):
            raise InputError(f"super-resolution trains on squares: size is their side, not {size}")
        found = validation_part(path)
        part = "" if found is None else "train"
        train = Pairs(path, part, patch=size or 64 * self.scale, repeat=16, cache=True, **same)
        return train, DataLoader(Pairs(path, found, **same), 1) if found else None

    def loss(self, model: Callable[..., Any], batch: Any) -> Tensor:
        low, high = pair(batch)
        output = model(low)
        return F.l1_loss(output, _like(output, high))

    def metric(self) -> Score:
        return _Psnr(self)


class _Psnr:
    def __init__(self, task: SuperResolution) -> None:
        self.task, self.mean = task, torchmetrics().MeanMetric()

    def update(self, model: Callable[..., Any], batch: Any) -> None:
        low, high = pair(batch)
        output = model(low)
        self.mean = self.mean.to(output.device)
        self.mean.update(psnr(output, _like(output, high), self.task.scale, self.task.peak))

    def compute(self) -> Mapping[str, Any]:
        return {"psnr": self.mean.compute()}


def psnr(output: Tensor, high: Tensor, crop: int, peak: float = 255.0) -> Tensor:
    """PSNR in dB on Y of each image: two tensors (N, C, H, W) -> (N,)."""
    a, b = (
        _luma(v.clamp(0, peak).double() / peak)[..., crop : -crop or None, crop : -crop or None]
        for v in (output, high)
    )
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)))


def _luma(v: Tensor) -> Tensor:
    if v.shape[1] != 3:
        return v
    r, g, b = v.unbind(1)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255).unsqueeze(1)


def _like(output: Tensor, high: Tensor) -> Tensor:
    h, w = output.shape[-2:]
    if (
        high.dim() != 4
        or high.shape[-2] < h
        or high.shape[-1] < w
        or high.shape[:2] != output.shape[:2]
    ):
        raise InputError(
            f"the model returns {tuple(output.shape)} for target images of {tuple(high.shape)}: "
            "is the scale right?"
        )
    return high[..., :h, :w]


def check_labels(logits: Tensor, y: Tensor) -> None:
    """Raises InputError for logits that are not (N, classes), and for labels out of range."""
    if logits.dim() != 2:
        raise InputError(
            f"classification needs logits (N, classes); the model returns {tuple(logits.shape)}"
        )
    classes = logits.shape[1]
    if y.is_floating_point():
        if y.shape != logits.shape:
            raise InputError(
                f"labels are whole numbers (N,) or probabilities (N, {classes}), not "
                f"{tuple(y.shape)}"
            )
        return
    if y.dim() != 1:
        raise InputError(f"labels are whole numbers (N,), not {tuple(y.shape)}")
    wrong = y[(y < 0) | (y >= classes)]
    if len(wrong):
        raise InputError(
            f"label {int(wrong[0])} is out of range: the model has {classes} classes, 0 to "
            f"{classes - 1}"
        )


class Distilled:
    """A task with the loss (1 - share) * own loss + share * distance to the teacher's output."""

    def __init__(self, task: Task, teacher: nn.Module, share: float) -> None:
        self.task, self.teacher, self.share = task, teacher.eval(), share

    def loss(self, model: Callable[..., Any], batch: Any) -> Tensor:
        seen: list[tuple[Any, Any]] = []

        def noted(*args: Any, **kwargs: Any) -> Any:
            output = model(*args, **kwargs)
            with torch.no_grad():
                seen.append((output, self.teacher(*args, **kwargs)))
            return output

        own = self.task.loss(noted, batch)
        distance = getattr(self.task, "distance", F.l1_loss)
        return (1 - self.share) * own + self.share * sum(distance(a, b) for a, b in seen)

    def metric(self) -> Score | None:
        return self.task.metric()


TASKS: dict[str, Callable[[], Task]] = {
    "classification": Classification,
    "super-resolution": SuperResolution,
    "detection": Detection,
}


def data_of(task: str | Task, path: Any, **options: Any) -> tuple[Any, Any]:
    """The training data and the validation data (or None) that the task reads from this path.

    `options` are those of `Reader`. Raises InputError for a task that cannot read files.
    """
    reader: Any = task_of(task)
    if not callable(getattr(reader, "read", None)):
        raise InputError(
            f"{type(task)} has no read(path): give fit a data set, tensors or a DataLoader"
        )
    found: tuple[Any, Any] = reader.read(path, **options)
    return found


def task_of(task: str | Task) -> Task:
    """The task itself, or the built-in task of that name.

    Raises InputError for an unknown name, and for an object that is not a task.
    """
    if isinstance(task, str):
        if task.replace("_", "-") not in TASKS:
            raise unknown("task", task, TASKS)
        return TASKS[task.replace("_", "-")]()
    if not callable(getattr(task, "loss", None)) or not callable(getattr(task, "metric", None)):
        raise InputError(f"a task needs loss(model, batch) and metric(), {type(task)} lacks them")
    return task
