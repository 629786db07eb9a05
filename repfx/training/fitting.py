"""fit: the training loop. A killed run continues from its checkpoint bit for bit.

This works because each step depends only on the checkpoint before it:

    order of the data    depends on (seed, epoch)
    learning rate        depends on the number of the step
    everything else      is in the checkpoint: parameters, buffers, optimizer, average, random state

Accelerate handles devices, mixed precision and several processes (`accelerate launch`, `torchrun`).
The processes share the samples of a step, and DDP averages their gradients. A batch norm sees the
samples of its own process. During an epoch the running statistics are those of the first process;
at its end they are averaged over all processes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from repfx.data.preprocessing import preprocessing_of
from repfx.errors import InputError, MissingPart
from repfx.graph.inputs import note_preprocessing
from repfx.processes import joined, leave
from repfx.quant import same_modes
from repfx.training.history import History
from repfx.training.loop import Run
from repfx.training.options import Options
from repfx.training.recipe import Recipe, recipe
from repfx.training.shuffle import source_of
from repfx.training.tasks import Distilled, Task, data_of, task_of


def fit(
    model: nn.Module,
    task: str | Task,
    data: Any,
    *,
    epochs: int | None = None,
    valid: Any = None,
    preset: str | Mapping[str, Any] | None = None,
    lr: float | None = None,
    optimizer: str | Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    weight_decay: float | None = None,
    momentum: float | None = None,
    schedule: str | Callable[[float], float] | None = None,
    warmup: float | None = None,
    decay_norm: bool | None = None,
    l2: str | None = None,
    step_lr: float | None = None,
    batch: int = 64,
    workers: int = 0,
    ema: float | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    log: str | os.PathLike[str] | None = None,
    progress: bool = True,
    device: str | None = None,
    precision: str | None = None,
    guard: bool = True,
) -> History:
    """Trains the model in place and returns its history, one row per epoch.

    A row also names the quantizers that training has made useless (see `training.watch`).

    `task`: "classification", "super-resolution", "detection", or an object with
    `loss(model, batch)` and `metric()` (see `Task`). `data`, `valid`: tensors (x, y) with N samples
    each, a data set or a DataLoader. `data` may also be a path that the task reads: a folder or zip
    of class folders, of images for super-resolution, of images with boxes in COCO's form for
    detection, or "digits". If it contains `train/` and `test/` or `val/`, the latter is used as
    `valid`. `batch`: samples per process and micro batch.

    `preset`: "repvgg", "qarepvgg", "qat", "ecbsr", "yolov6" or a dict; other arguments go first.
    Without one the default is SGD with `momentum` 0.9, `lr` 0.1 falling to 0 on a cosine, and
    `weight_decay` 1e-4. `optimizer`: sgd, adam, adamw, or a function of parameter groups; each
    follows the schedule from the `lr` it has. `step_lr`: the rate of learned steps, else `lr`.
    `schedule`: cosine, constant, or a function from progress in 0..1 to a factor. `warmup`: in
    epochs. Weight decay is not applied to parameters of one dimension unless `decay_norm` is set,
    and never to the steps of quantizers. `l2`: "plain"; or "custom" (RepVGG's) or "eq6"
    (QARepVGG's correction of it), which replace plain decay on the kernels of multi-branch blocks
    (see `CustomL2`).

    `ema`: decay of a moving average of the weights; `valid` is measured on the average, and the
    model has it at the end. `clip`: the largest gradient norm. `accumulate`: micro batches per
    step. `teacher`: a net to distill from, with the share `distill` of the loss. `device`: "cpu",
    or None for the device that accelerate finds. `precision`: no, fp16 or bf16; one per process.

    `checkpoint`: a file written after each epoch and every `checkpoint_every` steps, never half. If
    it exists and `resume` is set, the run continues from it. On the CPU the result is bit for bit
    that of a run that was never stopped, except that random numbers drawn by the data set in
    `workers` are not saved. `log`: a file with one line of JSON per epoch. `seed` sets the global
    generators of torch, numpy and Python.

    Raises InputError for data, labels, names and numbers that cannot be used, and for a checkpoint
    of another model or run. Raises CheckError, saying where, if the loss or a weight is no longer
    finite. With `guard` it does so, too, if two epochs in a row end with a model that gives every
    sample the same output, or with useless quantizers and a loss a quarter above that of the first
    step (any loss above it, if more than half of the quantizers are useless), or one with both
    faults; and if the loss, above that of the first step, has risen for three epochs, by a quarter
    of the first, while the rate has not. The last checkpoint stays. A run whose loss ends a quarter
    above its least says so in the `faults` of its last epoch. Raises MissingPart if accelerate or
    torchmetrics is missing.
    """
    said = dict(locals())  # the parameters have the same names as the fields
    rules = recipe(preset, {f.name: said[f.name] for f in fields(Recipe)})
    options = Options(**{f.name: said[f.name] for f in fields(Options)})
    return _fit(model, task, (data, valid), rules, options)


def _fit(
    model: nn.Module, task: str | Task, data: tuple[Any, Any], rules: Recipe, options: Options
) -> History:
    """Runs `fit`; `data` is what the caller gave for training and for validation."""
    goal = task_of(task)
    given, valid = data
    if isinstance(given, (str, os.PathLike)):
        given, found = data_of(task, given)
        valid = found if valid is None else valid
    note_preprocessing(model, preprocessing_of(given))
    source = source_of(given, options.batch, options.workers)
    valid_source = None if valid is None else source_of(valid, options.batch, options.workers)
    accelerator = _accelerator(options.device, options.precision)
    if options.teacher is not None:
        goal = Distilled(goal, options.teacher.to(accelerator.device), options.distill)
    with same_modes(model), _own_forward(model), torch.enable_grad():
        run = Run(accelerator, model, goal, source, rules, options)
        try:
            return run.all(valid_source)
        finally:
            accelerator.unwrap_model(run.net, keep_fp32_wrapper=False)


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """At the end, removes the forward that mixed precision has put in front of the model's own."""
    before = set(model.__dict__)
    try:
        yield
    finally:
        put = {"forward", "_original_forward", "_is_accelerate_prepared"} & set(model.__dict__)
        for name in put - before:
            del model.__dict__[name]


def _accelerator(device: str | None, precision: str | None) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingPart("training needs accelerate: pip install repfx[train]") from error
    if device not in (None, "cpu"):
        raise InputError(
            f"device is None or 'cpu', not {device!r}; use accelerate launch to choose another"
        )
    ours = not joined()
    # Without this, processes that torchrun starts on CPUs do not find each other.
    cpu = device == "cpu" or not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"accelerate does not accept device={device!r}, precision={precision!r}: {error}"
        ) from error
    if ours and joined():
        atexit.register(leave)
    return accelerator
