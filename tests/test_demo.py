"""The demo, as it runs for a user but shorter: every form of the model is as accurate as the
first."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from repfx.cli.demo import demo

pytestmark = pytest.mark.slow


def test_demo(tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    rows = {r.name: r for r in demo(tmp_path / "out", 10, 0, console)}
    first = rows["train form"]
    assert first.convs == 14 and rows["merged"].convs == 7 and rows["merged"].params < first.params
    assert first.accuracy > 0.93
    assert rows["merged"].accuracy == first.accuracy
    assert abs(rows["fake-quant"].accuracy - first.accuracy) <= 0.01
    assert abs(rows["ONNX INT8"].accuracy - rows["ONNX float"].accuracy) <= 0.01
    assert rows["ONNX INT8"].path.stat().st_size < 0.32 * rows["ONNX float"].path.stat().st_size
    assert all(r.milliseconds > 0 for r in rows.values())
    text = console.export_text()
    assert "7 blocks merged" in text and "codes differ on equal" in text and "ONNX INT8" in text
