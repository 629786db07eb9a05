"""The kinds of plots of a report, drawn with plotly, each with its numbers in words and a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

import plotly.graph_objects as go

from repfx.reporting.numbers import Layer, Numbers, Spread

# Colour-blind readers can tell these apart, and they show in the light and the dark theme.
COLOURS = ("#2f6fdb", "#d9622b", "#2b9d6e", "#9a4fd1")
FAINT = "#8a8f98"

T = TypeVar("T")
Named = Sequence[tuple[str, Spread]]


@dataclass(frozen=True)
class Chart:
    """A chart. `alt`: what it shows, for screen readers. `head`, `rows`: its numbers as a table."""

    key: str
    title: str
    alt: str
    figure: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def blank(y: str = "", height: int = 360, **layout: Any) -> go.Figure:
    """An empty figure with this title of its y axis."""
    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 12, "t": 12, "b": 90},
        paper_bgcolor="rgba(0,0,0,0)",
        dragmode="pan",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
        **layout,
    )
    figure.update_xaxes(showgrid=False, automargin=True)
    figure.update_yaxes(title=y, zeroline=False, gridcolor="rgba(128,128,128,.25)")
    return figure


def escaped(text: str) -> str:
    """A name escaped for plotly, which would otherwise read it as HTML."""
    return escape(text, quote=False)


def short(text: str) -> str:
    return escaped(text if len(text) <= 28 else f"…{text[-27:]}")


def labelled(figure: go.Figure, models: Sequence[Numbers]) -> go.Figure:
    """Labels the layers on the x axis with their names, skipping some where there are many."""
    longest = max(models, key=lambda m: len(m.layers)).layers
    step = max(1, len(longest) // 40)
    at = list(range(0, len(longest), step))
    figure.update_xaxes(tickvals=at, ticktext=[short(longest[i].name) for i in at], tickangle=-45)
    return figure


def chart(
    key: str, title: str, alt: str, figure: go.Figure, head: Sequence[str], rows: Any
) -> Chart:
    return Chart(
        key, title, alt, figure.to_json(), tuple(head), tuple(tuple(map(str, row)) for row in rows)
    )


def placed(
    models: Sequence[Numbers], of: Callable[[Layer], Sequence[T]], shared: bool = False
) -> tuple[list[list[tuple[float, T]]], float]:
    """What `of` finds in the layers of each model, each with its place on the x axis around its
    layer's, and the room that each has. Models may share places."""
    most = max((len(of(layer)) for m in models for layer in m.layers), default=0)
    groups = 1 if shared else len(models)
    room = 0.85 / max(1, most * groups)
    middle = (most * groups - 1) / 2
    found = []
    for n, model in enumerate(models):
        places = []
        for i, layer in enumerate(model.layers):
            items = of(layer)
            first = most * (n % groups) + (most - len(items)) / 2
            places += [(i + room * (first + j - middle), item) for j, item in enumerate(items)]
        found.append(places)
    return found, room


def violins(key: str, title: str, models: Sequence[Numbers], of: Callable[[Layer], Named]) -> Chart:
    """The distributions that `of` finds in each layer. Two models with one each draw half each."""
    figure = labelled(blank("value"), models)
    halves = len(models) == 2 and all(len(of(layer)) < 2 for m in models for layer in m.layers)
    places, room = placed(models, of, shared=halves)
    rows = []
    for n, (model, found) in enumerate(zip(models, places, strict=True)):
        figure.add_trace(
            go.Violin(
                x=[x for x, (_, s) in found for _ in s.quantiles],
                y=[round(q, 6) for _, (_, s) in found for q in s.quantiles],
                name=escaped(model.title),
                points=False,
                line={"color": COLOURS[n], "width": 1},
                scalemode="width",
                side=("negative", "positive")[n] if halves else "both",
                width=room,
                spanmode="hard",
                hoverinfo="y+name",
            )
        )
        rows += [
            (model.title, what, *(f"{v:.4g}" for v in (s.low, s.high, s.mean, s.std, s.reach)))
            for _, (what, s) in found
        ]
    figure.update_layout(violinmode="overlay")
    alt = f"{title}: the distributions for {len(models[0].layers)} layers, first to last."
    head = ("model", "name", "smallest", "largest", "mean", "std", "largest / std")
    return chart(key, title, alt, figure, head, rows)


def lines(
    key: str,
    title: str,
    unit: str,
    models: Sequence[Numbers],
    of: Mapping[str, Callable[[Layer], float | None]],
    log: bool = False,
) -> Chart:
    """Numbers of each layer. `of` gives each series its name; the first line is solid."""
    figure = labelled(blank(unit), models)
    rows = []
    for n, model in enumerate(models):
        found = [
            (i, layer.name, values)
            for i, layer in enumerate(model.layers)
            if None not in (values := [f(layer) for f in of.values()])
        ]
        for j, (what, dash) in enumerate(zip(of, ("solid", "dot"), strict=False)):
            figure.add_trace(
                go.Scatter(
                    x=[i for i, _, _ in found],
                    y=[_drawn(values[j], log) for _, _, values in found],
                    mode="lines+markers",
                    name=escaped(model.title if len(of) == 1 else f"{model.title}, {what}"),
                    line={"color": COLOURS[n], "dash": dash},
                    text=[escaped(layer) for _, layer, _ in found],
                    hovertemplate="%{text}<br>%{y:.3g}<extra></extra>",
                )
            )
        rows += [(model.title, layer, *(f"{v:.4g}" for v in vs)) for _, layer, vs in found]
    if log:
        figure.update_yaxes(type="log", dtick="D2")
    worst, where = max(((float(v), r[1]) for r in rows for v in r[2:]), default=(0.0, ""))
    alt = f"{title}, layer by layer; the largest is {worst:.4g} at {where}."
    return chart(key, title, alt, figure, ("model", "layer", *of), rows)


def _drawn(value: float | None, log: bool) -> float | None:
    """The value if it has a place on the axis."""
    shown = value is not None and math.isfinite(value) and (value > 0 or not log)
    return value if shown else None


def bars(
    key: str,
    title: str,
    models: Sequence[Numbers],
    of: Callable[[Layer], Sequence[tuple[str, float, float, float]]],
    log: bool = False,
) -> Chart:
    """What `of` finds in each layer: a name, and a bar from smallest to largest by the median."""
    figure = labelled(blank("value"), models)
    rows = []
    for n, (model, places) in enumerate(zip(models, placed(models, of)[0], strict=True)):
        found = [(x, *bar) for x, bar in places]
        figure.add_trace(
            go.Scatter(
                x=[x for x, *_ in found],
                y=[max(median, 1e-12) if log else median for *_, median, _ in found],
                mode="markers",
                name=escaped(model.title),
                marker={"color": COLOURS[n], "size": 6},
                text=[escaped(what) for _, what, *_ in found],
                error_y={
                    "array": [high - median for *_, median, high in found],
                    "arrayminus": [median - low for *_, low, median, _ in found],
                    "width": 0,
                    "thickness": 1,
                },
                hovertemplate="%{text}<br>median %{y:.3g}<extra></extra>",
            )
        )
        rows += [(model.title, what, *(f"{v:.4g}" for v in three)) for _, what, *three in found]
    if log:
        figure.update_yaxes(type="log", dtick="D2")
    alt = f"{title}: smallest, median and largest."
    return chart(key, title, alt, figure, ("model", "norm", "smallest", "median", "largest"), rows)
