"""A benchmark as a page: latencies and throughput by load, and each load's distributions and course.

In: points, answers. Out: HTML with plotly.js in it; nothing is fetched from elsewhere. Must never know how they were
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from plotly.subplots import make_subplots

from amalgam.base.figures import COLOURS, page
from amalgam.tools.load.metrics import PERCENTILES, Point
from amalgam.tools.load.running import Measured
from amalgam.tools.load.saturation import Saturation

_MAX_SAMPLES = 2000  # of a distribution's line
_LATENCIES = {"ttft": "time to first token", "itl": "between tokens", "tpot": "per token", "e2e": "end to end"}


def benchmark_html(
    points: Sequence[Point],
    measured: Sequence[Measured],
    objectives: dict[str, float],
    saturation: Saturation | None,
    title: str,
) -> str:
    """One page; with several loads, the panels by load come first.

    Args:
        measured: what each point was computed from.
    """
    by_rate = [point for point in points if point.load.rate is not None]
    by_clients = [point for point in points if point.load.rate is None]
    sweeps = [(sweep, "clients") for sweep in [by_clients] if len(sweep) > 1]
    sweeps += [(sweep, "requests a second, sent") for sweep in [by_rate] if len(sweep) > 1]
    titles = [name for _, axis in sweeps for name in (f"Latency, ms, by {axis}", f"Throughput by {axis}")]
    titles += ["Distribution of latencies, last load", "Requests under way and tokens a second, last load"]
    rows = len(sweeps) + 1
    figure = make_subplots(
        rows=rows, cols=2, subplot_titles=titles, specs=[[{}, {"secondary_y": True}] for _ in range(rows)]
    )
    for row, (sweep, axis) in enumerate(sweeps, 1):
        _draw_sweep(figure, row, sweep, axis, objectives)
        if saturation is not None and saturation.requests_per_second and sweep is by_rate:
            figure.add_vline(
                x=saturation.requests_per_second,
                line={"dash": "dash", "color": "grey"},
                annotation_text=f"saturation {saturation.requests_per_second:.3g}/s",
                row=row,
                col=2,
            )
    if measured:
        _draw_distributions(figure, rows, measured[-1])
        _draw_course(figure, rows, measured[-1])
    figure.update_layout(title=title, template="plotly_white", height=420 * rows + 80, hovermode="closest")
    return page(figure)


def _draw_sweep(figure: Any, row: int, points: Sequence[Point], axis: str, objectives: dict[str, float]) -> None:
    ordered = sorted(points, key=lambda point: point.load.rate or point.load.concurrency or 0)
    x = [point.load.rate or point.load.concurrency for point in ordered]
    for number, (name, words) in enumerate(_LATENCIES.items()):
        for level, dash in (("p50", "solid"), ("p99", "dot")):
            values = [
                getattr(found, level) * 1e3 if (found := point.latencies[name]) is not None else None
                for point in ordered
            ]
            figure.add_scatter(
                x=x,
                y=values,
                name=f"{words}, {level}",
                legendgroup=name,
                showlegend=row == 1,
                mode="lines+markers",
                line={"color": COLOURS[number], "dash": dash},
                row=row,
                col=1,
            )
        if name in objectives:
            figure.add_hline(
                y=objectives[name] * 1e3, line={"color": COLOURS[number], "width": 1, "dash": "dash"}, row=row, col=1
            )
    throughputs: list[tuple[str, list[float], bool, int]] = [
        ("new tokens a second", [point.output_tokens_per_second for point in ordered], False, 4),
        ("answers a second", [point.requests_per_second for point in ordered], True, 5),
    ]
    if objectives:
        good = [point.goodput.requests_per_second if point.goodput else 0.0 for point in ordered]
        throughputs.append(("answers a second that meet the objectives", good, True, 2))
    for name, speeds, is_second, colour in throughputs:
        figure.add_scatter(
            x=x,
            y=speeds,
            name=name,
            legendgroup=name,
            showlegend=row == 1,
            mode="lines+markers",
            line={"color": COLOURS[colour]},
            row=row,
            col=2,
            secondary_y=is_second,
        )
    figure.update_yaxes(type="log", row=row, col=1)
    figure.update_xaxes(title=axis, row=row)
    figure.update_yaxes(title="tokens/s", rangemode="tozero", row=row, col=2, secondary_y=False)
    figure.update_yaxes(title="requests/s", rangemode="tozero", row=row, col=2, secondary_y=True)


def _draw_distributions(figure: Any, row: int, measured: Measured) -> None:
    """What share of the requests, or of the gaps, took how long at most."""
    whole = [answer for answer in measured.answers if not answer.error_kind]
    values = {
        "ttft": [answer.first_token_seconds for answer in whole],
        "itl": [gap for answer in whole for gap in answer.gaps],
        "tpot": [seconds for answer in whole if (seconds := answer.seconds_per_token) is not None],
        "e2e": [answer.total_seconds for answer in whole],
    }
    for number, (name, words) in enumerate(_LATENCIES.items()):
        if not values[name]:
            continue
        shares = np.linspace(0, 100, min(_MAX_SAMPLES, len(values[name])))
        figure.add_scatter(
            x=(np.percentile(values[name], shares) * 1e3).tolist(),
            y=shares.tolist(),
            name=words,
            legendgroup=f"{name} share",
            line={"color": COLOURS[number]},
            row=row,
            col=1,
        )
    for level in PERCENTILES:
        figure.add_hline(y=level, line={"color": "lightgrey", "width": 1}, row=row, col=1)
    figure.update_xaxes(title="ms", type="log", row=row, col=1)
    figure.update_yaxes(title="% take at most so long", row=row, col=1)


def _draw_course(figure: Any, row: int, measured: Measured) -> None:
    """Requests under way and tokens, second by second."""
    answers = [answer for answer in measured.answers if answer.sent]
    num_seconds = max(1, int(np.ceil(measured.seconds)))
    edges = np.linspace(0, max(measured.seconds, 1e-9), min(400, 4 * num_seconds) + 1)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    sent = np.sort([answer.sent - measured.started for answer in answers])
    ended = np.sort([answer.ended - measured.started for answer in answers])
    under_way = np.searchsorted(sent, middles, "right") - np.searchsorted(ended, middles, "right")
    # A request's tokens, evenly over its events.
    times = np.array([time - measured.started for answer in answers for time in answer.arrivals])
    weights = np.array([answer.num_tokens / len(answer.arrivals) for answer in answers for _ in answer.arrivals])
    speeds = np.histogram(times, edges, weights=weights)[0] / (edges[1] - edges[0])
    for name, values, is_second, colour in (
        ("tokens a second", speeds.tolist(), False, 4),
        ("requests under way", under_way.tolist(), True, 5),
    ):
        figure.add_scatter(
            x=middles, y=values, name=name, line={"color": COLOURS[colour]}, row=row, col=2, secondary_y=is_second
        )
    figure.update_xaxes(title="seconds", row=row, col=2)
    figure.update_yaxes(title="tokens/s", rangemode="tozero", row=row, col=2, secondary_y=False)
    figure.update_yaxes(title="under way", rangemode="tozero", row=row, col=2, secondary_y=True)
