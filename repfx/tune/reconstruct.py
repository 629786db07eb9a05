"""reconstruct: post-training quantization that learns, a block at a time (RepAPQ, arXiv 2402.16121).

Blocks are learned in order: their input comes from the quantized net, their target from the float one. With F the frozen
float rest of the stage (the blocks at one resolution), i the block's place among the n of its stage:

    L_i = |y^_i - y_i| + lambda (i / n) |F(y^_i) - F(y_i)|          means of absolute (mae) or squared (mse) differences

What is learned: weights and biases (straight through the rounding, or which way to round: AdaRound), steps, and the
affines of `qprep`. Steps are learned as s = s0 exp(t), so that one rate fits steps of every size.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from repfx.errors import InputError, unknown
from repfx.graph.segments import segments
from repfx.quant import Affine, FakeQuant
from repfx.tune.blockwise import LOSSES, READING, ROUNDING, Options, Run


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: str = "mae",
    stage: float = 1.0,
    reading: str = "last",
    iterations: int = 1000,
    batch: int = 64,
    rounding: str = "straight",
    drop: float = 0.0,
    lr: float = 1e-4,
    lr_scale: float = 1e-2,
    lr_affine: float = 1e-2,
    blocks: Sequence[str] | None = None,
    stages: Sequence[str] | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Learns the quantized model to give what it gives in float, in place, and returns it.

    `model`: a result of `transform(net, ["ptq"])` or `["ptq", "qprep"]`, calibrated or not: the steps of activations are
    set here, before their block, by `loss`. `batches`: tensors (n, ...), or tuples that begin with one; all are used.
    `loss`: mae or mse. `stage`: lambda, 0 leaves the stage out. `reading`: "last" compares the stage's output, "all" the
    mean over every block that follows in it. `rounding`: straight or adaround, whose steps of weights stay.
    `drop`: share of activations left in float at random (QDrop; their paper: 0.5). `iterations` of Adam a block on
    `batch` pictures, rates falling on a cosine to 0: `lr` of weights and biases, `lr_scale` of ln(step), `lr_affine`.

    `blocks`: names of the values that blocks end with, `stages` those of them that stages end with; else blocks end where
    one value that is quantized carries all, stages where the size changes. Memory: the activations between two blocks,
    in files under `cache` where it is given. `checkpoint`: a file written after each block; a run goes on from it to the
    result of a run that was never stopped. `model.meta["reconstruct"]` lists what each block gained.

    Raises InputError for no picture, one with NaN, one that the model does not take, for names that are not there and
    numbers out of range, and for a checkpoint of another run.
    """
    options = Options(loss, stage, reading, iterations, batch, rounding, drop, lr, lr_scale, lr_affine, seed)
    _check(options)
    net = segments(model, blocks)
    if not any(s.modules(FakeQuant) for s in net):
        raise InputError("the model has no quantizers: run repfx.transform(model, ['ptq']) first")
    plain = segments(_in_float(model), [s.name for s in net[:-1]])
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        run = Run(model, net, plain, options, cache, checkpoint, progress)
        done = run.all(batches, stages)
    finally:
        for m, mode in training:
            m.training = mode
    model.meta = {**getattr(model, "meta", {}), "reconstruct": tuple(done)}  # type: ignore[assignment]
    return model


def _check(o: Options) -> None:
    for name, value, known in (
        ("loss", o.loss, LOSSES),
        ("rounding", o.rounding, ROUNDING),
        ("reading", o.reading, READING),
    ):
        if value not in known:
            raise unknown(name, str(value), known)
    for name, number in (("iterations", o.iterations), ("batch", o.batch)):
        if not isinstance(number, int) or number < 1:
            raise InputError(f"{name} is a whole number from 1, not {number!r}")
    for name, rate in (("stage", o.stage), ("lr", o.lr), ("lr_scale", o.lr_scale), ("lr_affine", o.lr_affine)):
        if not (math.isfinite(rate) and rate >= 0):
            raise InputError(f"{name} is a number from 0, not {rate!r}")
    if not 0 <= o.drop < 1:
        raise InputError(f"drop is a share from 0 to 1, not {o.drop!r}")


def _in_float(model: nn.Module) -> nn.Module:
    """A frozen copy whose quantizers let values through and whose affines are the identity."""
    found = copy.deepcopy(model).eval().requires_grad_(False)
    for m in found.modules():
        if isinstance(m, FakeQuant):
            m.calibrated = False
        if isinstance(m, Affine):
            nn.init.ones_(m.eta), nn.init.zeros_(m.eps)
    return found
