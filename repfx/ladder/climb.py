"""quantize: climbs from cheap ways to quantize to dear ones, and keeps the best net.

Each rung is judged on images held out from calibration. With a budget the climb ends at the first
rung that meets it, and layers are left wide only where nothing else does. Without one it goes as
far as the time allows, with every layer in integers."""

from __future__ import annotations

import hashlib
import math
import os
import time as clock
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from repfx.calibration.feed import arguments, feed
from repfx.data.preprocessing import preprocessing_of
from repfx.deadline import within
from repfx.errors import CheckError, InputError, OutOfTime
from repfx.graph.inputs import note_preprocessing, noted_preprocessing
from repfx.ladder.costs import Costs, costs, size_of
from repfx.ladder.images import Split
from repfx.ladder.judge import ACCURACY, Failed, Judge, Metric
from repfx.ladder.results import Quantized, Rung
from repfx.ladder.rungs import LEFT_WIDE, STEPS, Maker, Pace, Recipe
from repfx.processes import place
from repfx.quant import METHODS, Grid, in_eval, quantizers_of
from repfx.rewrite.runner import rewrite

TIME = 600.0


@torch.inference_mode(False)
def quantize(
    model: nn.Module | torch.export.ExportedProgram,
    data: Iterable[Any],
    *,
    target: str = "tensorrt",
    metric: Metric | str | None = None,
    budget: float | None = None,
    time: float = TIME,
    bits: int = 8,
    weight_bits: int | None = None,
    example: Any = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    plan: Callable[[str], Any] | None = None,
) -> Quantized:
    """The best quantized net for a budget of accuracy and of time.

    It tries, from cheap to dear: five ways to choose ranges; corrected biases; blocks learned to
    match the float net; and, where a budget is given and not met, the worst layers left wide. Every
    fourth image is held out, and up to 256 of these, spread over all, judge the nets; the other
    three of four calibrate. The model given does not change.

    `data`: batches as for `calibrate`. If its images have labels (N,), accuracy judges. `metric`: a
    function of a net that returns a number, larger is better, which then judges; each call gets
    another net. "accuracy" demands labels. Otherwise the net with the best SQNR is chosen.
    `budget`: how much may be lost, in units of the metric, points of accuracy, points of agreement
    with the float net, or, where outputs are not classes, percent of relative error. The climb ends
    with the first step that meets it. `time`: the seconds it may take; what does not fit is left
    out, and learning stops in time. A metric and the reading of one batch are not interrupted.
    `bits`, `weight_bits`: as for the pass `ptq`, which is told that an input is `unsigned` where no
    image has a negative number. `example`: as for `transform`, by default the first images.
    `checkpoint`: a folder in which interrupted learning continues. `plan`: called with a line for
    each step, before the work starts. The result follows from the seed and from which steps ran.

    Raises InputError where `transform` and `calibrate` do, for a model that is quantized already,
    fewer than four images, a metric that fails on the float net, an option out of range, and for a
    time that is too short for ranges alone."""
    started = clock.monotonic()
    folder = _checked(time, budget, (bits, weight_bits), seed, checkpoint)
    _check_model(model, metric)
    with within(time):
        try:
            images = Split(data)
            if example is None:
                example = images.first(2)[0].inputs
            plain = rewrite(model, ["fuse"], example, target)[0].eval()
            judge = Judge(plain, images.held, metric)
            pace = _pace(plain, images, judge)
        except OutOfTime as error:
            raise InputError(
                f"time={time:g} is too short to read the images and to run the float model on them"
            ) from error
    key = _key(plain, images, (bits, weight_bits, target, seed)) if folder else ""
    same = (target, example, seed, folder, key, progress)
    maker = Maker(model, images, bits, weight_bits, *same, _unsigned(plain, images))
    climb = _Climb(maker, judge, pace, budget, started + time)
    climb.one = arguments(plain, images.one().inputs)
    for line in climb.planned(time):
        (plan or (lambda _: None))(line)
    climb.ranges()
    climb.better()
    found = climb.result(size_of(plain), clock.monotonic() - started)
    note_preprocessing(found.model, preprocessing_of(data) or noted_preprocessing(model))
    return found


