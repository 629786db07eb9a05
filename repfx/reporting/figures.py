"""The charts of a report, drawn with plotly, each with the same numbers in words and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from repfx.reporting.numbers import Activation, Drawing, Layer, Numbers, Spread

# Colour-blind readers can tell these apart, and they show in the light and the dark theme.
COLOURS = ("#2f6fdb", "#d9622b", "#2b9d6e", "#9a4fd1")
FAINT = "#8a8f98"


@dataclass(frozen=True)
class Chart:
    """A chart. `alt`: what it shows, for screen readers. `head`, `rows`: its numbers as a table."""

    key: str
    title: str
    alt: str
    figure: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def charts(models: Sequence[Numbers]) -> list[Chart]:
    """Every chart for which there are numbers."""
    found = [
        _violins("weights", "Weights of the deployed layers", models, lambda layer: layer.weight),
        _branches(models),
        _lines(
            "reach",
            "Largest weight, in standard deviations",
            "std",
            models,
            lambda layer: layer.weight.reach,
        ),
        _norms(models),
    ]
    if any(layer.input for m in models for layer in m.layers):
        found += [
            _violins(
                "inputs",
                "Inputs of the layers",
                models,
                lambda layer: layer.input.values if layer.input else None,
            ),
            _lines(
                "spread",
                "Inputs: standard deviation",
                "std",
                models,
                _given(lambda a: a.values.std),
                log=True,
            ),
            _lines("range", "Inputs: largest magnitude", "max", models, _given(_largest), log=True),
            _errors(models),
            _lines(
                "codes",
                "Inputs: share of the codes in use",
                "%",
                models,
                _given(lambda a: 100 * a.used),
            ),
            _lines(
                "clipped", "Inputs: share saturated", "%", models, _given(lambda a: 100 * a.clipped)
            ),
        ]
    return [c for c in found if c.rows]


def _given(of: Callable[[Activation], float]) -> Callable[[Layer], float | None]:
    return lambda layer: None if layer.input is None else of(layer.input)


def _largest(a: Activation) -> float:
    return max(abs(a.values.low), abs(a.values.high))


def _figure(y: str = "", height: int = 360, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 12, "t": 12, "b": 90},
        paper_bgcolor="rgba(0,0,0,0)",
        dragmode="pan",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.08},
        hovermode="closest",
        **layout,
    )
    figure.update_xaxes(showgrid=False, automargin=True)
    figure.update_yaxes(title=y, zeroline=False, gridcolor="rgba(128,128,128,.25)")
    return figure


def _name(text: str) -> str:
    """A name escaped for plotly, which would otherwise read it as HTML."""
    return escape(text, quote=False)


def _short(text: str) -> str:
    return _name(text if len(text) <= 28 else f"…{text[-27:]}")


def _labelled(figure: go.Figure, models: Sequence[Numbers]) -> go.Figure:
    """Labels the layers on the x axis with their names, skipping some where there are many."""
    longest = max(models, key=lambda m: len(m.layers)).layers
    step = max(1, len(longest) // 40)
    at = list(range(0, len(longest), step))
    figure.update_xaxes(tickvals=at, ticktext=[_short(longest[i].name) for i in at], tickangle=-45)
    return figure


def _chart(
    key: str, title: str, alt: str, figure: go.Figure, head: Sequence[str], rows: Any
) -> Chart:
    return Chart(
        key, title, alt, figure.to_json(), tuple(head), tuple(tuple(map(str, row)) for row in rows)
    )


def _violins(
    key: str, title: str, models: Sequence[Numbers], of: Callable[[Layer], Spread | None]
) -> Chart:
    figure = _labelled(_figure("value"), models)
    rows = []
    for n, model in enumerate(models):
        found = [
            (i, layer.name, s)
            for i, layer in enumerate(model.layers)
            if (s := of(layer)) is not None
        ]
        figure.add_trace(
            go.Violin(
                x=[i for i, _, s in found for _ in s.quantiles],
                y=[round(q, 6) for _, _, s in found for q in s.quantiles],
                name=_name(model.title),
                points=False,
                line={"color": COLOURS[n], "width": 1},
                scalemode="width",
                side=("both", "negative", "positive")[n + 1 if len(models) > 1 else 0],
                width=0.9,
                spanmode="hard",
                hoverinfo="y+name",
            )
        )
        rows += [
            (model.title, name, *(f"{v:.4g}" for v in (s.low, s.high, s.mean, s.std, s.reach)))
            for _, name, s in found
        ]
    figure.update_layout(violinmode="overlay")
    alt = (
        f"{title}: one distribution for each of {len(models[0].layers)} layers, from "
        "the first to the last."
    )
    return _chart(
        key,
        title,
        alt,
        figure,
        ("model", "layer", "smallest", "largest", "mean", "std", "largest / std"),
        rows,
    )


def _branches(models: Sequence[Numbers]) -> Chart:
    figure = _labelled(_figure("standard deviation"), models)
    rows = []
    for n, model in enumerate(models):
        found = [
            (i, b)
            for i, layer in enumerate(model.layers)
            for b in layer.branches
            if len(layer.branches) > 1
        ]
        fused = [(i, layer) for i, layer in enumerate(model.layers) if len(layer.branches) > 1]
        for what, points, symbol in (
            ("branches", [(i, b.name, b.weight) for i, b in found], "circle-open"),
            ("merged", [(i, layer.name, layer.weight) for i, layer in fused], "diamond"),
        ):
            figure.add_trace(
                go.Scatter(
                    x=[i for i, _, _ in points],
                    y=[s.std for _, _, s in points],
                    mode="markers",
                    name=f"{_name(model.title)}, {what}",
                    marker={"symbol": symbol, "color": COLOURS[n], "size": 8},
                    text=[_name(name) for _, name, _ in points],
                    hovertemplate="%{text}<br>std %{y:.3g}<extra></extra>",
                )
            )
            rows += [
                (model.title, name, what, f"{s.std:.4g}", f"{s.low:.4g}", f"{s.high:.4g}")
                for _, name, s in points
            ]
    title = "Kernels of the branches and of the merged layers"
    return _chart(
        "branches",
        title,
        f"{title}: standard deviations.",
        figure,
        ("model", "kernel", "", "std", "smallest", "largest"),
        rows,
    )


def _lines(
    key: str,
    title: str,
    unit: str,
    models: Sequence[Numbers],
    of: Callable[[Layer], float | None],
    log: bool = False,
) -> Chart:
    figure = _labelled(_figure(unit), models)
    rows = []
    for n, model in enumerate(models):
        found = [
            (i, layer.name, v)
            for i, layer in enumerate(model.layers)
            if (v := of(layer)) is not None
        ]
        figure.add_trace(
            go.Scatter(
                x=[i for i, _, _ in found],
                y=[v for _, _, v in found],
                mode="lines+markers",
                name=_name(model.title),
                line={"color": COLOURS[n]},
                text=[_name(name) for _, name, _ in found],
                hovertemplate="%{text}<br>%{y:.3g}<extra></extra>",
            )
        )
        rows += [(model.title, name, f"{v:.4g}") for _, name, v in found]
    if log:
        figure.update_yaxes(type="log", dtick="D2")
    worst = max(rows, key=lambda r: float(r[2]), default=("", "", "0"))
    return _chart(
        key,
        title,
        f"{title}, layer by layer; the largest is {worst[2]} at {worst[1]}.",
        figure,
        ("model", "layer", unit),
        rows,
    )


def _norms(models: Sequence[Numbers]) -> Chart:
    figure = _labelled(_figure("factor"), models)
    figure.update_yaxes(type="log", dtick="D2")
    rows = []
    for n, model in enumerate(models):
        found = [(i, norm) for i, layer in enumerate(model.layers) for norm in layer.norms]
        middle = [max(norm.median, 1e-12) for _, norm in found]
        figure.add_trace(
            go.Scatter(
                x=[i for i, _ in found],
                y=middle,
                mode="markers",
                name=_name(model.title),
                marker={"color": COLOURS[n], "size": 6},
                text=[_name(norm.name) for _, norm in found],
                error_y={
                    "array": [norm.high - norm.median for _, norm in found],
                    "arrayminus": [norm.median - norm.low for _, norm in found],
                    "width": 0,
                    "thickness": 1,
                },
                hovertemplate="%{text}<br>median %{y:.3g}<extra></extra>",
            )
        )
        rows += [
            (model.title, x.name, f"{x.low:.4g}", f"{x.median:.4g}", f"{x.high:.4g}")
            for _, x in found
        ]
    title = "Batch norms: the factor on each channel, |gamma| / sqrt(var + eps)"
    return _chart(
        "norms",
        title,
        f"{title}: smallest, median and largest.",
        figure,
        ("model", "norm", "smallest", "median", "largest"),
        rows,
    )


def _errors(models: Sequence[Numbers]) -> Chart:
    figure = _labelled(_figure("SQNR in dB, higher is better"), models)
    rows = []
    for n, model in enumerate(models):
        found = [
            (i, x)
            for i, x in enumerate(model.layers)
            if x.alone is not None and x.together is not None
        ]
        words = {"alone": "alone", "together": "with all layers before it"}
        for what, dash in (("alone", "dot"), ("together", "solid")):
            figure.add_trace(
                go.Scatter(
                    x=[i for i, _ in found],
                    y=[min(getattr(x, what), 200) for _, x in found],
                    mode="lines+markers",
                    name=f"{_name(model.title)}, {words[what]}",
                    line={"color": COLOURS[n], "dash": dash},
                    text=[_name(x.name) for _, x in found],
                    hovertemplate="%{text}<br>%{y:.1f} dB<extra></extra>",
                )
            )
        rows += [(model.title, x.name, f"{x.alone:.1f}", f"{x.together:.1f}") for _, x in found]
    title = "SQNR of each layer's output"
    alt = f"{title}, each layer quantized alone and together with all layers before it."
    return _chart(
        "errors",
        title,
        alt,
        figure,
        ("model", "layer", "alone, dB", "with all layers before it, dB"),
        rows,
    )


def graph(key: str, title: str, d: Drawing) -> Chart:
    """The chart of a graph with regions in colour; a click on a node opens its region."""
    deep = max((x for x, _ in d.places), default=1)
    rows = [y for _, y in d.places] or [0.0]
    figure = _figure(height=int(min(520, 140 + 50 * (max(rows) - min(rows)))), showlegend=False)
    figure.update_xaxes(visible=False, range=[-1, min(deep, 40) + 1])
    figure.update_yaxes(visible=False, range=[min(rows) - 1, max(rows) + 1])
    figure.update_layout(margin={"l": 0, "r": 0, "t": 0, "b": 0})
    xs: list[float | None] = []
    ys: list[float | None] = []
    for a, b in d.edges:
        (x0, y0), (x1, y1) = d.places[a], d.places[b]
        beside = y0 == y1 and x1 - x0 > 1  # draw a skip above the nodes it skips
        xs += [x0, (x0 + x1) / 2, x1, None] if beside else [x0, x1, None]
        ys += [y0, y0 + 0.45, y1, None] if beside else [y0, y1, None]
    figure.add_trace(
        go.Scatter(x=xs, y=ys, mode="lines", line={"color": FAINT, "width": 1}, hoverinfo="skip")
    )
    colour = [FAINT if r < 0 else COLOURS[r % len(COLOURS)] for r in d.regions]
    figure.add_trace(
        go.Scatter(
            x=[x for x, _ in d.places],
            y=[y for _, y in d.places],
            mode="markers",
            marker={
                "color": colour,
                "size": [9 if r < 0 else 13 for r in d.regions],
                "symbol": "square",
            },
            text=[f"{_name(n)}<br>{_name(k)}" for n, k in zip(d.names, d.kinds, strict=True)],
            customdata=list(d.regions),
            hovertemplate="%{text}<extra></extra>",
        )
    )
    inside = sum(r >= 0 for r in d.regions)
    return _chart(
        key,
        title,
        f"{title}: {len(d.names)} nodes, {inside} of them in merged blocks.",
        figure,
        (),
        (),
    )
