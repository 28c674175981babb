"""What `amalgam experts` draws: statistics, a text's trace, a comparison.

In: answers of the server or of the tools, and the room on the screen. Out: renderables, or tables on stdout. Must never
know: where the answers came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from amalgam.base.counting import counted
from amalgam.base.escaping import one_line
from amalgam.cli.console import note, print_table, say

if TYPE_CHECKING:
    from amalgam.tools.trace import PromptTrace

# From never used to far above an even share, with colours that go the same way: the shades read in black and white.
_SHADES = ("·", "░", "▒", "▓", "█")
_COLOURS = ("grey50", "blue", "cyan", "yellow", "red")
_MEANINGS = ("never", "≤½", "even", "2×", "≥4×")
_EVEN = 2  # its index
_MARKS = {"warning": "yellow", "notice": "cyan"}
_TABLE_WIDTH = 62  # of the busiest experts, with counts in the millions
_GAP = 2
# The busiest experts' figures; what has no room goes, the last of these first.
_FIRST_COLUMNS = ("layer", "expert", "activations")
_MORE_COLUMNS = ("share", "now/s", "generated", "prompt")
_COLUMNS = ("layer", "expert", "activations", "share", "prompt", "generated", "now/s")
_MIN_TABLE_ROWS = 3
_HEATMAP_FRAME = 2  # lines: the experts' numbers and the legend
_LEGEND_WIDTH = 46  # without what it says of cells that stand for several
_MAX_TOKEN_CELLS = 16


def page(statistics: dict[str, Any], width: int, height: int | None) -> RenderableType:
    """A server's statistics, to be scrolled through; what sums them up comes last, where the eye is.

    Args:
        statistics: the answer of `/expert_stats`.
        height: of the screen, which the heatmap does not exceed; None: it has a line for every layer.
    """
    grid = _relative_shares(statistics)
    num_rows = len(grid) if height is None else height - _HEATMAP_FRAME - 1  # the prompt's line
    heatmap = _heatmap(grid, width, num_rows)
    return Group(*_head(statistics, width), *heatmap, _busiest(statistics["top_experts"], width), *_hints(statistics))


def screen(statistics: dict[str, Any], width: int, height: int, waiting: str = "") -> RenderableType:
    """The same within one screen: what has no room is left out, and the last line says so.

    Args:
        waiting: why these figures are not the newest; on the first line.
    """
    if waiting:
        line = Text(one_line(waiting), "bold yellow", no_wrap=True, overflow="ellipsis")
        return Group(line, screen(statistics, width, height - 1))
    grid, rows, hints = _relative_shares(statistics), statistics["top_experts"], _hints(statistics)
    head = _head(statistics, width)
    room = height - len(head)
    num_experts = statistics["summary"]["experts_per_layer"]
    for cell_width in (2, 1):
        left = max(_margin(grid) + cell_width * num_experts, _LEGEND_WIDTH)
        right = width - left - _GAP
        if right >= _TABLE_WIDTH:
            columns = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
            columns.add_column(width=left)
            heatmap = _heatmap(grid, left, room - _HEATMAP_FRAME)
            columns.add_row(Group(*heatmap), _fitted(rows, hints, right, room))
            return Group(*head, columns)
    wanted = 1 + len(rows) + len(_wrapped(hints, width))
    num_heatmap_rows = min(len(grid), max(room - wanted, room // 2) - _HEATMAP_FRAME)
    heatmap = _heatmap(grid, width, num_heatmap_rows)
    return Group(*head, *heatmap, _fitted(rows, hints, width, room - len(heatmap)))


def _fitted(rows: Sequence[dict[str, Any]], hints: Sequence[Text], width: int, num_lines: int) -> RenderableType:
    """The busiest experts and the hints in `num_lines` lines."""
    lines = _wrapped(hints, width)
    num_rows = min(len(rows), max(_MIN_TABLE_ROWS, num_lines - 1 - len(lines)))
    room = num_lines - 1 - num_rows
    if len(lines) > room:
        more = Text("… more without --watch", style="dim")
        lines = [*lines[: max(room - 1, 0)], more]
    return Group(_busiest(rows[:num_rows], width), *lines)


def _head(statistics: dict[str, Any], width: int) -> list[Text]:
    """Totals, rates and domains, a line each, or several where it is long."""
    summary, minutes = statistics["summary"], statistics["window"]["minutes"]
    num_layers, top_k = summary["total_layers"], summary["active_experts_per_token"]
    rate = sum(row["decaying_rate"] for row in statistics["expert_stats"])
    since = "since the last reset" if minutes is None else f"in the last {minutes:g} minutes"
    lines = [
        f"{counted(summary['total_activations'], 'activation')} = {counted(summary['total_tokens'], 'token')} × "
        f"{counted(top_k, 'expert')} × {counted(num_layers, 'layer')}; {counted(summary['total_requests'], 'request')}",
        f"Activations/s: {_rate(rate)} now (half-life {summary['half_life_minutes']:g} min), "
        f"{_rate(summary['rates']['activations_per_second'])} {since}; "
        f"tokens/s: {_rate(rate / max(num_layers * top_k, 1))} now",
    ]
    if labels := statistics.get("labels"):
        lines.append("Tokens by domain: " + ", ".join(f"{one_line(row['label'])} {row['tokens']}" for row in labels))
    return _wrapped([Text(line) for line in lines], width)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _busiest(rows: Sequence[dict[str, Any]], width: int) -> RenderableType:
    """With as many columns as have room for their figures."""
    cells = [_cells(row) for row in rows]
    needs = {name: max([len(name), *(len(row[name]) for row in cells)]) + _GAP for name in _COLUMNS}
    shown = list(_FIRST_COLUMNS)
    for name in _MORE_COLUMNS:
        if sum(needs[each] for each in (*shown, name)) > width:
            break
        shown.append(name)
    table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="bold")
    names = [name for name in _COLUMNS if name in shown]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[name] for name in names))
    return table


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "layer": str(row["layer_id"]),
        "expert": str(row["expert_id"]),
        "activations": str(row["activation_count"]),
        "share": f"{row['layer_share'] or 0:.1%}",
        "prompt": str(row["prompt_count"]),
        "generated": str(row["generated_count"]),
        "now/s": _rate(row["decaying_rate"]),
    }


def _hints(statistics: dict[str, Any]) -> list[Text]:
    return [
        Text(f"• {one_line(hint['text'])}", _MARKS.get(hint["severity"], "")) for hint in statistics.get("hints", [])
    ]


def _wrapped(texts: Sequence[Text], width: int) -> list[Text]:
    ruler = Console(width=width)
    return [line for text in texts for line in text.wrap(ruler, width)]


def _relative_shares(statistics: dict[str, Any]) -> dict[int, list[float]]:
    """Layer id → each expert's part of the layer over an even part."""
    shares: dict[int, list[float]] = {}
    for row in statistics["expert_stats"]:
        shares.setdefault(row["layer_id"], []).append(row["layer_share"] or 0.0)
    return {layer_id: [share * len(layer) for share in layer] for layer_id, layer in shares.items()}


