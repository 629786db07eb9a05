"""Every guide does what it says: its files are written, its programs and commands run, in order, in
an empty folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import repfx

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
READ_ONLY = {"lint", "figures", "architecture"}  # without programs
GUIDES = [p for p in PAGES if p.stem not in READ_ONLY]
HERE = Path(__file__).parent
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


# Runs the programs and commands of a guide in one process, because each import takes seconds.
DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import conftest
from repfx.cli import main
for kind, text in json.load(open("steps.json")):
    print(text, flush=True)
    if kind == "python":
        exec(compile(text, "the guide", "exec"), {"__name__": "__main__"})
        continue
    for line in text.strip().splitlines():
        sys.argv = line.split()
        assert sys.argv[0] == "repfx"
        try:
            main()
        except SystemExit as end:
            assert end.code == 0, line
"""


def run(command: list[str], folder: Path) -> None:
    paths = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.stem)
def test_a_guide_runs(guide: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(draw.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(
            tmp_path / "images" / f"{i}.png"
        )
    steps: list[tuple[str, str]] = []
    for kind, text in BLOCK.findall(guide.read_text()):
        name = re.match(r"# file: (\S+)\n", text)
        if name:
            (tmp_path / name[1]).write_text(text)
        elif kind in ("python", "sh"):
            steps.append((kind, text))
        elif kind == "toml":
            package = tmp_path / "hard-1.0.dist-info"
            package.mkdir()
            (package / "METADATA").write_text("Metadata-Version: 2.1\nName: hard\nVersion: 1.0\n")
            group, line = re.search(r'entry-points\."(.*?)"\]\n(.*)', text).groups()
            (package / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    assert steps
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    run([sys.executable, "-c", DRIVER, str(HERE)], tmp_path)


def test_the_program_for_ultralytics_runs(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / folder / part).mkdir(parents=True)
        for i in range(4):
            pixels = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / part / f"{i}.png")
            (tmp_path / "labels" / part / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4")
    (tmp_path / "data.yaml").write_text(
        f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: [square]\n"
    )
    (text,) = [
        t for k, t in BLOCK.findall((ROOT / "docs" / "trainers.md").read_text()) if k[0] == "u"
    ]
    examples = str(ROOT / "examples")
    start = f"import sys; sys.path.insert(0, {examples!r}); import zoo_operators as z; z.provide()"
    code = f"{start}\n{text}"
    run([sys.executable, "-c", code], tmp_path)
    assert (tmp_path / "yolo.onnx").exists()


def test_the_guide_of_own_passes_is_short() -> None:
    text = (ROOT / "docs" / "own-pass.md").read_text()
    code = next(t for _, t in BLOCK.findall(text) if t.startswith("# file"))
    assert len(code[code.index("@dataclass") :].strip().splitlines()) <= 30


def test_a_pass_of_another_package_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "bad-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for target, text in (
        ("nowhere:Thing", "cannot load the pass"),
        ("json:loads", "is not a subclass of repfx.passes.Pass"),
    ):
        (package / "entry_points.txt").write_text(f"[repfx.passes]\nfolly = {target}\n")
        with pytest.raises(repfx.InputError, match=text):
            repfx.transform(repfx.blocks.RepVGG(3, 4, 3), ["folly"])


def test_every_page_is_linked() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"(docs/{page.name})" in readme for page in PAGES)


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]*)(?:#[^)]*)?\)", page.read_text()):
        assert not target or (page.parent / target).exists(), target


def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    run([sys.executable, "-m", "pdoc", "repfx", "-o", str(tmp_path / "api")], tmp_path)
    page = (tmp_path / "api" / "repfx.html").read_text()
    assert [name for name in repfx.__all__ if f'id="{name}"' not in page] == []
