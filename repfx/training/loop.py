"""Run: one training run, what its next step depends on and the step itself.

    gradient of a step = sum over processes and micro batches of (samples / samples of the step) *
    its mean loss's

Processes set the first scale of a learned quantizer from their own samples; all go on with the mean
of these."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from repfx.errors import CheckError, InputError
from repfx.files.store import write_whole
from repfx.quant import FakeQuant
from repfx.training import checkpoint as saved
from repfx.training.average import Average
from repfx.training.history import Epoch, History
from repfx.training.recipe import Recipe, optimizer_of
from repfx.training.regularise import CustomL2
from repfx.training.shuffle import Source
from repfx.training.tasks import Task


class Run:
    """One run: what its next step depends on, and the step."""

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        task: Task,
        source: Source,
        rules: Recipe,
        ema: float | None,
        clip: float | None,
        accumulate: int,
        seed: int,
    ) -> None:
        from accelerate.utils import set_seed

        set_seed(seed, device_specific=True)
        self.accelerator, self.model, self.task, self.source, self.rules = (
            accelerator,
            model,
            task,
            source,
            rules,
        )
        self.clip, self.accumulate, self.seed = clip, accumulate, seed
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.custom = (
            None if rules.l2 == "plain" else CustomL2.of(model, denominator=rules.l2 == "custom")
        )
        free = () if self.custom is None else self.custom.kernels
        optimizer = optimizer_of(model.to(accelerator.device), rules, free)
        self.ema = None if ema is None else Average(model, ema)
        self.net = accelerator.prepare_model(model)
        self.optimizer: Any = accelerator.prepare_optimizer(optimizer)
        self.epoch, self.step = 0, 0
        self.loss, self.samples, self.seconds = 0.0, 0, 0.0  # of the epoch so far
        self.rows: list[Epoch] = []
        self.same = {
            "seed": seed,
            "samples": len(source.dataset),
            "batch": source.batch,
            "accumulate": accumulate,
            "processes": self.world,
            "ema": ema,
            "optimizer": type(optimizer).__qualname__,
        }

    def all(
        self,
        valid: Source | None,
        path: Any,
        every: int | None,
        resume: bool,
        log: Any,
        progress: bool,
    ) -> History:
        self.path = path
        resumed = None
        if path is not None and resume and Path(path).exists():
            self.restore(path)
            resumed = self.epoch + 1
        if log is not None and self.accelerator.is_main_process:
            text = "".join(row.line() + "\n" for row in self.rows)
            write_whole(log, lambda part: Path(part).write_text(text))
        console = Console(stderr=True)
        show = progress and console.is_terminal and self.accelerator.is_main_process
        with Progress(console=console, disable=not show, transient=True) as bars:
            bar = bars.add_task("training", total=self.rules.epochs * self.epoch_steps())
            while self.epoch < self.rules.epochs:
                self.train_epoch(
                    every,
                    lambda: bars.update(bar, completed=self.epoch * self.epoch_steps() + self.step),
                )
                start = time.perf_counter()
                metrics = {} if valid is None else self.score(valid)
                self.seconds += time.perf_counter() - start
                row = Epoch(
                    self.epoch + 1, self.loss / self.samples, self.lr, self.seconds, metrics
                )
                self.rows.append(row)
                self.epoch, self.step, self.loss, self.samples, self.seconds = (
                    self.epoch + 1,
                    0,
                    0.0,
                    0,
                    0.0,
                )
                self.save()
                if log is not None and self.accelerator.is_main_process:
                    with open(log, "a") as file:
                        file.write(row.line() + "\n")
                bars.update(bar, description=f"epoch {row.epoch}, loss {row.loss:.4g}")
        if self.ema is not None:
            self.ema.put(self.model)
        return History(tuple(self.rows), resumed)

    def epoch_steps(self) -> int:
        return len(self.source.steps(0, self.seed, self.accumulate, self.world, self.rank))

    def train_epoch(self, every: int | None, done: Callable[[], None]) -> None:
        """The epoch from the step it stands at."""
        steps = self.source.steps(self.epoch, self.seed, self.accumulate, self.world, self.rank)
        if not steps:
            raise InputError(
                f"{len(self.source.dataset)} samples make no batch for {self.world} processes"
            )
        self.lr = self.rules.lr_at(self.epoch * len(steps) + len(steps) - 1, len(steps))
        batches = [rows for step in steps[self.step :] for rows, _ in step]
        reader = self.source.reader(batches, self.seed, self.epoch)
        self.model.train()
        while self.step < len(steps):
            start = time.perf_counter()
            self.set_lr(self.rules.lr_at(self.epoch * len(steps) + self.step, len(steps)))
            loss = self.train_step(reader, [weight for _, weight in steps[self.step]])
            count = sum(len(rows) for rows, _ in steps[self.step])
            self.step += 1
            self.loss, self.samples = self.loss + loss * count, self.samples + count
            self.seconds += time.perf_counter() - start
            if (
                every
                and (self.epoch * len(steps) + self.step) % every == 0
                and self.step < len(steps)
            ):
                self.save()
            done()
        self.share_statistics()

    def train_step(self, reader: Any, weights: list[float]) -> float:
        """One step of the optimizer; the mean loss of its samples. Raises CheckError where it is
        not finite.
        """
        self.optimizer.zero_grad()
        new = [
            m
            for m in self.model.modules()
            if isinstance(m, FakeQuant) and m.learned and not m.calibrated
        ]
        total = torch.zeros((), device=self.accelerator.device)
        for i, weight in enumerate(weights):
            batch = self.to_device(next(reader))
            last = i == len(weights) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.net):
                with self.accelerator.autocast():
                    loss = self.task.loss(self.net, batch)
                if not isinstance(loss, Tensor) or loss.dim():
                    raise InputError(f"the loss of a task is a scalar tensor, not {loss!r}")
                total += weight * loss.detach()
                if self.custom is not None:
                    loss = loss + 0.5 * self.rules.weight_decay * self.custom.penalty()
                self.accelerator.backward(weight * loss)
        value = float(self.accelerator.reduce(total, "mean"))
        if not math.isfinite(value):
            kept = (
                f"; the last good checkpoint is {self.path}"
                if self.path and Path(self.path).exists()
                else ""
            )
            raise CheckError(
                f"the loss is {value} in epoch {self.epoch + 1}, step {self.step + 1}{kept}"
            )
        if self.world > 1:  # a scale is set by the first batch a process sees: one scale for all
            for quant in new:
                quant.scale.data.copy_(self.accelerator.reduce(quant.scale.data, "mean"))
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return value

    def score(self, valid: Source) -> dict[str, float]:
        """The task's metrics on this data, in eval mode, of the average where there is one."""
        metric = self.task.metric()
        if metric is None:
            return {}
        if len(valid.dataset) < self.world:
            raise InputError(
                f"{len(valid.dataset)} samples to validate on are fewer than {self.world} processes"
            )
        rows = list(range(self.rank, len(valid.dataset), self.world))
        batches = [rows[at : at + valid.batch] for at in range(0, len(rows), valid.batch)]
        self.model.eval()
        averaged = contextlib.nullcontext() if self.ema is None else self.ema.on(self.model)
        with torch.no_grad(), self.accelerator.autocast(), averaged:
            for batch in valid.reader(batches, self.seed, 0):
                metric.update(self.model, self.to_device(batch))
        return {name: float(value) for name, value in metric.compute().items()}

    def share_statistics(self) -> None:
        """Every process gets the mean of the buffers over processes."""
        if self.world > 1:
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer.clone(), "mean"))

    def to_device(self, batch: Any) -> Any:
        from accelerate.utils import send_to_device

        return send_to_device(batch, self.accelerator.device)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def save(self) -> None:
        saved.check_finite(self.path, self.model)
        if self.path is None:
            return
        from accelerate.utils import gather_object

        states = gather_object([saved.random_state()])
        if self.accelerator.is_main_process:
            content = {
                "optimizer": self.optimizer.state_dict(),
                "ema": None if self.ema is None else [self.ema.steps, self.ema.values],
                "scaler": None
                if self.accelerator.scaler is None
                else self.accelerator.scaler.state_dict(),
                "random": states,
                "at": [self.epoch, self.step, self.loss, self.samples, self.seconds],
                "rows": [[r.epoch, r.loss, r.lr, r.seconds, r.metrics] for r in self.rows],
                "run": self.same,
            }
            saved.write(self.path, self.model, content)
        self.accelerator.wait_for_everyone()

    def restore(self, path: Any) -> None:
        found = saved.read(path)
        saved.load_weights(path, self.model, found)
        saved.check_same_run(path, self.same, found["run"])
        self.optimizer.load_state_dict(found["optimizer"])
        if self.ema is not None:
            self.ema.steps = found["ema"][0]
            for name, value in found["ema"][1].items():
                self.ema.values[name].copy_(value)
        if found["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found["scaler"])
        self.epoch, self.step, self.loss, self.samples, self.seconds = found["at"]
        self.rows = [Epoch(*row) for row in found["rows"]]
        saved.set_random_state(found["random"][self.rank])
