"""The frontier as a page: divergence against bytes, one line for each way of planning.

In: points. Out: HTML with plotly.js in it; nothing is fetched from elsewhere. Must never know: how they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from amalgam.base.figures import COLOURS, page
from amalgam.planning.planner import Point

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def frontier_html(points: Sequence[Point], model: str, text: str) -> str:
    """
    Args:
        text: what the divergence was measured on.
    """
    figure = go.Figure()
    kinds = list(dict.fromkeys(point.kind for point in points))
    for number, kind in enumerate(kinds):
        mine = sorted((point for point in points if point.kind == kind), key=lambda point: point.bits_per_weight)
        values = [point.divergence.value for point in mine]
        figure.add_scatter(
            x=[point.bits_per_weight for point in mine],
            y=values,
            name=kind,
            mode="lines+markers",
            line={
                "color": COLOURS[number % len(COLOURS)],
                "dash": _DASHES[number % len(_DASHES)],
                "width": 3 if number == 0 else 1.5,
            },
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [(p.divergence.high or p.divergence.value) - p.divergence.value for p in mine],
                "arrayminus": [p.divergence.value - (p.divergence.low or p.divergence.value) for p in mine],
                "thickness": 1,
            },
            customdata=[[point.name, point.nbytes / 1e6, point.budget] for point in mine],
            hovertemplate=(
                "%{customdata[0]}<br>%{x:.3f} bits a weight, %{customdata[1]:.2f} MB<br>KL %{y:.5f}"
                "<br>budget %{customdata[2]}<extra></extra>"
            ),
        )
    figure.update_layout(
        title=f"{model}: KL divergence against size",
        xaxis_title="bits a weight, as stored, of the weights that have a choice",
        yaxis_title=f"KL divergence from base, nats a token ({text})",
        yaxis_type="log",
        template="plotly_white",
        hovermode="closest",
        legend={"orientation": "h", "y": -0.18},
    )
    return page(figure)
