"""INT8 files on every instruction set of this machine: codes, SQNR and layers in integers.

    python examples/isa.py [--groups zoo,placement,random] [--nets 200] [--out isa.jsonl] [--vnni]

Rows go to a file of JSON lines, and a run resumes where the last one stopped. A code is "wrong" if
it differs on equal inputs by more than arithmetic errors explain; other codes that differ are ties.
"over fake-quant" is the SQNR of the deployed file minus that of the torch model, in dB, both
against float. ONNX Runtime's kernels run natively and, with qemu-user installed, on emulated
processors."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import repfx
from repfx.lowering.onnx.check import reference
from repfx.lowering.onnx.parity import compare, expose
from repfx.lowering.runtimes.isa import Isa, isas, running
from repfx.lowering.runtimes.layers import kernels
from repfx.testing.random_net import random_net, settle

HERE = Path(__file__).parent
CHUNK = 10


def nets(group: str, count: int) -> Iterator[tuple[str, Any]]:
    """The names of the nets in a group, each with a function that makes (net, input)."""
    if group == "random":
        for seed in range(count):
            yield f"random {seed}", lambda seed=seed: random_net(seed)
    elif group == "placement":
        spec = importlib.util.spec_from_file_location(
            "placed", HERE.parent / "tests" / "test_placement.py"
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for kind in module.NETS:
            yield kind.__name__, lambda kind=kind: module.made(kind, "tensorrt")[::2]
    else:
        sys.path.insert(0, str(HERE))
        from zoo_int8 import MODELS

        for name in MODELS:
            yield name, lambda name=name: of_timm(name)


def of_timm(name: str) -> tuple[nn.Module, Tensor]:
    from zoo import timm

    torch.manual_seed(0)
    net, x = timm.create_model(name).eval(), torch.randn(2, 3, 96, 96)
    settle(net, x)
    return net, x


def rows(
    group: str, made: list[tuple[str, nn.Module, Tensor]], target: str
) -> Iterator[dict[str, Any]]:
    """A row for each net and instruction set; one process per set runs all the nets."""
    runtime = target.partition("-")[0]
    files = []
    for name, net, x in made:
        int8: Any = repfx.calibrate(repfx.transform(net, ["ptq"], example=x, target=target), [x])
        with tempfile.TemporaryDirectory() as folder:
            path = repfx.lower(int8, Path(folder) / "int8.onnx", example=x, target=target).onnx
            run, proto = kernels(runtime, path), onnx.load(path)
        files.append((name, reference(int8, target), proto, expose(proto)[0], x, run))
    native = Isa("as it is")
    for isa in [native, *isas(runtime)]:
        tasks = [[(p, (x,)) for p in (exposed, proto)] for _, _, proto, exposed, x, _ in files]
        outputs = run_all(isa, runtime, tasks)
        for (name, int8, proto, _, x, run), given in zip(files, outputs, strict=True):
            head = {
                "group": group,
                "net": name,
                "target": target,
                "isa": isa.name,
                "cpu": running(),
            }
            if given is None:
                yield {**head, "runs": False}
                continue
            found = compare(int8, proto, (x,), runtime, run=lambda *_, given=given: given)
            assert found.before is not None and found.after is not None
            quantizers = found.quantizers.values()
            yield {
                **head,
                "runs": True,
                "codes": found.codes,
                "different": found.different,
                "wrong": sum(q.wrong for q in quantizers),
                "bad": list(found.wrong[:2]),
                "own": found.output.sqnr,
                "fake_quant": found.before.sqnr,
                "file": found.after.sqnr,
                "integers": run.integers,
                "layers": run.layers,
            }


def run_all(isa: Isa, runtime: str, tasks: list[list[Any]]) -> list[list[list[Tensor]] | None]:
    """The outputs of each net's two files; None where the runtime does not run them.

    OpenVINO, for example, does not run a resize on SSE4.1."""
    try:
        flat = iter(isa.run_all(runtime, [task for pair in tasks for task in pair]))
        return [[next(flat), next(flat)] for _ in tasks]
    except repfx.CheckError:
        return [None] if len(tasks) == 1 else [run_all(isa, runtime, [pair])[0] for pair in tasks]


def table(found: list[dict[str, Any]]) -> Table:
    shown = Table(title=found[0]["cpu"] if found else "")
    for column in (
        "nets",
        "run",
        "target",
        "instruction set",
        "codes",
        "differ",
        "wrong",
        "over fake-quant, worst",
        "in integers",
    ):
        shown.add_column(column, justify="right")
    for key in dict.fromkeys((r["group"], r["target"], r["isa"]) for r in found):
        every = [r for r in found if (r["group"], r["target"], r["isa"]) == key]
        mine = [r for r in every if r["runs"]]
        sums = {
            k: sum(r[k] for r in mine)
            for k in ("codes", "different", "wrong", "integers", "layers")
        }
        worst = min((r["file"] - r["fake_quant"] for r in mine), default=0.0)
        layers = f"{sums['integers']:,} of {sums['layers']:,}"
        counts = (f"{sums[k]:,}" for k in ("codes", "different", "wrong"))
        shown.add_row(
            f"{len(every)} {key[0]}", str(len(mine)), *key[1:], *counts, f"{worst:+.1f} dB", layers
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default="placement,zoo,random")
    parser.add_argument("--nets", type=int, default=200, help="random nets")
    parser.add_argument("--out", type=Path, default=Path("isa.jsonl"))
    parser.add_argument(
        "--vnni",
        action="store_true",
        help="use the targets for CPUs with VNNI, to see what they lose on other CPUs",
    )
    args = parser.parse_args()
    targets = ["openvino-vnni", "onnxruntime-vnni"] if args.vnni else ["openvino", "onnxruntime"]
    found = (
        [json.loads(line) for line in args.out.read_text().splitlines()]
        if args.out.exists()
        else []
    )
    with args.out.open("a") as out:
        for group in args.groups.split(","):
            for target in targets:
                done = {r["net"] for r in found if r["target"] == target}
                todo = [(name, make) for name, make in nets(group, args.nets) if name not in done]
                chunk = 1 if group == "zoo" else CHUNK
                for i in track(range(0, len(todo), chunk), f"{group}, {target}"):
                    made = [(name, *make()) for name, make in todo[i : i + chunk]]
                    new = list(rows(group, made, target))
                    out.writelines(json.dumps(row) + "\n" for row in new)
                    out.flush()
                    found += new
    Console(width=150).print(table(found))


if __name__ == "__main__":
    main()
