"""An overview as one HTML file: no scripts, nothing fetched from elsewhere, every name escaped.

In: an `Overview`, the model's name. Out: a page that can be mailed or archived.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from amalgam.base.sizes import human_bytes
from amalgam.experts.export.png import heatmap_png
from amalgam.experts.overview import Overview
from amalgam.experts.statistics import describe_experts, relative_share

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_NUM_TOP = 20
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p.note { opacity: .7; margin: .2rem 0; }
.frame { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { background: var(--soft); font-weight: 600; }
img { max-width: 100%; image-rendering: pixelated; background: #fff; border: 1px solid var(--line); }
li.warning::marker { content: "⚠ "; } .figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; }
.figures b { display: block; font-size: 1.3rem; }
"""


def render_html(overview: Overview, model: str) -> str:
    """The whole page."""
    answer = describe_experts(overview.snapshot)
    title = f"Expert use of {escape(model)}"
    sections = [
        f"<h1>{title}</h1>",
        _heading(answer),
        _hints(overview),
        _heatmap(overview),
        _layers(answer["layer_stats"]),
        _busiest(answer, overview),
        _labels(answer["labels"]),
        _precisions(overview),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">'
        '<link rel="icon" href="data:,">'  # so that browsers ask for no favicon.ico
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _heading(answer: dict[str, Any]) -> str:
    summary, window = answer["summary"], answer["window"]
    start, end = (datetime.fromtimestamp(window[key], UTC).strftime("%Y-%m-%d %H:%M:%S") for key in ("start", "end"))
    figures = {
        "tokens": summary["total_tokens"],
        "requests": summary["total_requests"],
        "activations": summary["total_activations"],
        "layers with experts": summary["total_layers"],
        "experts per layer": summary["experts_per_layer"],
        "active per token": summary["active_experts_per_token"],
    }
    items = "".join(f"<div><b>{value:,}</b>{name}</div>" for name, value in figures.items())
    return f'<p class="note">{start} to {end} UTC</p><div class="figures">{items}</div>'


def _hints(overview: Overview) -> str:
    if not overview.hints:
        return ""
    items = "".join(f'<li class="{escape(hint.severity)}">{escape(hint.text)}</li>' for hint in overview.hints)
    return f"<h2>What stands out</h2><ul>{items}</ul>"


def _heatmap(overview: Overview) -> str:
    snapshot = overview.snapshot
    if not snapshot.layer_ids:
        return ""
    png = heatmap_png(relative_share(snapshot.tally.counts.sum(axis=0), snapshot.sizes), snapshot.layer_ids)
    data = base64.b64encode(png).decode()
    note = "Layers down, experts across; red: used more than an even share, blue: less, grey: never."
    return f'<h2>Use</h2><img alt="{note}" src="data:image/png;base64,{data}"><p class="note">{note}</p>'


def _layers(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["layer", "activations", "experts used", "hot", "max / mean", "entropy", "Gini", "50%", "90%", "99%"]
    lines = [
        [
            row["layer_id"],
            f"{row['activation_count']:,}",
            f"{row['num_used_experts']} of {row['num_experts']}",
            row["num_hot_experts"],
            *(_decimal(row[key]) for key in ("max_to_mean", "normalized_entropy", "gini")),
            *("–" if value is None else value for value in row["coverage"].values()),
        ]
        for row in rows
    ]
    note = '<p class="note">The last three columns: how many experts take that part of the layer\'s activations.</p>'
    return f"<h2>Balance</h2>{_table(heads, lines)}{note}"


def _busiest(answer: dict[str, Any], overview: Overview) -> str:
    rows = sorted(answer["expert_stats"], key=lambda row: -row["activation_count"])[:_NUM_TOP]
    index = {layer_id: row for row, layer_id in enumerate(overview.snapshot.layer_ids)}
    lines = []
    for row in rows:
        formats = "–"
        if overview.precisions is not None:
            names = overview.precisions.formats[index[row["layer_id"]]][row["expert_id"]]
            formats = ", ".join(dict.fromkeys(filter(None, names))) or "–"
        counts = [f"{row[key]:,}" for key in ("activation_count", "prompt_count", "generated_count")]
        lines.append([row["layer_id"], row["expert_id"], *counts, f"{row['layer_share']:.1%}", formats])
    heads = ["layer", "expert", "activations", "prompt", "generated", "of its layer", "format"]
    return f"<h2>Busiest experts</h2>{_table(heads, lines)}"


def _labels(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [[row["label"], f"{row['tokens']:,}"] for row in rows]
    return f"<h2>Domains</h2>{_table(['domain', 'tokens'], lines)}"


def _precisions(overview: Overview) -> str:
    if overview.precisions is None:
        return ""
    by_format = overview.precisions.bytes_by_format()
    lines = [[name, human_bytes(size)] for name, size in by_format.items()]
    return f"<h2>Precision of the experts</h2>{_table(['format', 'size'], lines)}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="frame"><table><tr>{head}</tr>{body}</table></div>'


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
