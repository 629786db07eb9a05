"""fit: the training loop. A step is a function of the checkpoint before it, so a killed run goes on
bit for bit.

    order of the data    (seed, epoch)                   learning rate    the number of the step
    everything else      in the checkpoint: parameters, buffers, optimizer, average, random state

Devices, mixed precision and several processes are accelerate's (`accelerate launch`, `torchrun`).
Processes share a step's samples and their gradients are averaged by DDP. Batch norms see the
samples of their own process; the first process's running statistics count during an epoch, the mean
over processes at its end."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from repfx.errors import InputError, MissingPart
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
) -> History:
    """Trains the model in place and returns what happened, an epoch a row.

    `task`: "classification", "super-resolution", or an object with `loss(model, batch)` and
    `metric()` (see `Task`). `data`, `valid`: tensors (x, y) of N samples, a data set or a
    DataLoader. `data` may be a path, which the task reads: a folder or zip of class folders, or of
    pictures for super-resolution (with `train/` and `test/` or `val/` in it, the latter is
    `valid`), or "digits". `batch`: samples a process and micro batch.

    `preset`: "repvgg", "qarepvgg", "qat", "ecbsr" or a dict, for what is not given here; without it
    SGD with `momentum` 0.9, `lr` 0.1 falling on a cosine to 0, `weight_decay` 1e-4. `optimizer`:
    sgd, adam, adamw or a function of parameter groups. `schedule`: cosine, constant, or a function
    from 0..1 to a factor. `warmup`: epochs. Weight decay leaves out parameters of one dimension
    unless `decay_norm`, and the scales of quantizers always. `l2`: "plain", or "custom" (RepVGG's)
    or "eq6" (QARepVGG's repair) in place of plain decay on the kernels of multi-branch blocks
    (`CustomL2`).

    `ema`: decay of an average of the weights, which `valid` is measured on and the model has in the
    end. `clip`: largest norm of the gradient. `accumulate`: micro batches a step. `teacher`: a net
    whose outputs make up `distill` of the loss. `device`: None takes what accelerate finds, "cpu"
    the CPU. `precision`: no, fp16 or bf16, one a process.

    `checkpoint`: a file, written whole each epoch and every `checkpoint_every` steps. If it is
    there and `resume`, the run goes on from it; on the CPU the result is that of a run which was
    never stopped, bit for bit. Random numbers a data set draws in `workers` of its own are not in
    it. `log`: a file with a line of JSON an epoch. `seed` sets the global generators of torch,
    numpy and Python.

    Raises InputError for data, labels, names and numbers that cannot be used and for a checkpoint
    of another model or run; CheckError where the loss or a weight is no longer finite, saying
    where: nothing is written then; MissingPart where accelerate or torchmetrics is not installed.
    """
    said = dict(locals())  # the names of the parameters are those of the fields
    rules = recipe(preset, {f.name: said[f.name] for f in fields(Recipe)})
    options = Options(**{f.name: said[f.name] for f in fields(Options)})
    return _fit(model, task, (data, valid), rules, options)


def _fit(
    model: nn.Module, task: str | Task, data: tuple[Any, Any], rules: Recipe, options: Options
) -> History:
    """`fit` on `data` as it was given: to train on and to validate on."""
    goal = task_of(task)
    given, valid = data
    if isinstance(given, (str, os.PathLike)):
        given, found = data_of(task, given)
        valid = found if valid is None else valid
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
    """Takes off the model, at the end, what mixed precision puts in front of its own forward."""
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
            f"device is None or 'cpu', not {device!r}; accelerate launch chooses others"
        )
    ours = not _joined()
    try:
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"accelerate refuses device={device!r}, precision={precision!r}: {error}"
        ) from error
    if (
        ours and _joined()
    ):  # a process that ends inside a group may abort in its threads' destructors
        atexit.register(_leave)
    return accelerator


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _leave() -> None:
    if _joined():
        torch.distributed.destroy_process_group()
