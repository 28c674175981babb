"""`amalgam experts`."""

from __future__ import annotations

import base64
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.cli.options import with_settings
from amalgam.config import Settings
from amalgam.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from amalgam.experts.saved import SavedSet
    from amalgam.tools.trace import PromptTrace

_REFRESH_SECONDS = 2.0
_TIMEOUT_SECONDS = 30.0
# From never used to far above an even share; colours of a heatmap that also read in black and white.
_SHADES = (" ", "░", "▒", "▓", "█")
_COLOURS = ("grey30", "blue", "cyan", "yellow", "red")
_MAX_TOKEN_CHARS = 16


@with_settings(needs_model=False)
def command(
    settings: Settings,
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8080",
    top_k: Annotated[int, typer.Option(min=1, help="How many of the busiest experts to list.")] = 10,
    minutes: Annotated[float | None, typer.Option(help="Only the last so many minutes.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted.")] = False,
    prompt: Annotated[
        str | None, typer.Option(help="Analyse this text token by token, without a server (with --config or --model).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the chat template around --prompt.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Go on from --prompt, greedily.")] = 1,
    layer: Annotated[list[int], typer.Option(help="Show this layer of --prompt. Repeatable.")] = [],  # noqa: B006
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two saved sets (files), or for the server: all, label:NAME, minutes:N, saved:NAME."),
    ] = None,
    merge: Annotated[list[Path], typer.Option(help="Put saved sets together (with --save). Repeatable.")] = [],  # noqa: B006
    save: Annotated[Path | None, typer.Option(help="Write a saved set (.npz).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show which experts traffic activates: a server's, one text's, or that of saved sets."""
    chosen = [name for name, value in (("--prompt", prompt), ("--compare", compare), ("--merge", merge)) if value]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are given together.", remedy="Give one of them.")
    if prompt is not None:
        _trace(settings, prompt, chat, max_new_tokens, layer, save, as_json)
    elif compare is not None:
        _compare(url, *compare, as_json=as_json)
    elif merge:
        _merge(merge, save)
    elif save is not None:
        answer = _post(url, "export_expert_stats", {"format": "npz"})
        _write(save, base64.b64decode(answer["content"]))
    else:
        _show(url, {"top_k": top_k} | ({} if minutes is None else {"minutes": minutes}), watch, as_json)


def _show(url: str, body: dict[str, Any], watch: bool, as_json: bool) -> None:
    from rich.live import Live

    from amalgam.cli.console import out, print_json

    statistics = _post(url, "expert_stats", body)
    if as_json:
        print_json(statistics)
        return
    if not watch:
        out.print(_render(statistics))
        return
    with Live(_render(statistics), console=out, screen=True) as live:
        while True:
            time.sleep(_REFRESH_SECONDS)
            live.update(_render(_post(url, "expert_stats", body)))


def _trace(
    settings: Settings,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    layers: list[int],
    save: Path | None,
    as_json: bool,
) -> None:
    from amalgam.cli.console import out, print_json, progress_bar
    from amalgam.experts.saved import to_bytes
    from amalgam.experts.tracker import ExpertTracker
    from amalgam.llm import open_deployment
    from amalgam.tools.trace import trace_prompt

    if not settings.model.base_path:
        raise ConfigError("--prompt needs a model.", remedy="Give --config FILE or --model FOLDER.")
    with progress_bar() as progress:
        deployment = open_deployment(settings, progress)
    try:
        trace = trace_prompt(deployment, prompt, as_chat=chat, max_new_tokens=max_new_tokens)
        if save is not None:
            assert isinstance(deployment.observer, ExpertTracker)
            _write(save, to_bytes(deployment.observer.saved_set()))
    finally:
        deployment.close()
    unknown = set(layers).difference(trace.routing.layer_ids)
    if unknown:
        raise ConfigError(
            f"--layer is {min(unknown)}.", remedy=f"Layers with experts: {list(trace.routing.layer_ids)}."
        )
    if as_json:
        print_json(trace.as_json())
    else:
        out.print(_render_trace(trace, layers, out.width))


def _compare(url: str, first: str, second: str, *, as_json: bool) -> None:
    from amalgam.cli.console import out, print_json

    if Path(first).is_file() and Path(second).is_file():
        from amalgam.experts.comparison import compare
        from amalgam.experts.saved import load

        a, b = load(first), load(second)
        b.check_fits(a.layer_ids, a.num_experts, repr(second))
        counts = (item.total.counts.sum(axis=0) for item in (a, b))
        answer = {"a": first, "b": second, "layer_ids": list(a.layer_ids), **compare(*counts)}
    else:
        query = urllib.parse.urlencode({"a": first, "b": second})
        answer = _fetch(urllib.request.Request(f"{url.rstrip('/')}/experts/compare?{query}"), url)
    if as_json:
        print_json(answer)
    else:
        out.print(_render_comparison(answer))


def _merge(paths: list[Path], save: Path | None) -> None:
    from amalgam.experts.saved import load, merge, to_bytes

    if save is None:
        raise ConfigError("--merge has nowhere to write to.", remedy="Give --save FILE.npz.")
    merged: SavedSet = merge([load(path) for path in paths])
    _write(save, to_bytes(merged))


def _write(path: Path, content: bytes) -> None:
    from amalgam.cli.console import err, human_bytes
    from amalgam.experts.saved import replace_file

    try:
        replace_file(path, content)
    except OSError as error:
        raise ConfigError(f"Cannot write {str(path)!r}: {error.strerror}.", remedy="Choose another --save.") from None
    err.print(f"Saved {path} ({human_bytes(len(content))}).", markup=False, highlight=False)


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    return _fetch(urllib.request.Request(f"{url.rstrip('/')}/{path}", json.dumps(body).encode(), headers), url)


def _fetch(request: urllib.request.Request, url: str) -> Any:
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
    from rich.text import Text

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
    marks = {"warning": "yellow", "notice": "cyan"}
    hints = [Text(f"• {hint['text']}", style=marks.get(hint["severity"], "")) for hint in statistics.get("hints", [])]
    labels = ", ".join(f"{row['label']} {row['tokens']}" for row in statistics.get("labels", []))
    domains = [Text(f"Tokens by domain: {labels}")] if labels else []
    return Group(head, _heatmap(statistics), table, *domains, *hints)


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


def _render_trace(trace: PromptTrace, layers: list[int], width: int) -> RenderableType:
    """A line per token; per layer its experts, the heaviest first."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    layer_ids, expert_ids = trace.routing.layer_ids, trace.routing.expert_ids
    digits = len(str(int(expert_ids.max(initial=0))))
    room = max(1, (width - _MAX_TOKEN_CHARS - 12) // (expert_ids.shape[-1] * (digits + 1) + 2))
    shown = layers or list(layer_ids[:: max(1, -(-len(layer_ids) // room))])
    table = Table("", "token", *(f"layer {layer_id}" for layer_id in shown))
    for index, text in enumerate(trace.texts):
        cells = [
            Text(" ".join(f"{expert:>{digits}}" for expert in expert_ids[index, layer_ids.index(layer_id)].tolist()))
            for layer_id in shown
        ]
        style = "" if index < trace.num_prompt_tokens else "green"
        table.add_row(str(index), Text(repr(text)[1 : _MAX_TOKEN_CHARS + 1].removesuffix("'"), style=style), *cells)
    if len(shown) == len(layer_ids):
        return table
    note = f"{len(shown)} of {len(layer_ids)} layers; --layer chooses others, --json has all, with gate weights"
    return Group(table, Text(note, style="dim"))


def _render_comparison(answer: dict[str, Any]) -> RenderableType:
    """A line per layer: how far apart, and the experts that gain and lose most."""
    from rich.table import Table

    mean = answer["jensen_shannon"]["mean"]
    distance = "unknown" if mean is None else f"{mean:.3f} bits"
    table = Table(
        "layer",
        "divergence (bits)",
        "more in the first",
        "more in the second",
        caption=f"Jensen-Shannon divergence on average: {distance}",
    )
    for layer_id, value, differences in zip(
        answer["layer_ids"], answer["jensen_shannon"]["by_layer"], answer["difference"], strict=True
    ):
        order = sorted(range(len(differences)), key=lambda expert_id: differences[expert_id])
        lost = [f"{expert} ({differences[expert]:+.1%})" for expert in order[:3] if differences[expert] < 0]
        gained = [
            f"{expert} ({differences[expert]:+.1%})" for expert in reversed(order[-3:]) if differences[expert] > 0
        ]
        table.add_row(str(layer_id), "–" if value is None else f"{value:.3f}", ", ".join(gained), ", ".join(lost))
    return table
