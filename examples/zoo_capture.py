"""What repfx makes of 608 models of thirteen libraries: captured, merged, quantized and lowered.

    pip install -r examples/zoo_capture.txt          # the libraries; the file says what to mind
    python examples/zoo_capture.py [--only REGEX] [--libraries timm,spandrel] [--tiny]
    python examples/zoo_capture.py --retry           # again, those whose last row has a failure
    python examples/zoo_capture.py --until other_batch   # capture and merge only
    python examples/zoo_capture.py --list

No weights are downloaded: models are built with random ones, and batch norms and layer scales get
random values that show an error. Each model runs in a process of its own. Its row goes to a file
of JSON lines, and a run resumes where the last one stopped; of several rows of a model the last
counts. The repfx that is tried is the one of PYTHONPATH, or else the one beside this file. A row
has

    seconds_fuse, stages    processor time of the transform alone, and of each stage with what this
                            program does there itself; `seconds` is that of the clock, for all
    capture                 whole; leaves (a graph, but some modules stay as written); parts (no
                            graph of the root)
    untraced, facts         what stays as written, and why; what the graph rests on, if it is told
    error, precision        of the merged model against the model, on new images: the largest
                            relative error of a float output, and the type that both ran in
    conditioning            if they differ: by how much the model itself enlarges a change of its
                            input by 1e-15; that much of a difference is rounding
    discrete                outputs that are not floats: how many, and how many of them differ
    batch                   that error in float32, on three images where the example had two; null
                            where the model itself takes no other batch
    batch_norms             before, after, and what the library's own fuse leaves (null: has none)
    merged, macs, params    regions merged; millions of multiply-accumulates an image and
                            parameters, before and after
    memory                  the peak in MB after building, after merging and at the end
    settled                 whether batch norms had to follow the activations, which grew else
    quantizers, parity      after `ptq`; the integer values, those that differ in ONNX Runtime, and
                            the SQNR of the file against float in dB
    lint, lint_says         errors and warnings of `repfx.lint`, counted by rule and in full
    failure                 the first exception: stage, kind, message, and whether it is `clear`, a
                            RepfxError. A time limit and a killed process count as failures too

A model is a CNN or hybrid here if it has more than one convolution."""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import inspect
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GIVEN = [Path(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
sys.path.insert(0, str(HERE))
if not any((p / "repfx").is_dir() for p in GIVEN):
    sys.path.insert(1, str(HERE.parent))

import torch
import zoo_operators
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from zoo_models import LIBRARIES, Entry, entries

import repfx
from repfx.errors import RepfxError
from repfx.quant import FakeQuant

TARGET = "onnxruntime"
EQUAL = {"float64": 1e-9, "float32": 1e-4}  # relative errors up to these are rounding
CHECKOUT = Path(repfx.__file__ or "").parents[1]
WARM = "ZOO_CAPTURE_LIBRARIES"
OFFLINE = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "True", "TQDM_DISABLE": "1"}
Row = dict[str, Any]


def randomise(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Sets batch norms and layer scales to values that show an error, in place.

    A deep net may explode with statistics that are not its own. Then they become those of the
    input, times random factors, and True is returned."""
    torch.manual_seed(1)
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    with torch.no_grad():
        for m in norms:
            spread(m, torch.tensor(0.0), torch.tensor(1.0))
            if isinstance(m.weight, Tensor):
                m.weight.uniform_(0.5, 1.5)
            if isinstance(m.bias, Tensor):
                m.bias.normal_(0, 0.1)
        for name, p in model.named_parameters():
            constant = p.numel() > 1 and p.is_floating_point() and bool((p == p.flatten()[0]).all())
            if constant and abs(float(p.flatten()[0])) < 0.02:
                scale = re.search(r"gamma|scale|lambda|alpha|beta|\bls", name)
                _ = p.uniform_(0.1, 1) if scale else p.normal_(0, 0.1)
    outputs, _ = leaves(run(model, inputs))
    if all(bool(o.isfinite().all()) and float(o.abs().max()) < 100 for o in outputs if o.numel()):
        return False

    def settle(m: Any, args: tuple[Tensor, ...]) -> None:
        axes = [d for d in range(args[0].dim()) if d != 1]
        spread(m, args[0].mean(axes), args[0].var(axes).clamp(min=1e-3))

    hooks = [m.register_forward_pre_hook(settle) for m in norms if m.running_var.dim() == 1]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    return True


def spread(m: Any, mean: Tensor, var: Tensor) -> None:
    noise = torch.randn_like(m.running_mean) * 0.1
    m.running_mean.copy_(mean + noise * var.sqrt())
    m.running_var.copy_(var * (0.5 + torch.rand_like(m.running_var)))


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)  # for a forward that draws
    with torch.no_grad():
        return model(*copy.deepcopy(inputs))


def images(inputs: Any, count: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    """New inputs of the same kind, for as many images."""

    def new(x: Tensor) -> Tensor:
        shape = (count, *x.shape[1:]) if x.dim() > 3 else x.shape
        made = torch.rand(shape) if float(x.min()) >= 0 else torch.randn(shape)
        return made.to(dtype)

    if isinstance(inputs, list):
        return [new(inputs[0]) for _ in range(count)]
    return tuple(images(x, count, dtype) if isinstance(x, list) else new(x) for x in inputs)


def forget(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """The model after larger images, so that what it made in float32 for one size is made again.

    A model that takes no larger images is returned as it was."""
    if not isinstance(inputs[0], Tensor) or inputs[0].dim() != 4:
        return model
    other = copy.deepcopy(model)
    try:
        run(other, (nn.functional.pad(inputs[0], [0, 64, 0, 64]), *inputs[1:]))
    except Exception:
        return model
    return other


def leaves(output: Any) -> tuple[list[Tensor], list[Any]]:
    """The float tensors of an output, and its other leaves."""
    floats: list[Tensor] = []
    others: list[Any] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            (floats if leaf.is_floating_point() else others).append(leaf)
        elif hasattr(leaf, "__dict__") and not callable(leaf):  # a class that pytree does not know
            inner = leaves([v for v in vars(leaf).values() if v is not leaf])
            floats += inner[0]
            others += inner[1]
        else:
            others.append(leaf if isinstance(leaf, (str, int, float)) else type(leaf).__name__)
    return floats, others


def compare(before: Any, after: Any) -> Row:
    """The largest relative error of a float leaf; infinite where there are others, or of other
    shapes."""
    (floats, others), (floats_now, others_now) = leaves(before), leaves(after)
    found: Row = {"discrete": [len(others), 0], "error": math.inf}
    if (len(floats), len(others)) != (len(floats_now), len(others_now)):
        return found
    found["discrete"][1] = sum(
        not (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b)
        for a, b in zip(others, others_now, strict=True)
    )
    errors = [relative(a, b) for a, b in zip(floats, floats_now, strict=True)]
    return {**found, "error": max(errors, default=0.0)}


def relative(a: Tensor, b: Tensor) -> float:
    finite = a.isfinite()
    if a.shape != b.shape or not torch.equal(finite, b.isfinite()):
        return math.inf
    a, b = a[finite].double(), b[finite].double()
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def count_norms(model: nn.Module) -> int:
    return sum(name.rpartition(".")[2] == "running_var" for name in model.state_dict())


def macs(model: nn.Module, inputs: tuple[Any, ...]) -> int | None:
    """Of one image, in millions; None where torch cannot count."""
    try:
        with FlopCounterMode(display=False) as counter:
            run(model, inputs)
        return round(counter.get_total_flops() / 2 / 2e6)
    except Exception:
        return None


def own_fuse(library: str, model: nn.Module) -> int | None:
    """The batch norms that the library's own fuse leaves; None where it has none."""
    made: Any = copy.deepcopy(model)
    try:
        if library in ("timm", "open_clip"):
            from timm.utils.model import reparameterize_model

            made = reparameterize_model(made)
        elif library == "ultralytics":
            made = made.fuse(verbose=False)
        elif library == "super_gradients":
            made.prep_model_for_conversion(input_size=(1, 3, 128, 128))
        elif type(made).__name__ == "FAST":
            from doctr.models.detection import reparameterize

            made = reparameterize(made)
        else:
            return None
    except Exception:
        return None
    return count_norms(made)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


UNTIL = "REPFX_ZOO_UNTIL"
STAGES = ("fuse", "other_batch", "ptq", "calibrate", "lower", "lint")


class Trial:
    """One model, stage by stage. `row` is what is known; `send` is told before and after each."""

    def __init__(self, entry: Entry, send: Callable[[Row], None]) -> None:
        self.entry, self.send = entry, send
        self.row: Row = {"stages": {}}

    def run(self, folder: Path) -> None:
        self.path = folder / "int8.onnx"
        stages = (self.build, self.fuse, self.compare, self.other_batch)
        for stage in (*stages, self.ptq, self.calibrate, self.lower, self.lint):
            passed = self.passes(stage)
            if not passed and stage not in (self.compare, self.other_batch):
                break
            if stage.__name__ == os.environ.get(UNTIL):
                break
        self.send({"stage": "done", "memory": [*self.row.get("memory", []), peak()]})

    def passes(self, stage: Callable[[], None]) -> bool:
        """The first exception becomes the row's failure."""
        name, start = stage.__name__, time.process_time()
        self.send({"stage": name})
        error = None
        try:
            stage()
        except Exception as caught:
            error = caught
            kind = type(error).__name__
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                kind = "out of memory"
            failure = {"stage": name, "kind": kind, "clear": isinstance(error, RepfxError)}
            self.row.setdefault("failure", {**failure, "message": str(error)[:600]})
        self.row["stages"][name] = round(time.process_time() - start, 2)
        self.send(self.row)
        return error is None

    def build(self) -> None:
        torch.manual_seed(0)
        self.model, self.inputs = self.entry.build(self.entry)
        self.model.eval()  # which returns nothing in one library
        self.model.requires_grad_(True)
        self.row["settled"] = randomise(self.model, self.inputs)
        convs = sum(isinstance(m, nn.modules.conv._ConvNd) for m in self.model.modules())
        self.row |= {"convs": convs, "memory": [peak()]}

    def fuse(self) -> None:
        start = time.process_time()
        self.merged = repfx.transform(self.model, ["fuse"], example=self.inputs)
        self.row["seconds_fuse"] = round(time.process_time() - start, 2)
        self.row["memory"] = [*self.row["memory"], peak()]
        report: Any = self.merged.meta["repfx"]
        graph = isinstance(self.merged, fx.GraphModule)
        params = [sum(p.numel() for p in m.parameters()) for m in (self.model, self.merged)]
        self.row |= {
            "capture": "parts" if not graph else "leaves" if report.untraced else "whole",
            "untraced": [[d.where, d.reason] for d in report.untraced],
            "facts": [str(f) for f in getattr(report, "facts", None) or ()],
            "merged": len(report.merged),
            "batch_norms": [
                count_norms(self.model),
                count_norms(self.merged),
                own_fuse(self.entry.library, self.model),
            ],
            "params": params,
            "macs": [macs(self.model, self.inputs), macs(self.merged, self.inputs)],
        }

    def compare(self) -> None:
        """Merged again in float64, since the weights of a merged float32 model are rounded."""
        double = images(self.inputs, dtype=torch.float64)
        model = forget(copy.deepcopy(self.model).double(), double)
        try:
            expected = run(model, double)
        except Exception:  # the model's own code is for float32 only
            single = images(self.inputs)
            found = compare(run(self.model, single), run(self.merged, single))
            self.row |= {**found, "precision": "float32"}
            return
        example = images(self.inputs, dtype=torch.float64)
        merged = repfx.transform(model, ["fuse"], example=example)
        self.row |= {**compare(expected, run(merged, double)), "precision": "float64"}
        if self.row["error"] > EQUAL["float64"]:
            near = tuple(x * (1 + 1e-15) if isinstance(x, Tensor) else x for x in double)
            self.row["conditioning"] = compare(expected, run(model, near))["error"] / 1e-15

    def other_batch(self) -> None:
        three = images(self.inputs, 3)
        try:
            expected = run(self.model, three)
        except Exception:  # the model itself takes no other batch
            return
        self.row["batch"] = compare(expected, run(self.merged, three))["error"]

    def ptq(self) -> None:
        del self.merged
        self.int8: Any = repfx.transform(self.model, ["ptq"], example=self.inputs, target=TARGET)
        self.row["quantizers"] = sum(isinstance(m, FakeQuant) for m in self.int8.modules())

    def calibrate(self) -> None:
        repfx.calibrate(self.int8, [self.batch(self.inputs), self.batch(images(self.inputs))])

    def lower(self) -> None:
        parity = repfx.lower(self.int8, self.path, example=self.inputs, target=TARGET).parity
        sqnr = None if parity.after is None else round(parity.after.sqnr, 1)
        self.row["parity"] = [parity.codes, parity.different, sqnr]

    def lint(self) -> None:
        found = [f for f in repfx.lint(self.path, TARGET) if f.severity in "EW"]
        self.row["lint"] = dict(Counter(f"{f.severity} {f.rule}" for f in found))
        self.row["lint_says"] = [str(f) for f in found]

    def batch(self, inputs: tuple[Any, ...]) -> Any:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            return inputs[0]
        names = inspect.signature(self.model.forward).parameters
        return dict(zip(names, inputs, strict=False))


@dataclass(frozen=True)
class Limits:
    """Processor time in seconds and memory in GB of one model."""

    seconds: int
    memory: int

    @property
    def wall(self) -> int:
        """Other programs may need the machine too."""
        return 6 * self.seconds


def child(pipe: Connection, name: str, limits: Limits) -> None:
    """The process of one model; libraries print, so what it prints goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory << 30, limits.memory << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Trial(next(e for e in entries() if e.key == name), pipe.send).run(Path(folder))


def trial(context: Any, entry: Entry, limits: Limits) -> Row:
    """The row of a model, from a process that is ended at the time limit."""
    row: Row = {"library": entry.library, "name": entry.name, "repfx": str(CHECKOUT)}
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs, entry.key, limits))
    start = time.monotonic()
    process.start()
    theirs.close()
    kind = "killed"
    try:
        while row.get("stage") != "done":
            if not mine.poll(max(0.0, start + limits.wall - time.monotonic())):
                kind = "time limit"
                process.kill()  # this one, started above
                break
            row |= mine.recv()
    except EOFError:
        pass
    process.join()
    row["seconds"] = round(time.monotonic() - start, 1)
    if (stage := row.pop("stage", "build")) != "done":
        if process.exitcode == -signal.SIGXCPU:
            kind = "time limit"
        told = f"{limits.seconds} s" if kind == "time limit" else f"exit code {process.exitcode}"
        failure = {"stage": stage, "kind": kind, "clear": False, "message": told}
        row.setdefault("failure", failure)
    return row


def server(libraries: list[str]) -> Any:
    """A context whose processes are copies of one that has this file and the libraries imported."""
    os.environ[WARM] = ",".join(libraries)
    context = multiprocessing.get_context("forkserver")
    # Python 3.11 does not preload "__main__", nor look for modules beside it.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *map(str, GIVEN)])
    context.set_forkserver_preload(["zoo_capture"])
    return context


def warm() -> None:
    """What is missing is told by the rows of its models."""
    zoo_operators.provide()
    later = {"super_gradients"}  # it needs mocks that others should not meet
    names = [n for n in os.environ[WARM].split(",") if n not in later]
    for name in ("onnxruntime", "onnxscript", "repfx.api", "repfx.lowering.onnx.lower", *names):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def read(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {f"{row['library']}/{row['name']}": row for row in rows}


def equal(row: Row) -> bool:
    """Also where the model itself turns one rounding of its input into more than such an error."""
    rounding = max(EQUAL[row.get("precision", "float64")], 1e-15 * row.get("conditioning", 0.0))
    return row.get("error", math.inf) <= rounding


def is_cnn(row: Row) -> bool:
    return row.get("convs", 0) > 1


def markdown(rows: list[Row]) -> str:
    """A table with a line a library, and the failures by their kind."""
    head = (
        *("library", "models", "captured whole", "with leaves", "in parts"),
        *("equal", "all batch norms merged", "batch norms left, ours / theirs"),
        *("lowered, of CNNs", "lint clean", "errors raised, raw"),
        *("fuse: median s", "worst", "most MB it adds"),
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    names = [name for name in LIBRARIES if any(r["library"] == name for r in rows)]
    for name in [*names, "all"]:
        mine = [r for r in rows if name in ("all", r["library"])]
        kinds = Counter(r.get("capture") for r in mine)
        built = [r for r in mine if r.get("failure", {}).get("stage") != "build"]
        normed = [r["batch_norms"] for r in mine if r.get("batch_norms", [0])[0]]
        theirs = [n for n in normed if n[2] is not None]
        lowered = [r for r in mine if is_cnn(r) and "parity" in r]
        failed = [r["failure"] for r in mine if "failure" in r]
        seconds = [r["seconds_fuse"] for r in mine if "seconds_fuse" in r]
        cells = (
            *(name, len(mine), kinds["whole"], kinds["leaves"], kinds["parts"]),
            f"{sum(map(equal, mine))} of {len(built)}",
            f"{sum(n[1] == 0 for n in normed)} of {len(normed)}",
            f"{sum(n[1] for n in theirs)} / {sum(n[2] for n in theirs)}" if theirs else "",
            f"{len(lowered)} of {sum(map(is_cnn, mine))}",
            f"{sum(not r['lint'] for r in lowered if 'lint' in r)} of {len(lowered)}",
            f"{len(failed)}, {sum(not f['clear'] for f in failed)}",
            f"{statistics.median(seconds):.1f}" if seconds else "",
            f"{max(seconds):.0f}" if seconds else "",
            max(
                (r["memory"][1] - r["memory"][0] for r in mine if len(r.get("memory", ())) > 2),
                default="",
            ),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def failures(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        key = f"{row['library']}/{row['name']}"
        if failure := row.get("failure"):
            what = "clear" if failure["clear"] else "raw"
            told = " ".join(failure["message"].split())[:150]
            lines.append(f"{key}: {failure['stage']}, {what} {failure['kind']}: {told}")
        elif not equal(row):
            lines.append(f"{key}: differs by {row.get('error')}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="of library/name")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="separated by commas")
    parser.add_argument("--tiny", action="store_true", help="the first model of each library")
    parser.add_argument("--retry", action="store_true", help="models with a failure again")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    parser.add_argument("--out", type=Path, default=Path("zoo-capture.jsonl"))
    parser.add_argument("--until", default="lint", choices=STAGES, help="the last stage to run")
    parser.add_argument("--timeout", type=int, default=180, help="processor time for each model")
    parser.add_argument("--memory", type=int, default=12, help="limit for each model in GB")
    return parser.parse_args()


def selected(args: argparse.Namespace) -> list[Entry]:
    libraries = args.libraries.split(",")
    if unknown := set(libraries) - set(LIBRARIES):
        sys.exit(f"unknown libraries {sorted(unknown)}; there are {', '.join(LIBRARIES)}")
    found = [e for e in entries() if e.library in libraries]
    if args.tiny:
        found = [next(e for e in found if e.library == name) for name in libraries]
    return [e for e in found if re.search(args.only, e.key)]


def main() -> None:
    args = arguments()
    chosen = selected(args)
    if args.list:
        print("\n".join(e.key for e in chosen))
        return
    done = read(args.out)
    todo = [e for e in chosen if e.key not in done or (args.retry and not fine(done[e.key]))]
    if todo and not args.table:
        os.environ |= {**OFFLINE, UNTIL: args.until}
        context = server(sorted({e.library for e in todo}))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(todo))
            for entry in todo:
                progress.update(task, description=entry.key)
                row = trial(context, entry, Limits(args.timeout, args.memory))
                with args.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                done[entry.key] = row
                progress.advance(task)
    rows = [done[e.key] for e in chosen if e.key in done]
    print(markdown(rows), failures(rows), sep="\n\n")


def fine(row: Row) -> bool:
    return "failure" not in row and equal(row)


if __name__ == "zoo_capture" and WARM in os.environ:
    warm()
if __name__ == "__main__":
    main()
