"""The rungs: recipes from cheap to dear, the nets they make, and how long each should take.

ranges     five ways to choose the ranges of activations, from one pass over the images
bias       the best of these, with biases corrected
learned    each block learned to match the float net, for some number of steps
wide       the layers that lose most left wide, which costs speed"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from repfx.calibration import reconstruct, sensitivity
from repfx.calibration.optional import set_scales
from repfx.calibration.ranges import calibrate, ranges
from repfx.errors import Declined
from repfx.ladder.images import Split
from repfx.passes import Ptq
from repfx.quant import Affine, quantizers_of
from repfx.rewrite.runner import rewrite

STEPS = (25, 100, 400, 1600)  # of learning for each block
IMAGES = 32  # in a step of learning
LEFT_WIDE = (1, 2, 4, 8, 16)
LOOKED_AT = 16  # images that tell which layers lose most


@dataclass(frozen=True)
class Recipe:
    """How to quantize: a method of ranges, corrected biases, steps of learning, wide layers."""

    method: str
    bias: bool = False
    steps: int = 0
    wide: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        ranges = self.method + (", biases corrected" if self.bias else "")
        text = f"learned, {self.steps} steps" if self.steps else ranges
        return text + (f", {len(self.wide)} wide" if self.wide else "")


@dataclass(frozen=True)
class Pace:
    """Seconds an image takes in the float net, and how many images there are of each kind.

    `judge`: seconds to judge a net, with the caller's metric. `making`: seconds to put quantizers
    in. `slow`: how much longer learning takes than expected, as far as it was tried."""

    image: float
    calibrating: int
    judge: float
    making: float = 0.0
    slow: float = 1.0

    def of(self, recipe: Recipe) -> float:
        """The seconds that a rung should take, for planning; no promise."""
        seconds = self.judge
        if recipe.wide:
            seconds += self.making + self.image * (2 * self.calibrating + 512)
        if recipe.steps:
            learned = self.image * (5 * IMAGES * recipe.steps + 8 * self.calibrating)
            return seconds + self.slow * learned
        return seconds + self.image * (4 * 128 if recipe.bias else 2 * self.calibrating)

    @property
    def looking(self) -> float:
        """The seconds for the sensitivity of one layer."""
        return 2 * 2 * LOOKED_AT * self.image


@dataclass(frozen=True)
class Maker:
    """Makes the nets of recipes from the float net and the images."""

    net: Any
    images: Split
    bits: int
    weight_bits: int | None
    target: str
    example: Any
    seed: int
    folder: Path | None
    key: str  # of the net, the images and the options, in the names of checkpoints
    progress: bool
    unsigned: tuple[str, ...]  # the inputs that are never negative

    @property
    def few(self) -> int:
        """The fewer bits of activations and weights."""
        return min(self.bits, self.weight_bits or self.bits)

    def placed(
        self, wide: tuple[str, ...] = (), affine: bool = False
    ) -> tuple[nn.Module, list[Declined]]:
        """The net with quantizers that have no scales yet, and what was declined."""
        wider = 8 if self.bits < 8 else 32  # 32 is float
        ptq = Ptq(
            *(self.bits, self.weight_bits),
            weights="mse",
            wide=wide,
            wide_bits=wider,
            unsigned=self.unsigned,
        )
        passes: list[Any] = [ptq, "qprep"] if affine else [ptq]
        net, report = rewrite(self.net, passes, self.example, self.target)
        return net.eval(), report.declined

    def ranged(self, base: nn.Module) -> Iterable[tuple[Recipe, nn.Module]]:
        """The net with the ranges of each method, from one pass over the images."""
        found = ranges(base, self.images)
        paths = {quant: path for path, quant in quantizers_of(base).items()}
        for method, scales in found.items():
            net = copy.deepcopy(base)
            quants = quantizers_of(net)
            set_scales(net, {quants[paths[quant]]: scale for quant, scale in scales.items()})
            yield Recipe(method), net

    def start(self, recipe: Recipe, base: nn.Module) -> nn.Module:
        """The net of a recipe before it is learned. `base`: the calibrated net of no wide layers.

        Learning below 8 bits has the affines of RepAPQ."""
        affine = recipe.steps > 0 and self.few < 8
        if not recipe.wide and not affine:
            net = copy.deepcopy(base)
        else:
            net = self.placed(recipe.wide, affine)[0]
        calibrate(net, self.images, method=recipe.method, bias=recipe.bias)
        return net

    def learn(self, net: nn.Module, recipe: Recipe) -> None:
        """Learns a calibrated net, in place, and goes on from its checkpoint if there is one.

        By squared error: absolute error makes light of the few large values of a detector."""
        reconstruct(
            net,
            self.images,
            iterations=recipe.steps,
            batch=IMAGES,
            lr=1e-4 if self.few >= 8 else 1e-3,  # a few steps must move weights by large steps
            seed=self.seed,
            checkpoint=self.checkpoint(recipe),
            progress=self.progress,
        )

    def finish(self, net: nn.Module) -> nn.Module:
        """The net to deploy, with its affines folded."""
        if not any(isinstance(m, Affine) for m in net.modules()):
            return net
        return rewrite(net, ["fuse"], self.example, self.target)[0].eval()

    def checkpoint(self, recipe: Recipe) -> Path | None:
        if self.folder is None:
            return None
        own = hashlib.sha256(repr(recipe).encode()).hexdigest()[:6]
        return self.folder / f"{self.key}-{own}.ck"

    def worst(self, base: nn.Module) -> tuple[str, ...]:
        """The layers of a calibrated net, those that lose most first."""
        found = sensitivity(base, self.images.first(LOOKED_AT), progress=self.progress)
        return found.worst(len(found.rows))
