"""Run: one training run, its state and its steps.

    gradient of a step = sum over processes and micro batches of
                         (samples in it / samples in the step) * gradient of its mean loss

Each process sets the first scale of a learned quantizer from its own samples; all then continue
with the mean of these scales."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from repfx.errors import CheckError, InputError
from repfx.files import checkpoint
from repfx.files.store import write_whole
from repfx.processes import gathered
from repfx.quant import quantizers_of
from repfx.training.average import Average
from repfx.training.history import Epoch, History
from repfx.training.options import Options
from repfx.training.randomness import random_state, set_random_state
from repfx.training.recipe import Recipe, optimizer_of
from repfx.training.regularise import CustomL2
from repfx.training.shuffle import Source
from repfx.training.tasks import Task
from repfx.training.watch import HINT, Seen, revive, risen, ruined, watching

KIND = "repfx.fit"  # marks its checkpoints
STATE = ("optimizer", "ema", "scaler", "random", "at", "rows", "run")


class Run:
    """One training run: everything that the next step depends on, and the steps themselves."""

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        task: Task,
        source: Source,
        rules: Recipe,
        options: Options,
    ) -> None:
        from accelerate.utils import set_seed

        set_seed(options.seed, device_specific=True)
        self.accelerator, self.model, self.task = accelerator, model, task
        self.source, self.rules, self.options = source, rules, options
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.custom = (
            None if rules.l2 == "plain" else CustomL2.of(model, denominator=rules.l2 == "custom")
        )
        free = () if self.custom is None else self.custom.kernels
        optimizer = optimizer_of(model.to(accelerator.device), rules, free)
        self.ema = None if options.ema is None else Average(model, options.ema)
        self.net = accelerator.prepare_model(model)
        # Each group follows the schedule from a rate of its own.
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.optimizer: Any = accelerator.prepare_optimizer(optimizer)
        # What the last two epochs ended with, and the loss of the first step.
        self.seen, self.before, self.first = Seen(), Seen(), math.nan
        self.epoch, self.step = 0, 0
        self.loss, self.samples, self.seconds = 0.0, 0, 0.0  # of the epoch so far
        self.rows: list[Epoch] = []
        self.same = {
            "seed": options.seed,
            "samples": len(source.dataset),
            "batch": source.batch,
            "accumulate": options.accumulate,
            "processes": self.world,
            "ema": options.ema,
            "optimizer": type(optimizer).__qualname__,
        }

    def all(self, valid: Source | None) -> History:
        """Runs all remaining epochs, and measures `valid` after each of them."""
        path, resumed = self.options.checkpoint, None
        if path is not None and self.options.resume and Path(path).exists():
            self.restore(path)
            resumed = self.epoch + 1
        self.write_log(self.rows, "w")
        console = Console(stderr=True)
        show = self.options.progress and console.is_terminal and self.accelerator.is_main_process
        with Progress(console=console, disable=not show, transient=True) as bars:
            each = len(self.steps_of(0))
            bar = bars.add_task("training", total=self.rules.epochs * each)
            while self.epoch < self.rules.epochs:
                self.train_epoch(lambda: bars.update(bar, completed=self.epoch * each + self.step))
                row = self.end_epoch(valid)
                self.write_log([row], "a")
                self.stop_if_ruined()
                self.save()
                bars.update(bar, description=f"epoch {row.epoch}, loss {row.loss:.4g}")
        if self.ema is not None:
            self.ema.put(self.model)
        return History(tuple(self.rows), resumed)

    def steps_of(self, epoch: int) -> list[list[tuple[list[int], float]]]:
        """The steps of an epoch for this process."""
        o = self.options
        return self.source.steps(epoch, o.seed, o.accumulate, self.world, self.rank)

    def end_epoch(self, valid: Source | None) -> Epoch:
        """Adds the row of the epoch, returns it and starts counting for the next epoch."""
        start = time.perf_counter()
        metrics = {} if valid is None else self.score(valid)
        seconds = self.seconds + time.perf_counter() - start
        loss = self.loss / self.samples
        row = Epoch(self.epoch + 1, loss, self.lr, seconds, metrics, self.seen.faults)
        if self.epoch == self.rules.epochs - 1:
            said = row.faults + risen(self.first, [*self.rows, row])
            row = replace(row, faults=said)
        self.rows.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss, self.samples, self.seconds = 0.0, 0, 0.0
        return row

    def stop_if_ruined(self) -> None:
        """Raises CheckError if it makes no sense to go on (see `watch`). The log has its row."""
        grids = len(quantizers_of(self.model))
        why = ruined(self.seen, self.before, self.first, self.rows, grids)
        if why and self.options.guard:
            said = "; ".join((why, *self.seen.faults))
            hint = "" if self.seen.faults else f": {HINT}"
            raise CheckError(f"stopped after epoch {self.epoch}: {said}{hint}{self.last_good()}")

    def write_log(self, rows: list[Epoch], how: str) -> None:
        """Writes one line of JSON per row; `how` is "w" to overwrite or "a" to append."""
        log, text = self.options.log, "".join(row.line() + "\n" for row in rows)
        if log is None or not self.accelerator.is_main_process:
            return
        if how == "w":
            write_whole(log, lambda part: Path(part).write_text(text))
        else:
            with open(log, how) as file:
                file.write(text)

    def train_epoch(self, done: Callable[[], None]) -> None:
        """Runs the rest of the epoch, from the current step."""
        steps, every = self.steps_of(self.epoch), self.options.checkpoint_every
        if not steps:
            raise InputError(
                f"{len(self.source.dataset)} samples are too few for a batch on {self.world} "
                "processes"
            )
        before = self.epoch * len(steps)
        self.lr = self.rules.lr_at(before + len(steps) - 1, len(steps))
        batches = [rows for step in steps[self.step :] for rows, _ in step]
        reader = self.source.reader(batches, self.options.seed, self.epoch)
        self.model.train()
        while self.step < len(steps):
            start = time.perf_counter()
            self.set_rates(self.rules.share_at(before + self.step, len(steps)))
            last = self.step == len(steps) - 1
            with watching(self.model if last else None) as seen:
                loss = self.train_step(reader, [weight for _, weight in steps[self.step]])
            if before + self.step == 0:
                self.first = loss
            count = sum(len(rows) for rows, _ in steps[self.step])
            self.step += 1
            self.loss, self.samples = self.loss + loss * count, self.samples + count
            self.seconds += time.perf_counter() - start
            if every and (before + self.step) % every == 0 and self.step < len(steps):
                self.save()
            done()
        average = None if self.ema is None else self.ema.values
        self.before, self.seen = self.seen, revive(self.model, gathered(seen), average)
        self.share_statistics()

    def train_step(self, reader: Any, weights: list[float]) -> float:
        """Takes one optimizer step and returns the mean loss of its samples.

        Raises CheckError if the loss is not finite.
        """
        self.optimizer.zero_grad()
        new = [m for m in quantizers_of(self.model).values() if m.learned and not m.calibrated]
        total = torch.zeros((), device=self.accelerator.device)
        for i, weight in enumerate(weights):
            last = i == len(weights) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.net):
                total += weight * self.backward(self.to_device(next(reader)), weight)
        value = float(self.accelerator.reduce(total, "mean"))
        if not math.isfinite(value):
            where = f"epoch {self.epoch + 1}, step {self.step + 1}"
            raise CheckError(f"the loss is {value} in {where}{self.last_good()}")
        if self.world > 1:  # each process has set new scales from its own batch: average them
            for quant in new:
                quant.scale.data.copy_(self.accelerator.reduce(quant.scale.data, "mean"))
        if self.options.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return value

    def backward(self, batch: Any, weight: float) -> Tensor:
        """Adds the weighted gradient of one micro batch, and returns the task's loss."""
        with self.accelerator.autocast():
            loss = self.task.loss(self.net, batch)
        if not isinstance(loss, Tensor) or loss.dim():
            raise InputError(f"the loss of a task is a scalar tensor, not {loss!r}")
        found = loss.detach()
        if self.custom is not None:
            loss = loss + 0.5 * self.rules.weight_decay * self.custom.penalty()
        self.accelerator.backward(weight * loss)
        return found

    def score(self, valid: Source) -> dict[str, float]:
        """The task's metrics on this data, in eval mode; with `ema`, those of the average.

        Some channels are dead in eval mode only, where norms have other statistics. In the last
        epoch its first batch brings them back, too."""
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
        last = self.epoch == self.rules.epochs - 1
        look = self.model if last and self.ema is None else None
        with torch.no_grad(), self.accelerator.autocast(), averaged:
            for batch in valid.reader(batches, self.options.seed, 0):
                with watching(look) as seen:
                    metric.update(self.model, self.to_device(batch))
                if look is not None:
                    again = revive(self.model, gathered(seen)).of_dead()
                    self.seen.faults = (*dict.fromkeys(self.seen.faults + again),)
                look = None
        return {name: float(value) for name, value in metric.compute().items()}

    def share_statistics(self) -> None:
        """Averages the buffers over all processes."""
        if self.world > 1:
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer.clone(), "mean"))

    def to_device(self, batch: Any) -> Any:
        from accelerate.utils import send_to_device

        return send_to_device(batch, self.accelerator.device)

    def set_rates(self, share: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    def last_good(self) -> str:
        """The part of an error message that names the last checkpoint, if there is one."""
        path = self.options.checkpoint
        return f"; the last checkpoint is {path}" if path and Path(path).exists() else ""

    def save(self) -> None:
        """Writes the checkpoint, if the run has one.

        Raises CheckError, and writes nothing, if a parameter is not finite.
        """
        for name, p in self.model.named_parameters():
            if not bool(torch.isfinite(p).all()):
                raise CheckError(f"parameter {name} is no longer finite{self.last_good()}")
        if self.options.checkpoint is None:
            return
        from accelerate.utils import gather_object

        states, scaler = gather_object([random_state()]), self.accelerator.scaler
        if self.accelerator.is_main_process:
            content = {
                "optimizer": self.optimizer.state_dict(),
                "ema": None if self.ema is None else [self.ema.steps, self.ema.values],
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": states,
                "at": [
                    *(self.epoch, self.step, self.loss, self.samples, self.seconds),
                    *(self.first, self.seen.constant),
                ],
                "rows": [[*asdict(r).values()] for r in self.rows],
                "run": self.same,
            }
            checkpoint.write(self.options.checkpoint, KIND, self.model, content)
        self.accelerator.wait_for_everyone()

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Continues from a checkpoint.

        Raises InputError if it is of another model, or of a run with other steps.
        """
        found = checkpoint.read(path, KIND, STATE)
        checkpoint.load_model(path, self.model, found)
        for name, value in self.same.items():
            if found["run"].get(name) != value:
                raise InputError(
                    f"{path} was written with {name}={found['run'].get(name)!r}, but this run has "
                    f"{value!r}; use the same value, or resume=False to start over"
                )
        self.optimizer.load_state_dict(found["optimizer"])
        if self.ema is not None:
            self.ema.steps = found["ema"][0]
            for name, value in found["ema"][1].items():
                if name in self.ema.values:  # repfx 0.1 has averages of scales, too
                    self.ema.values[name].copy_(value)
        if found["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found["scaler"])
        # repfx 0.1 wrote neither the loss of the first step nor faults.
        self.epoch, self.step, self.loss, self.samples, self.seconds = found["at"][:5]
        later = [*found["at"][5:], *(math.nan, False)[len(found["at"]) - 5 :]]
        self.first = later[0]
        self.rows = [Epoch(*row[:5], *map(tuple, row[5:])) for row in found["rows"]]
        said = self.rows[-1].faults if self.rows else ()
        ended = risen(self.first, self.rows)
        self.seen = Seen(tuple(line for line in said if line not in ended), bool(later[1]))
        set_random_state(found["random"][self.rank])
