"""The picture of docs/compression/pruning.md: divergence against bytes, of cut models and of plans.

amalgam prune … --json > report.json
python benchmarks/pruning.py report.json --picture docs/images/pruning.svg
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 560, 340, 64, 16, 48, 210
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
PLAN = "precision alone (plan)"
Line = dict[float, dict[str, float]]  # MB → value, low, high


def lines_of(report: Mapping[str, Any]) -> dict[str, Line]:
    """Name → its points, the plans first."""
    lines: dict[str, Line] = {PLAN: {}}
    for point in report["points"]:
        lines[PLAN][point["plan_bytes"] / 1e6] = point["plan_divergence"]["all"]
        lines.setdefault(point["candidate"], {})[point["nbytes"] / 1e6] = point["divergence"]["all"]
    return lines


def picture(lines: Mapping[str, Line]) -> str:
    """An SVG: MB across, divergence upwards, both by their logarithms."""
    sizes = [size for line in lines.values() for size in line]
    values = [bound for line in lines.values() for each in line.values() for bound in each.values() if bound]
    high = 10 ** math.ceil(math.log10(max(values)))
    low = 10 ** math.floor(math.log10(min(values)))
    x = _scale(min(sizes) * 0.95, max(sizes) * 1.05, LEFT, LEFT + WIDTH)
    y = _scale(low, high, TOP + HEIGHT, TOP)
    size = f'width="{LEFT + WIDTH + LEGEND}" height="{TOP + HEIGHT + BOTTOM}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12">',
        f'<rect {size} fill="#ffffff"/>',
        *_axes(x, y, min(sizes), max(sizes), low, high),
    ]
    for number, (name, line) in enumerate(lines.items()):
        colour, width = COLOURS[number % len(COLOURS)], 3 if name == PLAN else 1.5
        points = sorted(line.items())
        path = " ".join(f"{x(size):.1f},{y(each['value']):.1f}" for size, each in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        for size_, each in points:
            at = f'cx="{x(size_):.1f}" cy="{y(each["value"]):.1f}"'
            parts.append(f'<circle {at} r="3" fill="{colour}"/>')
            if each["low"]:
                place = f'x1="{x(size_):.1f}" x2="{x(size_):.1f}" y1="{y(each["low"]):.1f}" y2="{y(each["high"]):.1f}"'
                parts.append(f'<line {place} stroke="{colour}"/>')
        top = TOP + 14 + 18 * number
        parts.append(f'<rect x="{LEFT + WIDTH + 14}" y="{top - 8}" width="14" height="{width}" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 34}" y="{top}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _scale(low: float, high: float, start: float, stop: float) -> Any:
    span = math.log(high / low)
    return lambda value: start + (stop - start) * math.log(value / low) / span


def _axes(x: Any, y: Any, least: float, most: float, low: float, high: float) -> list[str]:
    parts = []
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for size in (4, 5, 6, 8, 10, 12, 16, 20, 24):
        if least * 0.95 <= size <= most * 1.05:
            parts.append(f'<text x="{x(size):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{size}</text>')
    middle = LEFT + WIDTH / 2
    label = "MB of weights, as stored"
    parts.append(f'<text x="{middle}" y="{TOP + HEIGHT + 38}" text-anchor="middle">{label}</text>')
    across = f'transform="rotate(-90 14 {TOP + HEIGHT / 2})" text-anchor="middle"'
    label = "KL divergence, nats a token"
    parts.append(f'<text x="14" y="{TOP + HEIGHT / 2}" {across}>{label}</text>')
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="what `amalgam prune --json` printed")
    parser.add_argument("--picture", type=Path, required=True, help="where to write the SVG")
    arguments = parser.parse_args()
    lines: dict[str, Line] = {}
    for report in arguments.reports:
        for name, line in lines_of(json.loads(report.read_text(encoding="utf-8"))).items():
            lines.setdefault(name, {}).update(line)
    arguments.picture.write_text(picture(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
