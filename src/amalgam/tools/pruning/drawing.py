"""Divergence against bytes as a page: plans of the whole model, and models that were cut.

In: points. Out: HTML with plotly.js in it; nothing is fetched from elsewhere. Must never know: how they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from amalgam.base.figures import COLOURS, page
from amalgam.evaluation.confidence import Interval
from amalgam.tools.pruning.comparing import ALL, Point

PLAN = "precision alone (plan)"


def curve_figure(points: Sequence[Point], title: str, text: str) -> go.Figure:
    """
    Args:
        text: what the divergence was measured on.
    """
    figure = go.Figure()
    plans = {point.plan_bytes: point.plan_divergence[ALL] for point in points}
    lines: dict[str, dict[int, Interval]] = {PLAN: plans}
    for point in points:
        lines.setdefault(point.candidate, {})[point.nbytes] = point.divergence[ALL]
    for number, (name, values) in enumerate(lines.items()):
        sizes = sorted(values)
        means = [values[size].value for size in sizes]
        figure.add_scatter(
            x=[size / 1e6 for size in sizes],
            y=means,
            name=name,
            mode="lines+markers",
            line={"color": COLOURS[number % len(COLOURS)], "width": 3 if name == PLAN else 1.5},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [(values[size].high or mean) - mean for size, mean in zip(sizes, means, strict=True)],
                "arrayminus": [mean - (values[size].low or mean) for size, mean in zip(sizes, means, strict=True)],
                "thickness": 1,
            },
            hovertemplate="%{x:.2f} MB, KL %{y:.5f}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        title=title,
        xaxis_title="MB of weights, as stored",
        yaxis_title=f"KL divergence from the whole wide model, nats a token ({text})",
        yaxis_type="log",
        template="plotly_white",
        hovermode="closest",
        legend={"orientation": "h", "y": -0.18},
    )
    return figure


def curve_html(points: Sequence[Point], model: str, text: str) -> str:
    """The page."""
    return page(curve_figure(points, f"{model}: KL divergence against bytes", text))
