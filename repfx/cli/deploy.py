"""The commands that deploy: lower, lint, bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Annotated

import torch
import typer
from onnx import load
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import repfx as api
from repfx.cli.inputs import USUAL, example_for, random_input, usual_shape
from repfx.cli.models import load_model
from repfx.cli.options import Model, Trust, Weights, app, beside, err, named, out, say, whole
from repfx.errors import InputError
from repfx.files.store import write_whole
from repfx.lowering.lint import findings
from repfx.lowering.onnx.check import NAMES, How, checked, on_each, reference
from repfx.lowering.onnx.lower import Artifact
from repfx.lowering.onnx.parity import Parity
from repfx.lowering.runtimes.isa import Isa, chosen
from repfx.lowering.runtimes.layers import kernels
from repfx.lowering.runtimes.run import installed, write_ir
from repfx.lowering.runtimes.timing import Forms
from repfx.lowering.runtimes.timing import bench as measure
from repfx.lowering.tensorrt.bindings import has_gpu
from repfx.lowering.tensorrt.engine import Engine, Profile, build, tried
from repfx.lowering.tensorrt.rtx import capabilities
from repfx.quant import FakeQuant, target_named

SHAPE = "Shape of one input without the batch, such as 3,32,32"


@app.command()
def lower(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file to write; by default beside the model."),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write ONNX with QuantizeLinear/DequantizeLinear.")
    ] = False,
    trt: Annotated[
        bool,
        typer.Option("--trt", help="Also build the engine, with TensorRT or TensorRT for RTX."),
    ] = False,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="Compare in OpenVINO; write IR if -o ends in .xml.")
    ] = False,
    shape: Annotated[
        str | None,
        typer.Option(help=f"{SHAPE}; by default what the model was calibrated on, else {USUAL}."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Real inputs to compare on: a folder, a zip or a .npy file.")
    ] = None,
    batches: Annotated[
        str, typer.Option(help="--trt: smallest, usual and largest batch.")
    ] = "1,8,32",
    workspace: Annotated[
        float, typer.Option(min=0.01, help="--trt: GiB of device memory that a layer may use.")
    ] = 4.0,
    timing_cache: Annotated[
        Path | None, typer.Option(help="--trt: a cache file that makes the next build faster.")
    ] = None,
    compute_capability: Annotated[
        str,
        typer.Option(help="--trt: GPUs that TensorRT for RTX builds for, such as 8.6,8.9,12.0."),
    ] = "",
    target: Annotated[
        str | None,
        typer.Option(help="What the model was quantized for; by default the runtime."),
    ] = None,
    float16: Annotated[
        bool, typer.Option("--float16", help="Run layers that are not INT8 in float16.")
    ] = False,
    opset: Annotated[
        int,
        typer.Option(
            help="ONNX opset, 13 to 23; from 21 on, 4-bit weights are int4 (not for TensorRT)."
        ),
    ] = 20,
    dynamic: Annotated[
        bool,
        typer.Option("--dynamic", help="Leave height and width free in the file."),
    ] = False,
    isa: Annotated[
        str | None,
        typer.Option(help="Also compare on these instruction sets: all, or AVX2,SSE41,..."),
    ] = None,
    weights: Weights = None,
    trust_pickle: Trust = False,
) -> None:
    """Write a model as ONNX or for a runtime, and compare the file with the model."""
    if not (onnx or trt or openvino):
        raise InputError("say what to lower to: --onnx, --trt or --openvino")
    if trt and dynamic:
        raise InputError("--trt builds an engine for one height and width: leave out --dynamic")
    output = beside(model) if output is None else output
    file, profile = named(output, ".onnx"), Profile(*whole("batches", batches, 3))
    if file.resolve() == Path(model).resolve():
        raise InputError(f"{file} would be written over the model: give another -o")
    gpus = [name.strip() for name in compute_capability.split(",") if name.strip()]
    capabilities(gpus)  # raises for one that there is not, before anything is written
    net = load_model(model, weights, trust_pickle)
    example = example_for(net, data, shape)
    if not isinstance(net, nn.Module):
        net = api.transform(net, [], example=example)
    if trt and not _quantized(net):
        raise InputError(
            "this model is float: `repfx quantize` it first for INT8, or lower it with --onnx"
        )
    # OpenVINO runs a file written for TensorRT, but not the other way round.
    target = target or ("openvino" if openvino and not trt else "tensorrt")
    runtime = "openvino" if openvino else target_named(target).runtime
    stops = [] if isa is None else chosen(runtime, isa)
    artifact = api.lower(
        net, file, example=example, target=target, opset=opset, float16=float16, dynamic=dynamic
    )
    say(f"ONNX Runtime against torch: {artifact.parity}")
    say(f"wrote {file} ({file.stat().st_size / 1e6:.2f} MB)")
    _say_limits(artifact)
    written = _Written(file, net, example, target, float16)
    written.compare(runtime, artifact.there, stops)
    for finding in api.lint(file, target=target_named(target).runtime):
        say(finding)
    if openvino and output.suffix.lower() == ".xml":
        write_ir(file, output)
        say(f"wrote {output}")
    if trt:
        say("building the engine")
        engine = build(
            file,
            named(output, ".engine", ".plan", ".trt"),
            profile=profile,
            workspace_gib=workspace,
            timing_cache=timing_cache,
            progress=err.is_terminal,
            compute_capability=gpus,
        )
        say(f"wrote {engine.path} and {engine.metadata.name}, {engine}")
        _try(engine, file, example, profile.opt)


def _say_limits(artifact: Artifact) -> None:
    """Says where the file is not what was asked for."""
    if artifact.batch is not None:
        say(
            f"the file takes batches of {artifact.batch} only: the model computes with the batch "
            "size, or ONNX needs it as a constant"
        )
    if artifact.float32:
        some = ", ".join(artifact.float32[:3]) + (", ..." if len(artifact.float32) > 3 else "")
        say(f"in float32, since float16 does not hold their numbers: {some}")


def _try(engine: Engine, file: Path, example: tuple[Tensor, ...], images: int) -> None:
    """Runs the engine where a GPU is, compares it with ONNX Runtime, and prints how fast it is.

    It may be for another GPU than this one, so that it cannot be run is no error."""
    inputs = load(file, load_external_data=False).graph.input
    if not has_gpu() or len(inputs) != len(example):
        what = "the file has other inputs" if has_gpu() else "torch sees no CUDA device"
        say(f"the engine was not run: {what}")
        return
    feeds = {}
    for given, x in zip(inputs, example, strict=True):
        size = given.type.tensor_type.shape.dim
        free = bool(size) and not size[0].dim_value
        batch = x[torch.arange(images) % len(x)] if free else x
        feeds[given.name] = batch.cpu().numpy()
    try:
        say(f"the engine against ONNX Runtime: {tried(engine.path, file, feeds)}")
    except (api.RepfxError, RuntimeError) as error:  # RuntimeError: torch has no memory left
        say(f"the engine was not run: {error}")


@dataclass(frozen=True)
class _Written:
    """A lowered file and the model it was lowered from."""

    file: Path
    net: nn.Module
    example: tuple[Tensor, ...]
    target: str
    float16: bool

    def compare(self, runtime: str, there: Parity | None, stops: Sequence[Isa]) -> None:
        """Prints how the file compares with the model in the runtime and on each instruction set.

        `there`: the comparison in that runtime, where it was already made."""
        same, args = reference(self.net, self.target, self.float16), self.example
        if runtime == "openvino":
            there = there or checked(runtime, same, load(self.file), args, How(self.float16))
            say(f"OpenVINO{' in float32' if self.float16 else ''} against torch: {there}")
        for stop, found in on_each(stops, runtime, same, load(self.file), args, self.float16):
            say(f"{NAMES[runtime]} on {stop.name} against torch: {found}")
        if runtime in NAMES and _quantized(self.net):
            say(f"{NAMES[runtime]}: {kernels(runtime, self.file)}")


def _quantized(net: object) -> bool:
    return isinstance(net, nn.Module) and any(isinstance(m, FakeQuant) for m in net.modules())


@app.command()
def lint(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE.onnx", help="An ONNX file from any tool.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="What will run it: tensorrt, rtx, onnxruntime or openvino.")
    ] = "tensorrt",
    select: Annotated[
        str, typer.Option(help="Only these rules, such as Q06,Q10; by default all.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    explain: Annotated[
        str | None, typer.Option(help="Explain one rule, such as Q08, and check no file.")
    ] = None,
) -> None:
    """Find what keeps a runtime from running an ONNX file in INT8; exits with 1 on an error."""
    if explain is not None:
        say(findings.explain(explain))
        return
    if file is None:
        raise InputError("lint needs a FILE.onnx, or a rule to --explain")
    wanted = [name.strip() for name in select.split(",") if name.strip()]
    for name in wanted:
        findings.explain(name)  # raises for one that there is not
    found = [f for f in api.lint(file, target=target) if not wanted or f.rule in wanted]
    if json:
        out.print_json(dumps([asdict(f) for f in found]))
    else:
        _print_findings(found, file)
    if any(f.severity == "E" for f in found):
        raise typer.Exit(1)


def _print_findings(found: Sequence[findings.Finding], file: Path) -> None:
    table = Table(
        "rule",
        "",
        "where",
        "what",
        "hint",
        title=f"{len(found)} findings in {escape(file.name)}",
        title_justify="left",
    )
    for f in found:
        table.add_row(f.rule, f.severity, *(Text(t) for t in (f.node, f.message, f.cure)))
    out.print(table if found else "nothing found")


@app.command()
def bench(
    model: Model,
    shape: Annotated[
        str | None,
        typer.Option(help=f"{SHAPE}; by default what the model was transformed on, else {USUAL}."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each form.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that a runtime may use; by default all.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="A file for the same numbers.")
    ] = None,
    weights: Weights = None,
    trust_pickle: Trust = False,
) -> None:
    """Time a float model as written, merged, and INT8 in every installed runtime."""
    net = load_model(model, weights, trust_pickle)
    x = random_input(usual_shape(net) if shape is None else shape, batch)
    if _quantized(net):
        raise InputError("bench needs the float model: it quantizes a copy for each runtime itself")
    if threads:
        torch.set_num_threads(threads)
    merged = api.transform(net, ["fuse"], example=x)
    int8 = {
        name: api.calibrate(api.transform(net, ["ptq"], example=x, target=name), [x])
        for name in installed()
    }
    forms = Forms(api.transform(net, [], example=x).eval(), merged.eval(), int8)
    found = measure(forms, x, rounds=rounds, threads=threads, progress=err.is_terminal)
    if json is not None:
        write_whole(json, lambda part: Path(part).write_text(found.json() + "\n"))
    out.print(found)
