"""The quantize command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import repfx as api
from repfx.cli.inputs import images, preprocessing, random_input, usual_shape
from repfx.cli.models import imported, load_model
from repfx.cli.options import (
    Batch,
    Crop,
    Data,
    Device,
    Fit,
    Mean,
    Model,
    Order,
    Peak,
    Size,
    SkipBroken,
    Std,
    Target,
    Trust,
    Weights,
    Workers,
    app,
    beside,
    err,
    out,
    place,
    say,
    show_report,
)
from repfx.data.images import Pictures, validation_part
from repfx.data.preprocessing import Preprocessing
from repfx.errors import InputError, MissingPart, unknown
from repfx.files.store import check_savable, write_whole
from repfx.graph.inputs import note_preprocessing
from repfx.ladder.climb import TIME
from repfx.ladder.judge import ACCURACY
from repfx.passes import Ptq
from repfx.quant import METHODS, FakeQuant

AUTO, LEARNED = "auto", "repapq"


@app.command()
def quantize(
    model: Model,
    data: Data,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The file to write, net.pt or net.onnx; by default MODEL-int8.pt, or int6 and so "
            "on, beside the model.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"auto: try ways from cheap to dear and keep the best; {', '.join(METHODS)}: "
            "choose ranges only; repapq: learn blocks. By default auto, or repapq where one of its "
            "options is given."
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="auto: what may be lost, in the unit that judges; stops where it is met."
        ),
    ] = None,
    time: Annotated[
        float | None, typer.Option(help=f"auto: the seconds it may take, else {TIME:.0f}.")
    ] = None,
    labels: Annotated[
        bool,
        typer.Option("--labels", help="auto: judge by accuracy; folders are classes, in order."),
    ] = False,
    metric: Annotated[
        str | None,
        typer.Option(help="auto: judge by package.module:function(net) -> number."),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits of activations and of weights.")] = 8,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="repapq: learning steps for each block, else 1000.")
    ] = None,
    bias: Annotated[
        bool, typer.Option("--bias", help="With a method of ranges: correct biases, too.")
    ] = False,
    keep: Annotated[
        int,
        typer.Option(
            min=0,
            help="Not auto: keep this many of the worst layers at 8 bits, or in float if --bits is "
            "8.",
        ),
    ] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="To resume after an interruption: auto a folder, repapq a file."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="repapq: a folder for activations, to save memory."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="auto: write a page with what was tried.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="auto: write what was tried as JSON.")
    ] = None,
    size: Size = None,
    fit: Fit = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    order: Order = None,
    peak: Peak = None,
    batch: Batch = 32,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use at most this many images, else 512, by one method 1024."),
    ] = None,
    workers: Workers = 0,
    seed: int = 0,
    skip_broken: SkipBroken = False,
    device: Device = None,
    target: Target = "tensorrt",
    weights: Weights = None,
    trust_pickle: Trust = False,
) -> None:
    """Quantize a model on images, as well as a budget and a time allow, and save it.

    -o net.pt saves the model, -o net.onnx writes the ONNX file of the target."""
    ladder: dict[str, Any] = {
        "budget": budget,
        "time": time,
        "labels": labels or None,
        "metric": metric,
    }
    ladder |= {"report": report, "json": json}
    method = _method(method, bool(iterations or cache or keep), ladder)
    if method == AUTO and bias:
        raise InputError("--bias is for a method of ranges; --method auto tries it anyway")
    where = place(device)
    net = load_model(model, weights, trust_pickle)
    given = {"size": size, "fit": fit, "crop": crop, "mean": mean, "std": std}
    how = preprocessing(net, **given, order=order, peak=peak)
    if output is None:
        output = beside(model).with_name(f"{beside(model).name}-int{bits}.pt")
    wanted = _Wanted(output, target, report, json)
    array = data.suffix.lower() == ".npy"
    if not array:  # what cannot be written is said before the first image is read
        wanted.check(net, bits, random_input(usual_shape(net, how), 2))
    kind: Callable[..., Any] = _labelled if labels else images
    most = limit or (512 if method == AUTO else 1024)
    found = kind(data, how, limit=most, skip_broken=skip_broken)
    if array:
        wanted.check(net, bits, torch.stack([found[0], found[0]]))
    for name in found.broken:
        say(f"left out: {name}")
    say(f"{len(found)} of {getattr(found, 'found', len(found))} images")
    batches = torch.utils.data.DataLoader(found, batch, num_workers=workers)
    result: api.Quantized | None = None
    if method == AUTO:
        judge = imported(metric) if metric is not None else ACCURACY if labels else None
        settings: dict[str, Any] = {"budget": budget, "time": TIME if time is None else time}
        settings |= {"bits": bits, "seed": seed}
        settings |= {"metric": judge, "target": target, "checkpoint": checkpoint}
        result = _auto(net, batches, where, settings)
        out.print(result)
        quantized = result.model.cpu()
    else:
        chosen = _Chosen(bits, method, iterations or 1000, bias, keep, checkpoint, cache)
        quantized = chosen.run(net, batches, where, target)
    note_preprocessing(quantized, None if array else how)
    first = next(iter(batches))
    wanted.write(quantized, (first[0] if labels else first)[:2], result)


def _method(method: str | None, learning: bool, ladder: dict[str, Any]) -> str:
    """The method meant. Raises InputError for an unknown one, and for options of another."""
    known = (AUTO, *METHODS, LEARNED)
    found = method or (LEARNED if learning else AUTO)
    if found not in known:
        raise unknown("method", found, known)
    strange = [name for name, value in ladder.items() if value is not None]
    if found != AUTO and strange:
        raise InputError(f"--{strange[0]} is for --method auto, not for {found}")
    if found == AUTO and learning:
        raise InputError("--iterations, --cache and --keep are not for --method auto")
    return found


def _labelled(path: Path, how: Preprocessing, **options: Any) -> Pictures:
    """The images of class folders, those to validate on where there are some.

    Raises InputError for a single class, which is a folder around the class folders."""
    part = validation_part(path)
    found = Pictures(path, "" if part is None else part or "train", preprocessing=how, **options)
    if len(found.classes) < 2:
        raise InputError(
            f"{path} has one class folder, {found.classes[0]}: give the folder that holds the "
            "folders of all classes"
        )
    return found


def _auto(net: Any, batches: Any, where: torch.device, settings: dict[str, Any]) -> api.Quantized:
    """Climbs the ladder, and says beforehand what each rung should take."""
    if isinstance(net, nn.Module):
        net = net.to(where)
    say("what each way to quantize should take:")
    return api.quantize(
        net, batches, progress=err.is_terminal, plan=lambda line: say(f"  {line}"), **settings
    )


@dataclass(frozen=True)
class _Wanted:
    """The files to write: a model, or an ONNX file for the target, and what was tried."""

    output: Path
    target: str
    report: Path | None
    json: Path | None

    def check(self, net: Any, bits: int, example: Tensor) -> None:
        """Raises InputError if the result could not be written, MissingPart without the page's."""
        for file in (self.output, self.report, self.json):
            if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
                raise InputError(f"no such folder: {file if file.is_dir() else file.parent}")
        if self.report is not None and not all(map(find_spec, ("jinja2", "plotly"))):
            raise MissingPart("the page needs jinja2 and plotly: pip install repfx[report]")
        same: dict[str, Any] = {"example": example, "target": self.target}
        tried = api.transform(net, [Ptq(bits)], **same)
        if self.onnx:
            if any(isinstance(m, FakeQuant) for m in tried.modules()):
                api.calibrate(tried, [example])
            with TemporaryDirectory() as folder:
                api.lower(tried, Path(folder) / "net.onnx", **same)
            return
        try:
            check_savable(tried)
        except InputError as error:
            raise InputError(
                f"{error}. With -o {self.output.with_suffix('.onnx')} the ONNX file is written "
                "directly, which needs no saved model"
            ) from error

    @property
    def onnx(self) -> bool:
        return self.output.suffix.lower() == ".onnx"

    def write(self, net: nn.Module, example: Tensor, result: api.Quantized | None) -> None:
        if self.onnx:
            made = api.lower(net, self.output, example=example, target=self.target)
            say(f"ONNX Runtime against torch: {made.parity}")
        else:
            api.save(net, self.output)
        say(f"wrote {self.output} ({self.output.stat().st_size / 1e6:.2f} MB)")
        if result is not None and self.json is not None:
            text = result.json() + "\n"
            write_whole(self.json, lambda part: Path(part).write_text(text))
        if result is not None and self.report is not None:
            result.write(self.report)
            say(f"wrote {self.report}")


