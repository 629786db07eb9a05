"""Learning a block at a time: what is run, cached and kept while `reconstruct` goes through the
model.
"""

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
from repfx.calibration.learned import learned
from repfx.calibration.segments import Segment
from repfx.errors import InputError, unknown
from repfx.files.store import write_whole
from repfx.quant import FakeQuant, Observer

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mae": lambda d: d.abs().mean(),
    "mse": lambda d: d.square().mean(),
}
ROUNDING = ("straight", "adaround")
READING = ("last", "all")


@dataclass(frozen=True)
class Block:
    """What learning did to one block: the loss of its own output over all pictures before and
    after, and its stage.
    """

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


class Run:
    """One reconstruction: the blocks, quantized and in float, and the activations between them."""

    def __init__(
        self, model: nn.Module, net: list[Segment], plain: list[Segment], o: Options, path: Any
    ) -> None:
        self.model, self.net, self.plain, self.o = model, net, plain, o
        self.path = None if path is None else Path(path)
        self.same: list[Any] = []

    def all(self, inputs: Rows, stages: Sequence[str] | None, progress: bool) -> list[Block]:
        """Learns every block. `inputs`: the pictures, a value for each input that the model
        reads."""
        ours = theirs = inputs
        done: list[Block] = []
        ends = self._stages(ours, stages)
        self.same = self._same(inputs, ends)
        start = self._restore(done)
        with Progress(disable=not progress, transient=True) as bars:
            bar = bars.add_task("learning", total=len(self.net) * self.o.iterations)
            for i, (block, plain) in enumerate(zip(self.net, self.plain, strict=True)):
                first = next((e + 1 for e in reversed(ends) if e < i), 0)
                last = next(e for e in ends if e >= i)
                with torch.no_grad():
                    targets = theirs.after(plain, self.o.batch)
                if i >= start:
                    rest = self.plain[i + 1 : last + 1]
                    share = self.o.stage * (i - first + 1) / (last - first + 1) if rest else 0.0
                    tick = lambda n, i=i: bars.update(bar, completed=i * self.o.iterations + n)  # noqa: E731
                    before, after = self._learn(i, block, rest, share, ours, theirs, targets, tick)
                    done.append(Block(block.name, ends.index(last), before, after))
                    self._save(done)
                if i < len(self.net) - 1:
                    with torch.no_grad():
                        ours, theirs = ours.after(block, self.o.batch), targets
        return done

    def _stages(self, inputs: Rows, stages: Sequence[str] | None) -> list[int]:
        """The blocks that stages end with."""
        names = [s.name for s in self.net]
        if stages is not None:
            for name in stages:
                if name not in names:
                    raise unknown("end of a stage", name, names)
            return sorted({*(names.index(n) for n in stages), len(names) - 1})
        sizes = []
        with torch.no_grad():
            x = next(inputs.batches(1))
            for block in self.plain:
                x = block(*x)
                sizes.append(x[0].shape[2:])
        return [i for i in range(len(sizes)) if i == len(sizes) - 1 or sizes[i] != sizes[i + 1]]

    def _learn(
        self,
        index: int,
        block: Segment,
        rest: list[Segment],
        share: float,
        ours: Rows,
        theirs: Rows,
        targets: Rows,
        tick: Callable[[int], Any],
    ) -> tuple[float, float]:
        o, known = self.o, self._known(index)
        self._set_steps(block, ours, known)
        before = self._error(block, ours, targets)
        state = copy.deepcopy(block.module.state_dict())
        random = torch.Generator().manual_seed((o.seed << 16) + index)
        with learned(block, o.rounding == "adaround", o.drop, random, known) as what:
            groups = [
                {"params": what.weights, "lr": o.lr if o.rounding == "straight" else 1e-2},
                {"params": what.biases, "lr": o.lr},
                {"params": what.steps, "lr": o.lr_scale},
                {"params": what.affines, "lr": o.lr_affine},
            ]
            groups = [g for g in groups if g["params"]]
            if not groups:  # a block that was named, of nothing but pools and joins
                return before, before
            optimizer = torch.optim.Adam(groups)
            fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, o.iterations)
            for n in range(o.iterations):
                rows = torch.randperm(len(ours), generator=random, device="cpu")[: o.batch]
                x, y = ours[rows], targets[rows]
                if o.drop:
                    keep = (
                        (torch.rand(v.shape, generator=random, device="cpu") < o.drop).to(v.device)
                        for v in x
                    )
                    x = tuple(torch.where(*one) for one in zip(keep, theirs[rows], x, strict=True))
                what.place()
                given = block(*x)
                value = self._off(block, given, y) + what.penalty(n / o.iterations)
                if share:
                    value = value + share * self._rest(rest, given, y)
                optimizer.zero_grad()
                try:
                    value.backward()
                except RuntimeError as error:
                    if "inplace" not in str(error):
                        raise
                    raise InputError(
                        f"block {block.name} changes a value in place that its gradient needs"
                    ) from error
                optimizer.step()
                fall.step()
                tick(n + 1)
        after = self._error(block, ours, targets)
        if not after <= before:  # never worse than where it started
            block.module.load_state_dict(state)
            after = before
        return before, after

    def _off(self, block: Segment, given: Values, y: Values) -> Tensor:
        """How far what a block made is off: the mean over all of it."""
        off = [a - b for a, b in zip(block.made(given), block.made(y), strict=True)]
        return LOSSES[self.o.loss](
            off[0] if len(off) == 1 else torch.cat([d.flatten() for d in off])
        )

    def _rest(self, rest: list[Segment], given: Values, y: Values) -> Tensor:
        terms = []
        for following in rest:
            given = following(*given)
            with torch.no_grad():
                y = following(*y)
            terms.append(self._off(following, given, y))
        return terms[-1] if self.o.reading == "last" else torch.stack(terms).mean()

    def _known(self, index: int) -> frozenset[int]:
        """The ids of the tensors and quantizers of the blocks before: what a module called again
        brings is learned.
        """
        before = [s.module for s in self.net[:index]]
        tensors = (id(t) for m in before for t in (*m.parameters(), *m.buffers()))
        return frozenset(
            (*tensors, *(id(q) for m in before for q in m.modules() if isinstance(q, FakeQuant)))
        )

    def _set_steps(self, block: Segment, inputs: Rows, known: frozenset[int]) -> None:
        """Sets the steps of activations from what the quantized net before gives, the block itself
        in float.
        """
        quants: list[Any] = [m for m in block.modules(FakeQuant).values() if id(m) not in known]
        acts = [m for m in quants if not m.of_weight]
        on = [(m, m.calibrated) for m in quants if m.of_weight]
        try:
            for m in acts:
                m.observer = Observer(m.grid)
            for m, _ in on:
                m.calibrated = False
            with torch.no_grad():
                for x in inputs.batches(self.o.batch):
                    block(*x)
            scales = [m.observer.scale(self.o.loss) for m in acts]
        finally:
            for m in acts:
                m.observer = None
            for m, was in on:
                m.calibrated = was
        for m, scale in zip(acts, scales, strict=True):
            m.set_scale(scale.to(m.scale))

    @torch.no_grad()
    def _error(self, block: Segment, inputs: Rows, targets: Rows) -> float:
        total = 0.0
        for x, y in zip(inputs.batches(self.o.batch), targets.batches(self.o.batch), strict=True):
            total += float(self._off(block, block(*x), y)) * len(x[0])
        return total / len(inputs)

    def _save(self, done: list[Block]) -> None:
        if self.path is not None:
            rows = [[b.name, b.stage, b.before, b.after] for b in done]
            flags = {
                n: m.calibrated for n, m in self.model.named_modules() if isinstance(m, FakeQuant)
            }
            content = {
                "run": self.same,
                "done": rows,
                "model": dict(self.model.state_dict()),
                "flags": flags,
            }
            write_whole(
                self.path,
                lambda part: torch.save({"format": "repfx.reconstruct 1", **content}, part),
            )

    def _restore(self, done: list[Block]) -> int:
        """Takes over what a checkpoint has; the number of blocks it did."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            same, rows, state, flags = found["run"], found["done"], found["model"], found["flags"]
        except Exception as error:  # what the unpickler raises on strange bytes has no common class
            raise InputError(
                f"{self.path} is not a checkpoint of repfx.reconstruct, or it is damaged"
            ) from error
        if same != self.same:
            raise InputError(
                f"{self.path} is a checkpoint of another run: give the pictures and options "
                "that it was made with, and the "
                "model as it was before that run; or another path"
            )
        self.model.load_state_dict(state)
        for name, m in self.model.named_modules():
            if isinstance(m, FakeQuant):
                m.calibrated = flags[name]
        done += [Block(*row) for row in rows]
        return len(done)

    def _same(self, inputs: Rows, ends: list[int]) -> list[Any]:
        """What tells this run from others: its options, blocks and stages, and a digest of the
        model and the pictures.
        """
        if self.path is None:
            return []
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
        for name, m in self.model.named_modules():
            if isinstance(m, FakeQuant):
                digest.update(f"{name} {m.grid} {m.calibrated}".encode())
        for values in inputs.batches(self.o.batch):
            for value in values:
                digest.update(_bytes(value))
        return [repr(self.o), [s.name for s in self.net], ends, digest.hexdigest()]


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
