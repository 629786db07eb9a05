"""The README's snippet runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from repfx.cli.main import app

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "class Block" in block
    )
    exec(compile(code, "README", "exec"), {"__name__": "readme"})
    shown = capsys.readouterr().out
    assert "3 blocks merge, 0 left alone" in shown and "codes differ on equal inputs" in shown
    assert shown.rstrip().endswith("max abs 0, relative 0, SQNR inf dB")
    assert (tmp_path / "int8.onnx").exists()


def test_expand_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "expand(" in block
    )
    exec(compile(code, "README", "exec"), {"__name__": "readme"})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("4 max abs") and second.startswith("2 max abs")


def test_the_commands_exist() -> None:
    named = set(re.findall(r"^repfx (\w+)", README, re.MULTILINE))
    assert named == {c.name or c.callback.__name__ for c in app.registered_commands}