def _margin(grid: dict[int, list[float]]) -> int:
    return max(2 * len(str(max(grid, default=0))) + 1, len("layer")) + 1  # two layer ids with a dash, and a space


def _heatmap(grid: dict[int, list[float]], width: int, num_rows: int) -> list[Text]:
    """Layers down, experts across, by their share of the layer in steps of two around an even share.

    Where there is no room for all, a cell stands for several and shows the busiest of them: the mean of many would be
    an even share everywhere.
    """
    if not grid:
        return [Text("This model has no experts.")]
    margin, layer_ids = _margin(grid), list(grid)
    num_experts = max(map(len, grid.values()))
    cell_width = 2 if 2 * num_experts + margin <= width else 1
    across = -(-num_experts // max((width - margin) // cell_width, 1))
    down = -(-len(layer_ids) // max(num_rows, 1))
    lines = [_numbers(num_experts, across, cell_width, margin, width)]
    for start in range(0, len(layer_ids), down):
        of_row = layer_ids[start : start + down]
        name = str(of_row[0]) if len(of_row) == 1 else f"{of_row[0]}–{of_row[-1]}"
        line = Text(f"{name:>{margin - 1}} ", style="dim", no_wrap=True)
        for first in range(0, num_experts, across):
            level = _level(max(max(grid[layer_id][first : first + across], default=0.0) for layer_id in of_row))
            line.append(_SHADES[level] * cell_width, style=f"not dim {_COLOURS[level]}")
        lines.append(line)
    return [*lines, _legend(down, across, width)]


def _level(relative_share: float) -> int:
    """Index of a share's shade."""
    if relative_share <= 0:
        return 0
    return min(max(_EVEN + round(math.log2(relative_share)), 1), len(_SHADES) - 1)


def _numbers(num_experts: int, across: int, cell_width: int, margin: int, width: int) -> Text:
    """The experts' ids above their cells, as many as there is room for."""
    digits = len(str(num_experts - 1)) + 1
    step = next(2**power for power in range(17) if 2**power * cell_width >= digits)
    room = width - margin
    ids = [
        expert_id
        for place, expert_id in enumerate(range(0, num_experts, step * across))
        if place * step * cell_width + len(str(expert_id)) <= room
    ]
    numbers = "".join(f"{expert_id:<{step * cell_width}}" for expert_id in ids)
    line = f"{'layer':>{margin - 1}} {numbers.rstrip()}"
    name = " expert"
    return Text(line + name * (len(line) + len(name) <= width), "dim", no_wrap=True, overflow="crop")


def _legend(down: int, across: int, width: int) -> Text:
    legend = Text(no_wrap=True, overflow="ellipsis")
    for shade, colour, meaning in zip(_SHADES, _COLOURS, _MEANINGS, strict=True):
        legend.append(shade, colour).append(f" {meaning}  ", "dim")
    parts = [f"{count} {noun}" for count, noun in ((down, "layers"), (across, "experts")) if count > 1]
    said = f"cell: busiest of {' × '.join(parts)}" if parts else ""
    if legend.cell_len + len(said) > width:  # a figure that is cut reads as another one
        said = "cell: busiest of several"
    return legend.append(said, "dim")


def print_trace(trace: PromptTrace, layers: Sequence[int], width: int) -> None:
    """A line per token; per layer its experts, the heaviest first."""
    layer_ids, expert_ids = trace.routing.layer_ids, trace.routing.expert_ids
    digits = len(str(int(expert_ids.max(initial=0))))
    room = max(1, (width - _MAX_TOKEN_CELLS - 23) // (expert_ids.shape[-1] * (digits + 1) + 2))
    shown = layers or list(layer_ids[:: max(1, -(-len(layer_ids) // room))])
    rows = [
        (
            str(index),
            "prompt" if index < trace.num_prompt_tokens else "answer",
            visible(data),
            *(
                " ".join(f"{expert:>{digits}}" for expert in expert_ids[index, layer_ids.index(layer_id)].tolist())
                for layer_id in shown
            ),
        )
        for index, data in enumerate(trace.token_bytes)
    ]
    print_table(("", "of", "token", *(f"layer {layer_id}" for layer_id in shown)), rows)
    if not layers and len(shown) < len(layer_ids):
        note(f"{len(shown)} of {len(layer_ids)} layers; --layer chooses others, --json has all, with gate weights")


def visible(data: bytes) -> str:
    """A token on one line: controls and backslashes escaped, spaces as ␣, bytes of parts of characters in hex."""
    return one_line(data.replace(b"\\", b"\\\\").decode(errors="backslashreplace").replace(" ", "␣"))


def print_comparison(answer: dict[str, Any]) -> None:
    """A line per layer: how far apart, and the experts that gain and lose most."""
    rows = []
    for layer_id, value, differences in zip(
        answer["layer_ids"], answer["jensen_shannon"]["by_layer"], answer["difference"], strict=True
    ):
        order = sorted(range(len(differences)), key=lambda expert_id: differences[expert_id])
        lost = [f"{expert} ({differences[expert]:+.1%})" for expert in order[:3] if differences[expert] < 0]
        gained = [
            f"{expert} ({differences[expert]:+.1%})" for expert in reversed(order[-3:]) if differences[expert] > 0
        ]
        rows.append((str(layer_id), "–" if value is None else f"{value:.3f}", ", ".join(gained), ", ".join(lost)))
    print_table(("layer", "divergence (bits)", "more in the first", "more in the second"), rows)
    mean = answer["jensen_shannon"]["mean"]
    say(f"Jensen-Shannon divergence on average: {'unknown' if mean is None else f'{mean:.3f} bits'}")
