"""Block-by-block reconstruction: the run, its cached activations and its checkpoints."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from repfx.calibration.activations import Rows, Values
from repfx.calibration.learned import Learned, learned
from repfx.calibration.segments import Segment
from repfx.deadline import check_time
from repfx.errors import InputError, OutOfTime, unknown
from repfx.files import checkpoint
from repfx.processes import add_up, agreed, gathered, place
from repfx.quant import in_float, observing, quantizers_of, together

KIND = "repfx.reconstruct"  # marks its checkpoints

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mae": lambda d: d.abs().mean(),
    "mse": lambda d: d.square().mean(),
}
ROUNDING = ("straight", "adaround")
READING = ("last", "all")


@dataclass(frozen=True)
class Block:
    """The result for one block: its stage, and the loss of its output before and after learning.

    The loss is the mean over all images."""

    name: str
    stage: int
    before: float
    after: float


@dataclass(frozen=True)
class Options:
    """The numbers of a run; see `reconstruct`."""

    loss: str
    stage: float
    reading: str
    iterations: int
    batch: int
    rounding: str
    drop: float
    lr: float
    lr_scale: float
    lr_affine: float
    seed: int


@dataclass(frozen=True)
class Lesson:
    """One block to learn.

    `ours` and `theirs` are its inputs in the quantized net and in the float net; `targets` are the
    outputs it should give. `rest` are the float blocks after it in its stage, whose error is
    weighted by `share`.
    """

    index: int
    block: Segment
    rest: tuple[Segment, ...]
    share: float
    ours: Rows
    theirs: Rows
    targets: Rows


@dataclass(frozen=True)
class Split:
    """Which images this process has, of those of all processes.

    `own`: for each image, in the order of all batches, its row here, or -1 if another process has
    it. (images,)"""

    own: Tensor

    @staticmethod
    def of(batches: list[tuple[int, int]]) -> Split:
        """The split where this process has batches with these places and lengths."""
        rank = place()[0]
        every = sorted((at, r, n) for r, found in enumerate(gathered(batches)) for at, n in found)
        parts, row = list[Tensor](), 0
        for _, owner, count in every:
            mine = owner == rank
            parts.append(
                torch.arange(row, row + count, device="cpu")
                if mine
                else torch.full((count,), -1, device="cpu")
            )
            row += count if mine else 0
        return Split(torch.cat(parts))

    def __len__(self) -> int:
        return len(self.own)

    def draw(self, count: int, random: torch.Generator) -> tuple[Tensor, float]:
        """Draws images of all processes: the rows of those that are here, and their share."""
        order = torch.randperm(len(self), generator=random, device="cpu")[:count]
        rows = self.own[order]
        rows = rows[rows >= 0]
        return rows, len(rows) / len(order)


class Run:
    """One reconstruction: the blocks, quantized and in float, and the activations between them."""

    def __init__(
        self, model: nn.Module, net: list[Segment], plain: list[Segment], o: Options, path: Any
    ) -> None:
        self.model, self.net, self.plain, self.o = model, net, plain, o
        self.path = None if path is None else Path(path)
        self.same: list[Any] = []

    def all(
        self,
        inputs: Rows,
        split: Split,
        one: Values,
        stages: Sequence[str] | None,
        progress: bool,
    ) -> list[Block]:
        """Learns every block. `inputs`: the images, one tensor for each input of the model.

        `one`: a single image, the same in all processes."""
        ours = theirs = inputs
        self.split = split
        ends = self._stages(one, stages)
        self.same = self._same(inputs, ends)
        done = self._restore()
        start = len(done)
        with Progress(disable=not progress or place()[0] > 0, transient=True) as bars:
            bar = bars.add_task("learning", total=len(self.net) * self.o.iterations)
            for i, (block, plain) in enumerate(zip(self.net, self.plain, strict=True)):
                with torch.no_grad():
                    targets = theirs.after(plain, self.o.batch)
                if i >= start:
                    rest, share = self._rest_of_stage(i, ends)
                    tick = lambda n, i=i: bars.update(bar, completed=i * self.o.iterations + n)  # noqa: E731
                    lesson = Lesson(i, block, rest, share, ours, theirs, targets)
                    stage = sum(end < i for end in ends)
                    done.append(Block(block.name, stage, *self._learn(lesson, tick)))
                    self._save(done)
                if i < len(self.net) - 1:
                    with torch.no_grad():
                        ours, theirs = ours.after(block, self.o.batch), targets
        return done

    def _rest_of_stage(self, i: int, ends: list[int]) -> tuple[tuple[Segment, ...], float]:
        """The float blocks after block i in its stage, and lambda (i / n), or 0 without any."""
        first = next((e + 1 for e in reversed(ends) if e < i), 0)
        last = next(e for e in ends if e >= i)
        rest = tuple(self.plain[i + 1 : last + 1])
        return rest, self.o.stage * (i - first + 1) / (last - first + 1) if rest else 0.0

    def _stages(self, x: Values, stages: Sequence[str] | None) -> list[int]:
        """The index of the last block of each stage."""
        names = [s.name for s in self.net]
        if stages is not None:
            for name in stages:
                if name not in names:
                    raise unknown("end of a stage", name, names)
            return sorted({*(names.index(n) for n in stages), len(names) - 1})
        sizes = []
        with torch.no_grad():
            for block in self.plain:
                x = block(*x)
                sizes.append(x[0].shape[2:])
        return [i for i in range(len(sizes)) if i == len(sizes) - 1 or sizes[i] != sizes[i + 1]]

    def _learn(self, lesson: Lesson, tick: Callable[[int], Any]) -> tuple[float, float]:
        """Learns one block; returns its error before and after, which is never the larger one."""
        o, block, known = self.o, lesson.block, self._known(lesson.index)
        self._set_steps(block, lesson.ours, known)
        before = self._error(block, lesson.ours, lesson.targets)
        state = copy.deepcopy(block.module.state_dict())
        number, (rank, world) = (o.seed << 16) + lesson.index, place()
        random = torch.Generator().manual_seed(number)
        # What is left in float is drawn in each process on its own.
        dropped = random if world == 1 else torch.Generator().manual_seed((number << 8) + rank)
        try:
            with learned(block, o.rounding == "adaround", o.drop, dropped, known) as what:
                groups = self._groups(what)
                if not groups:  # a block that the caller named, with nothing but pools and joins
                    return before, before
                optimizer = torch.optim.Adam(groups)
                fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, o.iterations)
                for n in range(o.iterations):
                    check_time()
                    optimizer.zero_grad()
                    self._backward(lesson, what, (random, dropped), n / o.iterations)
                    optimizer.step()
                    fall.step()
                    tick(n + 1)
        except OutOfTime:  # a block is learned whole or stays as it was
            block.module.load_state_dict(state)
            raise
        after = self._error(block, lesson.ours, lesson.targets)
        if not after <= before:  # never worse than at the start
            block.module.load_state_dict(state)
            after = before
        return before, after

    def _groups(self, what: Learned) -> list[dict[str, Any]]:
        """The parameter groups for the optimizer, each with its learning rate."""
        rate = self.o.lr if self.o.rounding == "straight" else 1e-2
        groups = [
            {"params": what.weights, "lr": rate},
            {"params": what.biases, "lr": self.o.lr},
            {"params": what.steps, "lr": self.o.lr_scale},
            {"params": what.affines, "lr": self.o.lr_affine},
        ]
        return [g for g in groups if g["params"]]

    def _backward(
        self,
        lesson: Lesson,
        what: Learned,
        random: tuple[torch.Generator, torch.Generator],
        done: float,
    ) -> None:
        """The gradients of L_i on a random batch, over all processes.

        `random`: draws the batch, and what is left in float. `done`: the share of iterations so
        far."""
        rows, share = self.split.draw(self.o.batch, random[0])
        what.place()
        value = what.penalty(done) / place()[1]
        if share:
            value = value + share * self._loss(lesson, rows, random[1])
        if isinstance(value, Tensor):
            _backward(value, lesson.block.name)
        if place()[1] > 1:
            learned = [p for group in self._groups(what) for p in group["params"]]
            for p in learned:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            add_up([p.grad for p in learned])

    def _loss(self, lesson: Lesson, rows: Tensor, random: torch.Generator) -> Tensor:
        """L_i on these images."""
        x, y = lesson.ours[rows], lesson.targets[rows]
        if self.o.drop:
            keep = (
                (torch.rand(v.shape, generator=random, device="cpu") < self.o.drop).to(v.device)
                for v in x
            )
            x = tuple(torch.where(*one) for one in zip(keep, lesson.theirs[rows], x, strict=True))
        given = lesson.block(*x)
        value = self._off(lesson.block, given, y)
        return value + lesson.share * self._rest(lesson.rest, given, y) if lesson.share else value

    def _off(self, block: Segment, given: Values, y: Values) -> Tensor:
        """The mean error of what a block computed."""
        off = [a - b for a, b in zip(block.made(given), block.made(y), strict=True)]
        return LOSSES[self.o.loss](
            off[0] if len(off) == 1 else torch.cat([d.flatten() for d in off])
        )

    def _rest(self, rest: Sequence[Segment], given: Values, y: Values) -> Tensor:
        terms = []
        for following in rest:
            given = following(*given)
            with torch.no_grad():
                y = following(*y)
            terms.append(self._off(following, given, y))
        return terms[-1] if self.o.reading == "last" else torch.stack(terms).mean()

    def _known(self, index: int) -> frozenset[int]:
        """The ids of the tensors and quantizers of earlier blocks, which are learned already."""
        before = [s.module for s in self.net[:index]]
        tensors = (id(t) for m in before for t in (*m.parameters(), *m.buffers()))
        return frozenset((*tensors, *(id(q) for m in before for q in quantizers_of(m).values())))

    def _set_steps(self, block: Segment, inputs: Rows, known: frozenset[int]) -> None:
        """Sets the activation steps from the quantized net's input, with the weights in float."""
        quants = [m for m in quantizers_of(block.module).values() if id(m) not in known]
        weights = [m for m in quants if m.of_weight]
        acts = [m for m in quants if not m.of_weight]
        with torch.no_grad(), in_float(weights), observing(acts) as seen:
            with agreed():
                for x in inputs.batches(self.o.batch):
                    block(*x)
            together(seen.values())
            scales = {quant: looks.scale(self.o.loss) for quant, looks in seen.items()}
        for quant, scale in scales.items():
            quant.set_scale(scale.to(quant.scale))

    @torch.no_grad()
    def _error(self, block: Segment, inputs: Rows, targets: Rows) -> float:
        total = 0.0
        for x, y in zip(inputs.batches(self.o.batch), targets.batches(self.o.batch), strict=True):
            total += float(self._off(block, block(*x), y)) * len(x[0])
        return float(sum(gathered(total))) / len(self.split)

    def _save(self, done: list[Block]) -> None:
        if self.path is not None and place()[0] == 0:
            rows = [[b.name, b.stage, b.before, b.after] for b in done]
            checkpoint.write(self.path, KIND, self.model, {"run": self.same, "done": rows})

    def _restore(self) -> list[Block]:
        """Loads the checkpoint, if there is one, and returns the blocks that are done."""
        if self.path is None:
            return []
        found: Any = None
        with agreed():  # the first process writes it, and others may have no such file
            if place()[0] == 0 and self.path.exists():
                found = checkpoint.read(self.path, KIND, ("run", "done"))
        found = gathered(found)[0]
        if found is None:
            return []
        if found["run"] != self.same:
            raise InputError(
                f"{self.path} is a checkpoint of another run: use the same images, options and "
                "initial model as that run, or another path"
            )
        checkpoint.load_model(self.path, self.model, found)
        return [Block(*row) for row in found["done"]]

    def _same(self, inputs: Rows, ends: list[int]) -> list[Any]:
        """What identifies this run: options, blocks, stages, and a digest of model and images."""
        if self.path is None:
            return []
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
        for name, quant in quantizers_of(self.model).items():
            digest.update(f"{name} {quant.grid} {quant.calibrated}".encode())
        for values in inputs.batches(self.o.batch):
            for value in values:
                digest.update(_bytes(value))
        digests = " ".join(gathered(digest.hexdigest()))
        return [repr(self.o), [s.name for s in self.net], ends, digests]


def _backward(value: Tensor, name: str) -> None:
    """Runs backward. Raises InputError if the block overwrites a value that its gradient needs."""
    try:
        value.backward()
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise InputError(
            f"block {name} changes in place a value that its gradient needs"
        ) from error


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
