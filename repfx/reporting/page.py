"""The page: one HTML file that opens from disk and loads nothing from elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from repfx.errors import InputError, MissingPart
from repfx.files.store import write_whole
from repfx.reporting.numbers import Numbers, as_json


def write(models: Sequence[Numbers], path: str | os.PathLike[str]) -> Path:
    """Writes the page of one model, or of several side by side.

    Raises InputError for more than four models or a path that cannot be written, MissingPart
    without jinja2 and plotly."""
    try:
        from jinja2 import Environment
        from plotly.offline import get_plotlyjs

        from repfx.reporting.figures import charts, graph
        from repfx.reporting.plots import COLOURS
    except ImportError as error:
        raise MissingPart("the page needs jinja2 and plotly: pip install repfx[report]") from error
    if not 1 <= len(models) <= len(COLOURS):
        raise InputError(f"a page shows 1 to {len(COLOURS)} models, not {len(models)}")
    page = files("repfx.reporting") / "template"
    graphs = []
    for i, m in enumerate(models):
        for key, word, d in (("before", "as written", m.before), ("after", "merged", m.after)):
            chart = graph(f"graph-{key}-{i}", f"{m.title}, {word}", d)
            graphs.append({**vars(chart), "model": i})
    drawn = charts(models)
    figures = {c.key: json.loads(c.figure) for c in drawn} | {
        g["key"]: json.loads(g["figure"]) for g in graphs
    }
    shown = [
        {
            "title": m.title,
            "numbers": m,
            "merged": sum(bool(r.becomes) for r in m.regions),
        }
        for m in models
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string((page / "report.html").read_text()).render(
        models=shown,
        graphs=graphs,
        charts=drawn,
        figures=inert(json.dumps(figures)),
        numbers=inert(as_json(tuple(models))),
        style=(page / "style.css").read_text(),
        script=(page / "report.js").read_text(),
        plotly=get_plotlyjs(),
        version=_version(),
    )
    write_whole(path, lambda part: Path(part).write_text(text, encoding="utf-8"))
    return Path(path)


def inert(text: str) -> str:
    """The JSON with <, > and & escaped, so that it cannot close the HTML element around it."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _version() -> str:
    try:
        return version("repfx")
    except PackageNotFoundError:
        return ""
