"""How a step scales to many cores: a simulation with the items that the compiled drivers really cut it into.

    python benchmarks/scaling.py                                   # tables
    python benchmarks/scaling.py --picture docs/images/scaling.svg

The step runs with kernels that compute nothing and note what each item would read and compute (`_native.record`), for
2 to 192 threads; weights are int4 in groups of 128 (the head bf16 in 12 bits) and take no memory. Then the rounds are
played through as the thread pool would: equal shares of items that follow each other, and whoever is done takes from
the others. An item takes as long as its bytes or its operations, whichever is longer, plus its elements; every thread
has the same share of the memory's bandwidth. A round with several threads begins and ends with a wait.

*limit*: one thread's time over that of so many threads, if nothing else slows them down. *imbalance*: how much longer
the products and attention take than if their work could be cut at will. *alone*: share of the time in which one thread
works and the others wait. *waits*: share of rounds' beginnings and ends.

What it cannot tell: caches, other programs, remote memory, frequencies. The rates are options; the defaults are a core
with AVX-512 of two sockets with twelve channels each. Prints tables, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from amalgam import _native
from amalgam.cli.console import out
from amalgam.kernels.backends.cpu import extension, panels
from amalgam.kernels.layouts import LAYOUTS, dense
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.registry import read_spec
from amalgam.models.spec import ModelSpec, Slot
from amalgam.models.weights import WeightVersion
from amalgam.tools.bench import SHAPES, commit, hardware

try:
    from benchmarks.scale import QWEN3_235B
except ModuleNotFoundError:  # run by its path
    from scale import QWEN3_235B  # type: ignore[import-not-found,no-redef]

THREADS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192)
MODELS = {"shape S": SHAPES["S"], "Qwen3-235B-A22B": QWEN3_235B}
CONTEXT, BLOCK = 1024, 16
STEPS = {"1 sequence": (1, 1), "16 sequences": (16, 1), "prompt of 512": (1, 512)}  # sequences, tokens of each
FEW_LAYERS, MORE_LAYERS = 1, 5  # that are recorded; all others are like them
PRODUCTS = ("product", "gate_up", "attend")

Item = tuple[float, float, float, float, float]
Round = tuple[str, Sequence[Item]]


@dataclass(frozen=True)
class Rates:
    """What one thread does in a second, and what a round costs."""

    bytes: float = 7e9
    int8: float = 330e9
    bfloat16: float = 210e9
    float32: float = 85e9
    elements: float = 2e9
    item_seconds: float = 0.1e-6
    wait_seconds: float = 0.5e-6  # of a round, for each doubling of the threads

    def seconds(self, item: Item) -> float:
        read, int8, bfloat16, float32, elements = item
        computing = int8 / self.int8 + bfloat16 / self.bfloat16 + float32 / self.float32
        return max(read / self.bytes, computing) + elements / self.elements + self.item_seconds


@dataclass
class Times:
    """Seconds of a step; sums of its rounds."""

    products: float = 0.0  # rounds of products and attention
    even: float = 0.0  # the same, if they could be cut at will
    alone: float = 0.0  # rounds of one thread
    others: float = 0.0
    waits: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.alone + self.others + self.waits

    def __add__(self, other: Times) -> Times:
        return Times(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Times:
        return Times(*(value * factor for value in asdict(self).values()))


def blank_weight(slot: Slot) -> PackedWeight:
    """A weight as it would be in memory, whose pages nobody ever touches."""
    if len(slot.shape) != 2 or slot.role == "embedding":
        return dense(torch.empty(slot.shape, dtype=torch.bfloat16))
    rows, columns = slot.shape
    blocks = -(-rows // 16)
    if slot.is_linear and slot.role not in ("head", "router"):
        scales = blocks * (columns // 128) * 16 * 2
        memory = torch.empty(blocks * 16 * columns // 2 + scales, dtype=torch.uint8)
        layout = panels.Panels(LAYOUTS["panels_int4"], slot.shape, (1, 128), torch.bfloat16, columns // 128, 16, False)
    else:
        tables = sum(-(-size // 64) * 64 for size in (blocks, 4 * (blocks + 1)))
        memory = torch.zeros(blocks * 16 * columns * 3 // 2 + tables, dtype=torch.uint8)
        layout = panels.Panels(LAYOUTS["panels_bf16_coded"], slot.shape, None, torch.float32, 0, 1, False)
    return panels.view(memory, layout, None, "int8")


def blank_version(spec: ModelSpec) -> WeightVersion:
    """Slots of one role and shape share their weight."""
    made: dict[tuple[str, tuple[int, ...]], PackedWeight] = {}
    weights = {}
    for slot in spec.slots:
        key = (slot.role, slot.shape)
        if key not in made:
            made[key] = blank_weight(slot)
        weights[slot.name] = made[key]
    return WeightVersion(1, weights, {}, {})


def record(config: dict[str, Any], num_layers: int, threads: Iterable[int]) -> dict[tuple[str, int], list[Round]]:
    """(step, number of threads) → its rounds, for a model with so many layers."""
    _, spec = read_spec({**config, "num_hidden_layers": num_layers}, "config.json")
    longest = CONTEXT + max(tokens for _, tokens in STEPS.values())
    decoder = Decoder(spec, longest, torch.bfloat16, torch.device("cpu"))
    version = blank_version(spec)
    blocks = -(-longest // BLOCK)
    kv = KVCache.allocate(spec, 16 * blocks, BLOCK, torch.bfloat16, torch.device("cpu"))
    rounds: dict[tuple[str, int], list[Round]] = {}
    for name, (sequences, tokens) in STEPS.items():
        first = 0 if tokens > 1 else CONTEXT
        step = StepContext(
            [
                StepSequence([1] * tokens, first, range(number * blocks, (number + 1) * blocks), 1)
                for number in range(sequences)
            ],
            kv,
        )
        run = functools.partial(decoder.forward, step, version)
        for count in threads:
            torch.set_num_threads(count)
            rounds[name, count] = list(_native.record(run))
    return rounds


def play(seconds: Sequence[float], threads: int) -> float:
    """When the last thread is done with items that take so long, as csrc/runtime/pool.cpp shares them out."""
    count = len(seconds)
    team = min(threads, count)
    if team <= 1:
        return sum(seconds)
    at = [count * seat // team for seat in range(team)]
    ends = [*at[1:], count]
    owners = list(range(team))  # whose items each thread takes
    free = [(0.0, seat) for seat in range(team)]
    last = 0.0
    while free:
        now, seat = heapq.heappop(free)
        while owners[seat] < seat + team and at[owners[seat] % team] == ends[owners[seat] % team]:
            owners[seat] += 1
        if owners[seat] == seat + team:
            last = max(last, now)
            continue
        owner = owners[seat] % team
        heapq.heappush(free, (now + seconds[at[owner]], seat))
        at[owner] += 1
    return last


def times_of(rounds: Iterable[Round], threads: int, rates: Rates) -> Times:
    times = Times()
    for kernel, items in rounds:
        seconds = [rates.seconds(item) for item in items]
        lasts = play(seconds, threads)
        if min(threads, len(items)) > 1:
            times.waits += rates.wait_seconds * math.log2(min(threads, len(items)))
        if kernel in PRODUCTS:
            times.products += lasts
            times.even += sum(seconds) / threads
        elif len(items) == 1 or threads == 1:
            times.alone += lasts
        else:
            times.others += lasts
    return times


def simulate(config: dict[str, Any], threads: Sequence[int], rates: Rates) -> dict[str, dict[int, Times]]:
    """Step → number of threads → times of all layers, of which a few are recorded."""
    few, more = (record(config, layers, threads) for layers in (FEW_LAYERS, MORE_LAYERS))
    num_layers = config["num_hidden_layers"]
    result: dict[str, dict[int, Times]] = {}
    for name, count in few:
        begin, longer = (times_of(rounds[name, count], count, rates) for rounds in (few, more))
        layer = (longer + begin * -1) * (1 / (MORE_LAYERS - FEW_LAYERS))
        result.setdefault(name, {})[count] = begin + layer * (num_layers - FEW_LAYERS)
    return result


def rows_of(times: dict[int, Times]) -> dict[int, dict[str, float]]:
    """Number of threads → figures."""
    return {
        count: {
            "milliseconds": 1e3 * one.total,
            "limit": times[1].total / one.total,
            "imbalance": one.products / one.even - 1,
            "alone": one.alone / one.total if count > 1 else 0.0,
            "waits": one.waits / one.total,
        }
        for count, one in times.items()
    }


COLOURS = ("#1f6feb", "#d1242f", "#2da44e")
GREY = "#59636e"
SIDE, LEFT, TOP, BOTTOM = 340, 56, 40, 80  # of a diagram, a square with room around it


def diagram(model: str, steps: dict[str, dict[int, dict[str, float]]], left: int) -> Iterator[str]:
    """SVG elements: limit over threads, both in doublings."""
    scale = SIDE / math.log2(max(THREADS))

    def point(threads: float, limit: float) -> tuple[float, float]:
        return round(left + scale * math.log2(threads), 1), round(TOP + SIDE - scale * math.log2(limit), 1)

    def line(points: Iterable[tuple[float, float]], style: str) -> str:
        return f'<polyline points="{" ".join(f"{x},{y}" for x, y in points)}" fill="none" {style}/>'

    def text(x: float, y: float, words: object, style: str) -> str:
        return f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>'

    yield text(left, TOP - 14, f"{model}, times as fast as one thread", 'font-size="14" fill="#1f2328"')
    for mark in (1, 2, 4, 8, 16, 32, 64, 128, 192):
        x, y = point(mark, mark)
        yield line([(x, TOP), (x, TOP + SIDE)], 'stroke="#eaeef2"')
        yield line([(left, y), (left + SIDE, y)], 'stroke="#eaeef2"')
        yield text(x, TOP + SIDE + 18, mark, f'text-anchor="middle" fill="{GREY}"')
        yield text(left - 8, y + 4, mark, f'text-anchor="end" fill="{GREY}"')
    yield text(left + SIDE / 2, TOP + SIDE + 38, "threads", f'text-anchor="middle" fill="{GREY}"')
    yield line([point(1, 1), point(192, 192)], 'stroke="#8c959f" stroke-dasharray="4 4"')
    for number, (colour, (step, rows)) in enumerate(zip(COLOURS, steps.items(), strict=True)):
        style = f'stroke="{colour}" stroke-width="2"'
        yield line([point(count, row["limit"]) for count, row in rows.items()], style)
        x, y = left + number * 120, TOP + SIDE + 62
        yield line([(x, y), (x + 18, y)], style)
        yield text(x + 24, y + 4, step, 'fill="#1f2328"')


def picture(figures: dict[str, dict[str, dict[int, dict[str, float]]]]) -> str:
    """An SVG with a diagram for each model."""
    step = LEFT + SIDE + 24
    size = f'width="{len(figures) * step}" height="{TOP + SIDE + BOTTOM}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12">',
        f'<rect {size} fill="#ffffff"/>',
    ]
    for number, (model, steps) in enumerate(figures.items()):
        parts.extend(diagram(model, steps, LEFT + number * step))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="where to write the diagrams as SVG")
    for name, value in asdict(Rates()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help="default: %(default)g")
    arguments = parser.parse_args()
    rates = Rates(**{name: getattr(arguments, name) for name in asdict(Rates())})
    extension.kernels = lambda: _native.kernels("counting")  # type: ignore[assignment]
    figures = {}
    for model, config in MODELS.items():
        figures[model] = {step: rows_of(times) for step, times in simulate(dict(config), THREADS, rates).items()}
        for step, rows in figures[model].items():
            table = Table("threads", "ms", "limit", "imbalance", "alone", "waits", title=f"{model}, {step}")
            for count, row in rows.items():
                shares = (f"{100 * row[name]:.0f}%" for name in ("imbalance", "alone", "waits"))
                table.add_row(str(count), f"{row['milliseconds']:.2f}", f"{row['limit']:.1f}", *shares)
            out.print(table)
    if arguments.picture:
        arguments.picture.write_text(picture(figures), encoding="utf-8")
    record = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "rates": asdict(rates)}
    print(json.dumps({**record, "figures": figures}))


if __name__ == "__main__":
    main()
