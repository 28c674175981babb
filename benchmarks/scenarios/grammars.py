"""What a grammar costs streams: 16 answers that follow a JSON schema, and 16 that follow none, in turns."""

from __future__ import annotations

import argparse
import asyncio
from statistics import median

from clients import Answer, Request, check, closed_loop
from contestants.protocol import texts
from rich.console import Console
from scenarios.common import Document, make_table, spread
from scenarios.throughput import Cell
from servers import Running, Server, awake, serving

NUM_STREAMS = 16
# No answer reaches its end: both kinds have equally many tokens.
SCHEMA = {"type": "array", "minItems": 500, "items": {"type": "string", "minLength": 40}}
KINDS = {"free": {}, "JSON schema": {"guided_json": SCHEMA}}


def grammars(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    results = []
    table = make_table("server", "answers", "tokens/s", "range", "gap ms p50", "p99", "throughput ×", "range")
    with serving(servers, options.folder, max_tokens=max(options.prompts) + options.tokens) as running:
        for name in servers:
            cells = {kind: Cell(name, NUM_STREAMS) for kind in KINDS}
            with awake(running[name]):
                for kind in KINDS:
                    _ask(running[name], options, kind, options.rounds)
                for round_ in range(options.rounds):
                    for kind in list(KINDS)[:: -1 if round_ % 2 else 1]:
                        cells[kind].add(_ask(running[name], options, kind, round_))
            free, bound = (cell.tokens_per_second for cell in cells.values())
            ratios = [b / a for a, b in zip(free, bound, strict=True)]
            results.append({"server": name, "ratios": ratios, **{kind: cells[kind].summary() for kind in KINDS}})
            for kind, cell in cells.items():
                summary, speeds = cell.summary(), cell.tokens_per_second
                gaps = [f"{summary[key] * 1e3:.0f}" for key in ("gap_p50", "gap_p99")]
                compared = (f"{median(ratios):.3f}", spread(ratios, 3)) if kind != "free" else ("", "")
                table.add_row(name, kind, f"{median(speeds):.1f}", spread(speeds, 1), *gaps, *compared)
    console.print(table)
    return {"results": results}


def _ask(server: Running, options: argparse.Namespace, kind: str, round_: int) -> list[Answer]:
    prompts = texts(options.prompts, NUM_STREAMS, len(KINDS) * round_ + list(KINDS).index(kind))  # nobody's prefix
    requests = [Request(prompt, options.tokens, KINDS[kind]) for prompt in prompts]
    answers = asyncio.run(closed_loop(server.address, requests, NUM_STREAMS))
    check(answers)
    return answers
