"""reconstruct: post-training quantization that learns block by block (RepAPQ, arXiv 2402.16121).

Blocks are learned in order: the input comes from the quantized net, the target from the float net.
For block i of the n in its stage (the blocks at one resolution), let F be the frozen float blocks
that follow in the stage:

    L_i = |y^_i - y_i| + lambda (i / n) |F(y^_i) - F(y_i)|     means of |.| (mae) or |.|^2 (mse)

The default is mse with lambda = 0. It learns weights and biases (with straight-through gradients,
or with AdaRound, which learns the direction of rounding), steps, and the affines of `qprep`. Steps
are learned as s = s0 exp(t), so that one learning rate suits steps of every size."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repfx.calibration.activations import Rows
from repfx.calibration.blockwise import LOSSES, READING, ROUNDING, Options, Run, Split
from repfx.calibration.feed import device_of
from repfx.calibration.segments import inputs_of, segments
from repfx.data.batches import Batches
from repfx.data.preprocessing import preprocessing_of
from repfx.data.share import Share
from repfx.errors import InputError, unknown
from repfx.graph.inputs import note_preprocessing
from repfx.memory import memory_kept
from repfx.placement.stored import leave_out
from repfx.processes import agreed, gathered
from repfx.quant import Affine, FakeQuant, in_eval, quantizers_of


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: str = "mse",
    stage: float = 0.0,
    reading: str = "last",
    iterations: int = 1000,
    batch: int = 32,
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
    """Trains the quantized model to match its own float output, in place, and returns it.

    `model`: a result of `transform(net, ["ptq"])` or `["ptq", "qprep"]`. It need not be calibrated:
    the activation steps of a block are set by `loss` before the block is learned. `batches`: as for
    `calibrate`; a dict names the model's inputs; all images are used.

    `loss`: mse or mae. `stage`: lambda; 0 ignores the rest of the stage. RepAPQ is `loss="mae",
    stage=1.0`; in our studies more steps gain more than the time it takes. `reading`: "last"
    compares the output of the stage, "all" takes the mean over all following blocks in it.
    `rounding`: straight, or adaround, which leaves the weight steps fixed. `drop`: share of
    activations left in float at random (QDrop; 0.5 in that paper). `iterations`: steps of Adam per
    block, on `batch` images each. The learning rates fall to 0 on a cosine: `lr` for weights and
    biases, `lr_scale` for ln(step), `lr_affine` for affines.

    `blocks`: the names of the values at which blocks end; `stages`: those at which stages end, too.
    By default a block ends where a single quantized value carries everything (or a few, if more
    than eight layers would stay together), and a stage where the resolution changes. Memory holds
    the activations between two blocks: in files under `cache` if it is given, else on a GPU while
    they fit (into a quarter of its free memory), else in main memory. `checkpoint`: a file written
    after each block; a run that continues from it gives the same result as one that was never
    stopped. `model.meta["reconstruct"]` lists the loss of each block before and after.

    With several processes (`torchrun`) all must call it. They share the images of a step (see
    `repfx.data.share`), and all get the result of one process. `drop` draws in each on its own.

    Raises InputError if there is no image, for an image with NaN or one that the model does not
    take, for unknown names, numbers out of range, and a checkpoint of another run."""
    options = Options(
        loss, stage, reading, iterations, batch, rounding, drop, lr, lr_scale, lr_affine, seed
    )
    _check(options)
    _check_paths(cache, checkpoint)
    given = Batches(batches, finite=True)
    inputs = [str(n.target) for n in inputs_of(model)]
    if not quantizers_of(model):
        raise InputError("the model has no quantizers: run repfx.transform(model, ['ptq']) first")
    leave_out(model)
    with torch.inference_mode(False), torch.enable_grad(), in_eval(model), memory_kept():
        rows, split = _read(given, inputs, Rows(cache, device_of(model)))
        one = next((one for one in gathered(_first(rows)) if one), ())
        one = tuple(x.to(device_of(model)) for x in one)
        net = segments(model, one, blocks)
        plain = segments(_in_float(model), one, blocks)
        run = Run(model, net, plain, options, checkpoint)
        done = run.all(rows, split, one, stages, progress)
    note_preprocessing(model, preprocessing_of(batches))
    model.meta = {**getattr(model, "meta", {}), "reconstruct": tuple(done)}  # type: ignore[assignment]
    return model


def _read(given: Batches, inputs: list[str], rows: Rows) -> tuple[Rows, Split]:
    """This process's share of the images, and how they are shared."""
    found: list[tuple[int, int]] = []
    share = Share(given)
    with agreed():
        rows.fill(_of_one_size(share, inputs, found))
    share.check()
    _check_sizes(rows)
    return rows, Split.of(found)


def _check(o: Options) -> None:
    for name, value, known in (
        ("loss", o.loss, LOSSES),
        ("rounding", o.rounding, ROUNDING),
        ("reading", o.reading, READING),
    ):
        if value not in known:
            raise unknown(name, str(value), known)
    for name, number, least in (
        ("iterations", o.iterations, 1),
        ("batch", o.batch, 1),
        ("seed", o.seed, 0),
    ):
        if not isinstance(number, int) or number < least:
            raise InputError(f"{name} is a whole number from {least}, not {number!r}")
    for name, rate in (
        ("stage", o.stage),
        ("lr", o.lr),
        ("lr_scale", o.lr_scale),
        ("lr_affine", o.lr_affine),
    ):
        if not (isinstance(rate, (int, float)) and math.isfinite(rate) and rate >= 0):
            raise InputError(f"{name} is a number from 0, not {rate!r}")
    if not (isinstance(o.drop, (int, float)) and 0 <= o.drop < 1):
        raise InputError(f"drop is a share from 0 to below 1, not {o.drop!r}")


def _check_paths(cache: Any, checkpoint: Any) -> None:
    if cache is not None:
        try:
            Path(cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{cache} cannot be a folder for the cache: {error.strerror}"
            ) from error
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise InputError(f"there is no folder {Path(checkpoint).parent} for the checkpoint")


def _first(rows: Rows) -> tuple[Tensor, ...]:
    """One image, or nothing if this process has none."""
    return tuple(x.cpu() for x in next(rows.batches(1), ()))


def _check_sizes(rows: Rows) -> None:
    """Raises InputError if the images of another process have another size."""
    shapes = [s for s in gathered([tuple(x.shape[1:]) for x in rows.data]) if s]
    other = next((s for s in shapes if s != shapes[0]), None)
    if other is not None:
        raise InputError(
            f"images of {_listed(shapes[0])} and {_listed(other)}: all must be of one size"
        )


def _of_one_size(
    share: Share, inputs: list[str], found: list[tuple[int, int]]
) -> Iterator[tuple[Tensor, ...]]:
    """The images of each batch, as one tensor for each input of the model.

    Adds the place and the length of each batch to `found`."""
    shape = None
    for at, batch in share:
        values = batch.of_inputs(inputs)
        here = [tuple(x.shape[1:]) for x in values]
        if shape not in (None, here) or any(len(x) != len(batch) for x in values):
            raise InputError(
                f"images of {_listed(shape or [])} and {_listed(here)}: all must be of one size"
            )
        shape = here
        found.append((at, len(batch)))
        yield values


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _in_float(model: nn.Module) -> nn.Module:
    """A frozen copy in which quantizers pass values through and affines are the identity."""
    found = copy.deepcopy(model).eval().requires_grad_(False)
    for m in found.modules():
        if isinstance(m, FakeQuant):
            m.on = False
        if isinstance(m, Affine):
            nn.init.ones_(m.eta), nn.init.zeros_(m.eps)
    return found
