"""repfx demo: trains, merges, calibrates, lowers and runs a model in a minute, on real data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import repfx as api
from repfx.blocks import RepVGG
from repfx.data.packaged import digits
from repfx.errors import InputError

TARGET = "onnxruntime"


@dataclass
class Row:
    """One form of the model: its file, a function that runs it, and its numbers."""

    name: str
    run: Callable[[Tensor], Tensor]
    path: Path
    convs: int
    params: int
    milliseconds: float = 0.0
    accuracy: float = 0.0


def small_repvgg(classes: int = 10) -> nn.Sequential:
    """Seven RepVGG blocks for images (N, 1, 8, 8)."""
    sizes = [
        (1, 32, 1),
        (32, 32, 1),
        (32, 64, 2),
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
    ]
    return nn.Sequential(
        *(m for i, o, stride in sizes for m in (RepVGG(i, o, 3, stride, padding=1), nn.ReLU())),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def demo(folder: Path, epochs: int, seed: int, console: Console) -> list[Row]:
    """Runs every step and prints the table. Raises InputError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    torch.manual_seed(seed)
    (train_x, train_y), (test_x, test_y) = digits(seed)
    model = small_repvgg()
    _train(model, train_x, train_y, epochs, console)

    merged = api.transform(model, ["fuse"])
    quantized = api.transform(model, ["ptq"], target=TARGET)
    api.calibrate(quantized, train_x.split(64), method="mse")
    train_form = api.transform(model, [])
    rows = []
    for name, m in (("train form", train_form), ("merged", merged), ("fake-quant", quantized)):
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.pt"
        api.save(m, path)
        rows.append(Row(name, m.eval(), path, _convs(m), _params(m)))
    batch = test_x[:64]
    for name, m in (("ONNX float", merged), ("ONNX INT8", quantized)):
        path = folder / f"{name.lower().replace(' ', '-')}.onnx"
        artifact = api.lower(m, path, example=batch, target=TARGET)
        rows.append(Row(name, _runtime(path), path, _convs(m), _params(m)))

    for row in rows:
        with torch.no_grad():
            row.accuracy = float((row.run(test_x).argmax(1) == test_y).float().mean())
    _measure(rows, batch)
    report = merged.meta["repfx"]
    parity = artifact.parity
    console.print(
        f"{len(report.merged)} blocks merged, largest error "
        f"{max(m.error for m in report.merged):.0e} in float64"
    )
    console.print(f"ONNX INT8 against fake-quant: {parity}")
    console.print(_table(rows, len(test_y), len(batch)))
    pages = folder / "report.html"
    batches = [(test_x[:64], test_y[:64])]
    (found,) = api.report(model, pages, data=batches, titles=["digits"], target=TARGET)
    for warning in found.warnings[:3]:
        console.print(f"warning: {warning.layer} {warning.what} ({warning.cure})", markup=False)
    console.print(
        f"wrote the files to {folder}; open {pages} to see what was done and what it costs",
        markup=False,
    )
    return rows


def _train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, console: Console) -> None:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on 8x8 images, threads would mostly wait for each other
    for _ in track(range(epochs), "training", console=console, transient=True):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    model.eval()


def _runtime(path: Path) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that spin while idle would slow down torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session: Any = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _measure(rows: list[Row], batch: Tensor, rounds: int = 30) -> None:
    """Sets each row's median milliseconds per batch.

    The forms run in turn, so that slow moments of the machine affect all of them."""
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    with torch.no_grad():
        for i in range(rounds + 3):
            for row in rows:
                start = time.perf_counter()
                row.run(batch)
                if i >= 3:
                    times[row.name].append(time.perf_counter() - start)
    for row in rows:
        row.milliseconds = 1000 * statistics.median(times[row.name])


def _convs(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _table(rows: list[Row], images: int, batch: int) -> Table:
    table = Table(title=f"handwritten digits, {images} test images", title_justify="left")
    table.add_column("form")
    for column in ("convs", "parameters", "file KB", f"ms / {batch} images", "accuracy %"):
        table.add_column(column, justify="right")
    for r in rows:
        size = f"{r.path.stat().st_size / 1000:,.0f}"
        table.add_row(
            r.name,
            str(r.convs),
            f"{r.params:,}",
            size,
            f"{r.milliseconds:.2f}",
            f"{100 * r.accuracy:.2f}",
        )
    return table
