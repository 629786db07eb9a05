"""The charts of a report: which numbers are drawn, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import plotly.graph_objects as go

from repfx.reporting.numbers import Activation, Drawing, Layer, Numbers, Spread, ratios
from repfx.reporting.plots import (
    COLOURS,
    FAINT,
    Chart,
    Named,
    bars,
    blank,
    chart,
    escaped,
    labelled,
    lines,
    violins,
)

TOGETHER = "with all layers before it"


def charts(models: Sequence[Numbers]) -> list[Chart]:
    """Every chart for which there are numbers."""
    found = [*_weights(models), *_inputs(models), *_outputs(models), _ratios(models)]
    return [c for c in found if c.rows]


def _weights(models: Sequence[Numbers]) -> list[Chart]:
    return [
        violins(
            "weights",
            "Weights of the deployed layers",
            models,
            lambda layer: [(layer.name, layer.weight)],
        ),
        _branches(models),
        violins(
            "kernels",
            "Weights of the branches",
            models,
            lambda layer: [(b.name, b.weight) for b in layer.branches],
        ),
        lines(
            "reach",
            "Largest weight, in standard deviations",
            "std",
            models,
            {"std": lambda layer: layer.weight.reach},
        ),
        bars(
            "norms",
            "Batch norms: the factor on each channel, |gamma| / sqrt(var + eps)",
            models,
            lambda layer: [(n.name, n.low, n.median, n.high) for n in layer.norms],
            log=True,
        ),
        bars(
            "betas",
            "Batch norms: beta",
            models,
            lambda layer: [(n.name, n.beta.low, n.beta.median, n.beta.high) for n in layer.norms],
        ),
    ]


def _inputs(models: Sequence[Numbers]) -> list[Chart]:
    def share(key: str, title: str, of: Callable[[Activation], float]) -> Chart:
        return lines(key, title, "%", models, {"%": _given(of)})

    def size(key: str, title: str, unit: str, of: Callable[[Activation], float]) -> Chart:
        return lines(key, title, unit, models, {unit: _given(of)}, log=True)

    def values(key: str, title: str, of: Callable[[Activation], Spread | None]) -> Chart:
        return violins(key, title, models, _named(of))

    return [
        values("inputs", "Inputs of the layers", lambda a: a.values),
        size("spread", "Inputs: standard deviation", "std", lambda a: a.values.std),
        size(
            "range",
            "Inputs: largest magnitude",
            "max",
            lambda a: max(abs(a.values.low), abs(a.values.high)),
        ),
        values("samples", "Inputs: largest magnitude of each sample", lambda a: a.samples),
        values("tops", "Inputs: largest magnitude of each channel", lambda a: a.tops),
        share("codes", "Inputs: share of the codes in use", lambda a: 100 * a.used),
        share("clipped", "Inputs: share saturated", lambda a: 100 * a.clipped),
        _clips(models),
        lines(
            "gain",
            "Inputs: what the best clip gains",
            "dB",
            models,
            {"dB": _given(lambda a: None if a.clip is None else a.clip.gain)},
        ),
    ]


def _outputs(models: Sequence[Numbers]) -> list[Chart]:
    return [
        violins(
            "operands",
            "Outputs of the branches",
            models,
            lambda layer: [(o.name, o.values) for o in layer.operands or ()],
        ),
        lines(
            "outputs",
            "Outputs, before the activation function",
            "value",
            models,
            {
                "mean": lambda layer: None if layer.output is None else layer.output.mean,
                "std": lambda layer: None if layer.output is None else layer.output.std,
            },
        ),
        lines(
            "errors",
            "SQNR of each layer's output",
            "SQNR in dB, higher is better",
            models,
            {TOGETHER: lambda layer: layer.together, "alone": lambda layer: layer.alone},
        ),
        lines(
            "mse",
            "MSE of each layer's output",
            "MSE, lower is better",
            models,
            {TOGETHER: lambda layer: layer.mse_together, "alone": lambda layer: layer.mse_alone},
            log=True,
        ),
    ]


def _ratios(models: Sequence[Numbers]) -> Chart:
    told = {r.layer: r for r in ratios(models)}
    words = " / ".join(m.title for m in models)
    return lines(
        "ratios",
        f"MSE of each layer's output, {words}",
        "ratio",
        [replace(models[0], title=words)],
        {
            TOGETHER: lambda layer: told[layer.name].together if layer.name in told else None,
            "alone": lambda layer: told[layer.name].alone if layer.name in told else None,
        },
        log=True,
    )


def _given(of: Callable[[Activation], float | None]) -> Callable[[Layer], float | None]:
    return lambda layer: None if layer.input is None else of(layer.input)


def _named(of: Callable[[Activation], Spread | None]) -> Callable[[Layer], Named]:
    def found(layer: Layer) -> Named:
        values = None if layer.input is None else of(layer.input)
        return [] if values is None else [(layer.name, values)]

    return found


def _clips(models: Sequence[Numbers]) -> Chart:
    figure = blank("SQNR in dB, higher is better")
    figure.update_xaxes(title="range, as a share of the largest magnitude", autorange="reversed")
    rows = []
    shares: tuple[float, ...] = ()
    for n, model in enumerate(models):
        found = [
            (layer.name, layer.input.clip)
            for layer in model.layers
            if layer.input is not None and layer.input.clip is not None
        ]
        figure.add_trace(
            go.Scatter(
                x=[x for _, clip in found for x in (*clip.shares, None)],
                y=[y for _, clip in found for y in (*clip.sqnr, None)],
                mode="lines+markers",
                name=escaped(model.title),
                line={"color": COLOURS[n], "width": 1},
                text=[escaped(what) for what, clip in found for _ in (*clip.shares, None)],
                hovertemplate="%{text}<br>%{x:.1f}: %{y:.1f} dB<extra></extra>",
            )
        )
        for what, clip in found:
            shares = clip.shares
            told = (f"{clip.best:.1f}", f"{clip.gain:.2f}", *(f"{v:.2f}" for v in clip.sqnr))
            rows.append((model.title, what, *told))
    title = "Inputs: SQNR of the rounded input as its range is clipped"
    alt = f"{title}, from the largest magnitude down to 0.3 of it: one line for each layer."
    head = ("model", "layer", "best range", "gain, dB", *(f"at {s}, dB" for s in shares))
    return chart("clips", title, alt, figure, head, rows)


def _branches(models: Sequence[Numbers]) -> Chart:
    figure = labelled(blank("standard deviation"), models)
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
                    name=f"{escaped(model.title)}, {what}",
                    marker={"symbol": symbol, "color": COLOURS[n], "size": 8},
                    text=[escaped(name) for _, name, _ in points],
                    hovertemplate="%{text}<br>std %{y:.3g}<extra></extra>",
                )
            )
            rows += [
                (model.title, name, what, f"{s.std:.4g}", f"{s.low:.4g}", f"{s.high:.4g}")
                for _, name, s in points
            ]
    title = "Kernels of the branches and of the merged layers"
    return chart(
        "branches",
        title,
        f"{title}: standard deviations.",
        figure,
        ("model", "kernel", "", "std", "smallest", "largest"),
        rows,
    )


def graph(key: str, title: str, d: Drawing) -> Chart:
    """The chart of a graph with regions in colour; a click on a node opens its region."""
    deep = max((x for x, _ in d.places), default=1)
    rows = [y for _, y in d.places] or [0.0]
    figure = blank(height=int(min(520, 140 + 50 * (max(rows) - min(rows)))), showlegend=False)
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
            text=[f"{escaped(n)}<br>{escaped(k)}" for n, k in zip(d.names, d.kinds, strict=True)],
            customdata=list(d.regions),
            hovertemplate="%{text}<extra></extra>",
        )
    )
    inside = sum(r >= 0 for r in d.regions)
    return chart(
        key,
        title,
        f"{title}: {len(d.names)} nodes, {inside} of them in merged blocks.",
        figure,
        (),
        (),
    )
