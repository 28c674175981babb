"""The curve of a training as a page.

In: curves. Out: HTML with plotly.js in it; nothing is fetched from elsewhere. Must never know: how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from amalgam.base.figures import COLOURS, page
from amalgam.training.trainer import Look, Point

_SMOOTHED = 10  # steps of a moving mean: a batch has its own difficulty


def curve_figure(runs: Mapping[str, tuple[Sequence[Point], Sequence[Look]]], title: str) -> go.Figure:
    """Held-out divergence above, and beside it the held-out and the training loss; one colour for each run."""
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=("KL divergence from the teacher, held out", "loss, nats a token")
    )
    for number, (name, (curve, looks)) in enumerate(runs.items()):
        line = {"color": COLOURS[number % len(COLOURS)], "width": 2}
        steps = [look.step for look in looks]
        figure.add_scatter(
            x=steps, y=[look.divergence for look in looks], name=name, line=line, mode="lines+markers", row=1, col=1
        )
        figure.add_scatter(
            x=steps, y=[look.loss for look in looks], name=f"{name}, held out", line=line, mode="lines+markers",
            showlegend=False, row=1, col=2,
        )  # fmt: skip
        losses = [point.task_loss for point in curve]
        means = [sum(losses[max(0, end - _SMOOTHED) : end]) / min(end, _SMOOTHED) for end in range(1, len(losses) + 1)]
        figure.add_scatter(
            x=[point.step + 1 for point in curve], y=means, name=f"{name}, batches", line={**line, "width": 1},
            opacity=0.5, showlegend=False, row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(title_text="steps")
    figure.update_layout(title=title, template="plotly_white", legend={"orientation": "h", "y": -0.18})
    return figure


def curve_html(runs: Mapping[str, tuple[Sequence[Point], Sequence[Look]]], title: str) -> str:
    """A page of `curve_figure`."""
    return page(curve_figure(runs, title))