@dataclass
class _Climb:
    """One climb: what was tried so far, and the best net."""

    maker: Maker
    judge: Judge
    pace: Pace
    budget: float | None
    end: float
    one: tuple[Any, ...] = ()
    rungs: list[Rung] = field(default_factory=list)
    best: Rung | None = None
    net: nn.Module | None = None
    base: nn.Module | None = None  # the best net with ranges alone, from which the others start
    recipe: Recipe = field(default_factory=lambda: Recipe("max"))  # of the best net
    cost: Costs | None = None  # of the best net
    costs: dict[tuple[str, ...], Costs] = field(default_factory=dict)  # by the layers left wide
    declined: list[Any] = field(default_factory=list)

    @property
    def left(self) -> float:
        return max(0.0, self.end - clock.monotonic())

    @property
    def met(self) -> bool:
        lost = math.inf if self.best is None or self.best.score is None else self.best.score.lost
        return self.budget is not None and lost <= self.budget

    def planned(self, time: float) -> list[str]:
        """What each step should take. Raises InputError if the time is too short for the first."""
        ranges = self.pace.of(Recipe("max")) + 4 * self.pace.judge
        if ranges > self.left:
            raise InputError(
                f"time={time:g} is too short: choosing ranges alone takes about {ranges:.0f} s "
                f"more with {self.pace.calibrating} images; give fewer images or more time"
            )
        kinds = {
            "ranges": ranges,
            "corrected biases": self.pace.of(Recipe("max", bias=True)),
            **{
                f"learned, {n} steps for each block": self.pace.of(Recipe("max", steps=n))
                for n in STEPS
            },
        }
        if self.budget is not None:
            kinds["each try with some layers wide"] = self.pace.of(Recipe("max", True, 0, ("",)))
        lines = [f"{name}: about {seconds:.0f} s" for name, seconds in kinds.items()]
        return [*lines, f"time left: {self.left:.0f} s"]

    def ranges(self) -> None:
        """The first step, from which the others start. Raises InputError if the time runs out."""
        begun = clock.monotonic()
        base, self.declined = self.maker.placed()
        if not quantizers_of(base):
            hint = "; ".join(map(str, self.declined[:3]))
            raise InputError(f"no layer of the model can run in integers: {hint}")
        self.pace = replace(self.pace, making=clock.monotonic() - begun)
        todo = list(METHODS)
        begun = clock.monotonic()
        try:
            with within(self.left):
                for recipe, net in self.maker.ranged(base):
                    self._judge(recipe, net, begun)
                    todo.remove(recipe.method)
                    begun = clock.monotonic()
        except OutOfTime as error:
            if self.best is None:
                raise InputError("the time was too short for ranges alone") from error
            for method in todo:
                self.rungs.append(Rung(method, self.pace.judge, note="not tried, no time is left"))
        if self.best is None:
            raise CheckError(f"the metric failed on every net: {self.rungs[-1].note}")
        self.base = self.net

    def better(self) -> None:
        """The steps above ranges, as far as budget and time allow."""
        if self.met:
            return
        # Measured once more: other work on the machine may have slowed the first measurement.
        with suppress(OutOfTime), within(self.left):
            image = _image(self.judge.plain, self.maker.images)
            self.pace = replace(self.pace, image=min(image, self.pace.image))
        method = self.recipe.method
        self._try(Recipe(method, bias=True))
        fewest, *more = (Recipe(method, steps=n) for n in STEPS)
        if not self.met:
            self._try(fewest)  # it also tells how long learning takes here
        fits = [r for r in more if self._fits(r)]
        for recipe in more:
            # Without a budget only the longest learning that fits is worth its time.
            if not self.met and (self.budget is not None or recipe in fits[-1:] or not fits):
                self._try(recipe)
            elif not self.met and recipe not in fits:
                self._left_out(recipe)
        if self.budget is not None and not self.met:
            self._wider()

    @property
    def _widening(self) -> float:
        """The seconds that finding the worst layers and one try without them should take."""
        layers = len(self.cost.placement.integer) if self.cost else 0
        return self.pace.looking * layers + self.pace.of(Recipe("max", True, 0, ("",)))

    def _wider(self) -> None:
        assert self.base is not None
        if self._widening > self.left:
            note = f"not tried, {self.left:.0f} s are left"
            self.rungs.append(Rung("the worst layers wide", self._widening, note=note))
            return
        start = self.recipe if self._fits(replace(self.recipe, wide=("",))) else None
        start = start or Recipe(self.recipe.method, bias=True)
        try:
            with within(self.left):
                worst = self.maker.worst(self.base)
        except (OutOfTime, InputError) as error:
            self.rungs.append(Rung("the worst layers wide", self._widening, note=str(error)))
            return
        for count in LEFT_WIDE:
            if not self.met and count <= len(worst) // 2:
                self._try(replace(start, wide=worst[:count]))

    def _fits(self, recipe: Recipe) -> bool:
        path = self.maker.checkpoint(recipe)
        started = path is not None and path.exists()
        return self.pace.of(recipe) + self._spared(recipe) <= self.left or started

    def _spared(self, recipe: Recipe) -> float:
        """The seconds to leave for what comes after a recipe: wide layers, where they may help."""
        return self._widening if self.budget is not None and recipe.steps else 0.0

    def _left_out(self, recipe: Recipe) -> None:
        note = f"not tried, {self.left:.0f} s are left"
        self.rungs.append(Rung(recipe.name, self.pace.of(recipe), note=note))

    def _try(self, recipe: Recipe) -> None:
        """Makes and judges one net, if it fits into the time that is left."""
        assert self.base is not None
        expected = self.pace.of(recipe)
        if not self._fits(recipe):
            self._left_out(recipe)
            return
        begun, note = clock.monotonic(), ""
        spared = self._spared(recipe) + 1.5 * self.pace.judge + self.pace.making
        try:
            with within(self.left - min(spared, self.left / 2)):
                net = self.maker.start(recipe, self.base)
                if recipe.steps:
                    try:
                        self.maker.learn(net, recipe)
                    except OutOfTime:
                        note = "stopped in time, some blocks are not learned"
            net = self.maker.finish(net)
            if recipe.steps and not note:
                took = (clock.monotonic() - begun) / max(expected - self.pace.judge, 1e-9)
                self.pace = replace(self.pace, slow=max(0.1, took * self.pace.slow))
            with within(self.left):
                self._judge(recipe, net, begun, note)
        except OutOfTime:
            spent = clock.monotonic() - begun
            self.rungs.append(Rung(recipe.name, expected, spent, note="stopped, no time was left"))
        except InputError as error:  # not for a model of this kind, such as one of several inputs
            path = self.maker.checkpoint(recipe)
            if path is not None and path.exists() and recipe.steps:
                raise
            self.rungs.append(Rung(recipe.name, expected, note=f"not possible: {error}"))

    def _judge(self, recipe: Recipe, net: nn.Module, begun: float, note: str = "") -> None:
        expected, judging = self.pace.of(recipe), clock.monotonic()
        try:
            score = self.judge(net)
        except Failed as error:
            spent, why = clock.monotonic() - begun, f"the metric failed: {error.why}"
            self.rungs.append(Rung(recipe.name, expected, spent, note=why))
            return
        took = clock.monotonic() - judging
        self.pace = replace(self.pace, judge=max(took, self.pace.judge / 2))
        cost = self.costs.get(recipe.wide)
        cost = cost or costs(net, self.one, self.declined, recipe.wide)
        self.costs[recipe.wide] = cost  # the same layers, whatever their ranges
        seconds = clock.monotonic() - begun
        rung = Rung(recipe.name, expected, seconds, score, cost.size, cost.latency, note)
        self.rungs.append(rung)
        if self.best is None or self._order(rung) > self._order(self.best):
            self.best, self.net, self.recipe, self.cost = rung, net, recipe, cost

    def _order(self, rung: Rung) -> tuple[float, float]:
        """What makes a net the better one: less lost where that was asked for, else its SQNR."""
        score = rung.score
        assert score is not None
        asked = self.budget is not None or score.measured is not None
        return (-score.lost if asked else 0.0, score.sqnr)

    def result(self, size: int, seconds: float) -> Quantized:
        assert self.best is not None and self.net is not None and self.cost is not None
        return Quantized(
            self.net,
            tuple(self.rungs),
            self.best.name,
            self.budget,
            self.met if self.budget is not None else None,
            self.judge.unit,
            self.judge.right,
            self.cost.placement,
            (self.pace.calibrating, self.judge.images),
            (size, self.cost.size),
            seconds,
            (*self.judge.notes, *self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        values = {r.score.measured for r in self.rungs if r.score is not None}
        if self.judge.metric is not None and values == {self.judge.right}:
            yield "the metric is the same for every net, the float one too, so SQNR decided"
        if self.budget is not None and not self.met:
            yield (
                "to lose less, train it quantization-aware: "
                'repfx.transform(model, ["qarep", "repq"]) and a few epochs, see docs/training.md'
            )


def _check_model(model: Any, metric: Metric | str | None) -> None:
    if metric is not None and metric != ACCURACY and not callable(metric):
        raise InputError(f"metric is a function of a net, or {ACCURACY!r}, not {metric!r}")
    if isinstance(model, nn.Module) and quantizers_of(model):
        raise InputError("the model is quantized already: give the float model")


def _checked(
    time: float, budget: float | None, bits: tuple[int, int | None], seed: int, folder: Any
) -> Path | None:
    """The folder for checkpoints, made. Raises InputError for an option out of range."""
    for name, value in (("time", time), ("budget", 0.0 if budget is None else budget)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is a number from 0, not {value!r}")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed is a whole number from 0, not {seed!r}")
    for count in bits:
        if count is not None:
            Grid(count)  # raises for an invalid number of bits
    if place()[1] > 1:
        raise InputError("quantize runs in one process, but this is one of several")
    if folder is None:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be a folder for checkpoints: {error.strerror}"
        ) from error
    return Path(folder)


def _unsigned(plain: nn.Module, images: Split) -> tuple[str, ...]:
    """The inputs of which no image has a negative number."""
    if not isinstance(plain, fx.GraphModule):
        return ()
    inputs = [str(node.target) for node in plain.graph.nodes if node.op == "placeholder"]
    least = {name or inputs[0]: value for name, value in images.least.items()}
    return tuple(name for name in inputs if least.get(name, -1.0) >= 0)


def _pace(plain: nn.Module, images: Split, judge: Judge) -> Pace:
    """How fast the float net is here."""
    image = _image(plain, images)
    metric = judge.seconds if judge.metric is not None else 0.0
    return Pace(image, len(images), 2 * images.out * image + metric)


def _image(plain: nn.Module, images: Split) -> float:
    """The seconds that an image takes in the float net, from one batch held out."""
    batch = images.held[0]
    with in_eval(plain), torch.no_grad():
        return min(_timed(lambda: feed(plain, batch)) for _ in range(3)) / len(batch)


def _timed(call: Callable[[], Any]) -> float:
    begun = clock.perf_counter()
    call()
    return clock.perf_counter() - begun


def _key(plain: nn.Module, images: Split, options: tuple[Any, ...]) -> str:
    """Ten letters that differ for other nets, images and options."""
    digest = hashlib.sha256(repr((options, images.digest)).encode())
    for x in plain.state_dict().values():
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:10]


__all__ = ["quantize"]
