"""The page of a climb: a table of the rungs, and what each loses against what it costs."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from repfx.errors import MissingPart
from repfx.files.store import write_whole


def write(found: Any, path: str | os.PathLike[str]) -> None:
    """Writes the page of a `Quantized`.

    Raises InputError for a path that cannot be written, and MissingPart without jinja2 and plotly.
    """
    try:
        from jinja2 import Environment
        from plotly.offline import get_plotlyjs

        from repfx.reporting.page import inert
        from repfx.reporting.plots import COLOURS, FAINT, blank, escaped
    except ImportError as error:
        raise MissingPart("the page needs jinja2 and plotly: pip install repfx[report]") from error

    def front(x: str, value: str) -> str:
        """Loss over a cost, with the rungs that nothing beats in both joined by a line."""
        figure = blank(f"lost, {found.unit}")
        rungs = [r for r in found.rungs if r.score is not None and getattr(r, value) is not None]
        best = _front(rungs, value)
        for group, name, colour in (
            (rungs, "tried", FAINT),
            (best, "best for its cost", COLOURS[0]),
        ):
            figure.add_scatter(
                x=[getattr(r, value) for r in group],
                y=[r.score.lost for r in group if r.score is not None],
                text=[escaped(r.name) for r in group],
                name=name,
                mode="markers" if group is rungs else "lines+markers",
                marker={"color": colour, "size": 9},
                line={"shape": "hv"},
            )
        figure.update_xaxes(title=x)
        return str(figure.to_json())

    charts = {
        "latency": front("estimated latency, relative to float", "latency"),
        "size": front("bytes of weights", "size"),
        "seconds": front("seconds to make it", "seconds"),
    }
    page = files("repfx.reporting") / "template"
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string((page / "ladder.html").read_text()).render(
        found=found,
        lines=found.lines(),
        figures=inert(json.dumps({k: json.loads(v) for k, v in charts.items()})),
        charts=list(charts),
        style=(page / "style.css").read_text(),
        plotly=get_plotlyjs(),
    )
    write_whole(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def _front(rungs: list[Any], value: str) -> list[Any]:
    """The rungs that none beats in loss and in cost, by cost."""
    found: list[Any] = []
    for rung in sorted(rungs, key=lambda r: (getattr(r, value), r.score.lost if r.score else 0.0)):
        lost = rung.score.lost if rung.score else 0.0
        if not found or lost < (found[-1].score.lost if found[-1].score else 0.0):
            found.append(rung)
    return found