@dataclass(frozen=True)
class _Chosen:
    """One way to quantize, chosen by its options."""

    bits: int
    method: str
    iterations: int
    bias: bool
    keep: int
    checkpoint: Path | None
    cache: Path | None

    @property
    def learns(self) -> bool:
        return self.method == LEARNED

    def run(self, model: Any, batches: Any, where: torch.device, target: str) -> nn.Module:
        """The quantized model, on the CPU."""
        ptq = Ptq(self.bits, weights="mse" if self.learns else "max")
        if self.keep:
            ptq = self._sparing_the_worst(ptq, model, batches, where, target)
        merged = api.transform(model, [ptq, "qprep"] if self.learns else [ptq], target=target)
        show_report(merged.meta["repfx"])
        result: nn.Module = merged.to(where)
        if self.learns:
            api.reconstruct(
                result,
                batches,
                loss="mae",
                stage=1.0,
                batch=64,
                iterations=self.iterations,
                checkpoint=self.checkpoint,
                cache=self.cache,
                progress=err.is_terminal,
            )
            result = api.transform(result, ["fuse"], target=target)
        else:
            api.calibrate(
                result, batches, method=self.method, bias=self.bias, progress=err.is_terminal
            )
        off = api.verify(model, result.cpu(), next(iter(batches)))
        out.print(f"SQNR against the float model on the first batch: {off.sqnr:.1f} dB")
        return result

    def _sparing_the_worst(
        self, ptq: Ptq, model: Any, batches: Any, where: torch.device, target: str
    ) -> Ptq:
        """The pass with the layers that lose the most accuracy kept wide."""
        tried = api.transform(model, [ptq], target=target).to(where)
        ranges = api.calibrate(tried, batches, method="mae" if self.learns else self.method)
        lost = api.sensitivity(ranges, islice(batches, 4), progress=err.is_terminal)
        names = lost.worst(self.keep)
        say(f"kept wide: {', '.join(names)}")
        return replace(ptq, wide=names, wide_bits=8 if self.bits < 8 else 32)
