"""README is short, its program runs as it stands, and the commands it sends people to exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from repfx.cli.main import app

pytestmark = pytest.mark.zoo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_program_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL)[0]
    exec(compile(code, "README", "exec"), {"__name__": "readme"})
    shown = capsys.readouterr().out
    assert (tmp_path / "int8.onnx").exists()
    # the weights are random: the words and the counts are the same, and so is the size of errors
    assert re.sub(r"\d+ of ", "N of ", numbers_out(shown)) == re.sub(
        r"\d+ of ", "N of ", numbers_out(said)
    )
    assert shown.startswith("22 blocks merged") and float(shown.split("SQNR ")[1][:5]) > 120


def numbers_out(text: str) -> str:
    """The text without measured values and without what rounding may add to a count."""
    return re.sub(r"\d+\.\d+(e-\d+)?|\d+e-\d+", "x", text).replace(", all ties", "")


def test_the_commands_exist() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    named = set(re.findall(r"^repfx (\w+)", page, re.MULTILINE))
    assert named == {c.name or c.callback.__name__ for c in app.registered_commands}


def test_the_makefile_has_the_two_commands() -> None:
    named = re.findall(r"^make (\w+)", README, re.MULTILINE)
    rules = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named == ["demo", "test"] and set(named) <= set(rules)
