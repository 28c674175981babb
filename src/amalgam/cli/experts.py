"""`amalgam experts`."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.errors import UnavailableError

if TYPE_CHECKING:
    from rich.console import RenderableType

_REFRESH_SECONDS = 2.0
_TIMEOUT_SECONDS = 30.0
# From never used to far above an even share; colours of a heatmap that also read in black and white.
_SHADES = (" ", "░", "▒", "▓", "█")
_COLOURS = ("grey30", "blue", "cyan", "yellow", "red")


def command(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8080",
    top_k: Annotated[int, typer.Option(min=1, help="How many of the busiest experts to list.")] = 10,
    minutes: Annotated[float | None, typer.Option(help="Only the last so many minutes.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show which experts a server's traffic activates."""
    from rich.live import Live

    from amalgam.cli.console import out, print_json

    body = {"top_k": top_k} | ({} if minutes is None else {"minutes": minutes})
    statistics = _fetch(url, body)
    if as_json:
        print_json(statistics)
        return
    if not watch:
        out.print(_render(statistics))
        return
    with Live(_render(statistics), console=out, screen=True) as live:
        while True:
            time.sleep(_REFRESH_SECONDS)
            live.update(_render(_fetch(url, body)))


def _fetch(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url.rstrip('/')}/expert_stats", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        answer = error.read(4096).decode(errors="replace")
        raise UnavailableError(f"{url} answered {error.code}: {answer}") from None
    except (urllib.error.URLError, ValueError, OSError) as error:
        raise UnavailableError(
            f"No server answers at {url} ({error}).", remedy="Start one with `make serve`."
        ) from None


def _render(statistics: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    summary = statistics["summary"]
    head = (
        f"{summary['total_activations']} activations = {summary['total_tokens']} tokens × "
        f"{summary['active_experts_per_token']} experts × {summary['total_layers']} layers, "
        f"{summary['total_requests']} requests"
    )
    table = Table("layer", "expert", "activations", "share of layer", "prompt", "generated", title="Busiest experts")
    for row in statistics["top_experts"]:
        cells = (row["layer_id"], row["expert_id"], row["activation_count"])
        share = f"{row['layer_share'] or 0:.1%}"
        table.add_row(*map(str, cells), share, str(row["prompt_count"]), str(row["generated_count"]))
    return Group(head, _heatmap(statistics), table)


def _heatmap(statistics: dict[str, Any]) -> RenderableType:
    """Layers down, experts across; each cell by its share of the layer, in steps of two around an even share."""
    from rich.text import Text

    num_experts = statistics["summary"]["experts_per_layer"]
    text = Text("layer × expert; an even share is ▒, each step twice or half of it\n", style="dim")
    rows: dict[int, list[float]] = {}
    for row in statistics["expert_stats"]:
        rows.setdefault(row["layer_id"], []).append((row["layer_share"] or 0.0) * num_experts)
    for layer_id, shares in rows.items():
        text.append(f"{layer_id:>4} ", style="dim")
        for share in shares:
            level = 0 if share == 0 else min(4, max(1, 2 + round(math.log2(share))))
            text.append(_SHADES[level] * 2, style=_COLOURS[level])
        text.append("\n")
    return text
