"""Throughput and time to the first token, side by side."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from clients import Answer, Request, check, closed_loop
from contestants.protocol import texts
from engines import Engine
from engines import running as contestants
from rich.console import Console
from rich.table import Table
from scenarios.common import Document, make_table, percentiles, spread
from servers import Server, awake, serving

SHARE_CLIENTS = (1, 16)  # with so many, our server is compared with its engine alone
BEST = "the best"
WARM_UP = 10**6  # a round whose prompts no other has


@dataclass
class Cell:
    """What one server did for so many clients, round by round; latencies of all rounds together."""

    server: str
    clients: int
    tokens_per_second: list[float] = field(default_factory=list)
    first_token_p50: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    gap_seconds: list[float] = field(default_factory=list)

    def add(self, answers: Sequence[Answer]) -> None:
        seconds = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
        first = [answer.first_token_seconds for answer in answers]
        self.tokens_per_second.append(sum(answer.num_tokens for answer in answers) / seconds)
        self.first_token_p50.append(median(first))
        self.first_token_seconds += first
        self.gap_seconds += [gap for answer in answers for gap in answer.gaps]

    def summary(self) -> Document:
        return {
            "server": self.server,
            "clients": self.clients,
            "tokens_per_second": self.tokens_per_second,
            "first_token_p50_by_round": self.first_token_p50,
            **percentiles("first_token", self.first_token_seconds),
            **percentiles("gap", self.gap_seconds),
        }


Cells = Mapping[tuple[str, int], Cell]


def throughput(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    """The servers of one precision after those of another, so that their models need not be in memory together."""
    precisions = list(dict.fromkeys(server.precision for server in servers.values()))
    minutes = options.minutes / len(precisions)
    cells: list[Cell] = []
    ratios: list[Document] = []
    shares: Document = {}
    for precision in precisions:
        group = {name: server for name, server in servers.items() if server.precision == precision}
        # Against its engine alone only one of ours is measured: that is a process with the model more.
        measured, share = _measure(options, group, minutes, has_twin=not shares)
        cells += measured.values()
        ratios += ratios_to_peers(measured, group, options.clients)
        shares = shares or share
    console.print(_throughput_table(cells))
    if ratios:
        console.print(_ratio_table(ratios))
    for clients, values in shares.get("shares", {}).items():
        console.print(
            f"Over HTTP, {shares['server']} keeps {median(values):.1%} of its own throughput with {clients} at a time "
            f"({spread(values)})."
        )
    return {"cells": [cell.summary() for cell in cells], "ratios": ratios, "http": shares}


def _measure(
    options: argparse.Namespace, servers: Mapping[str, Server], minutes: float, *, has_twin: bool
) -> tuple[dict[tuple[str, int], Cell], Document]:
    """Servers in turns, and how much of the engine's own throughput ours keeps."""
    until = time.monotonic() + minutes * 60
    cells = {(name, clients): Cell(name, clients) for name in servers for clients in options.clients}
    shares: dict[int, list[float]] = {clients: [] for clients in SHARE_CLIENTS if clients in options.clients}
    # The server whose twin, in a process of its own and without HTTP, gets the same prompts.
    ours = next((name for name, server in servers.items() if server.is_ours and shares and has_twin), None)
    twins = {ours: _twin(options, servers[ours])} if ours else {}
    max_tokens = max(options.prompts) + options.tokens
    with serving(servers, options.folder, max_tokens=max_tokens) as running, contestants(twins, options.folder) as twin:
        for name in servers:
            with awake(running[name]):
                requests = [Request(prompt, 4) for prompt in texts((64,), 4, WARM_UP)]
                check(asyncio.run(closed_loop(running[name].address, requests, 2)))
        for round_ in range(options.rounds):
            started = time.monotonic()
            for clients in options.clients:
                prompts = texts(options.prompts, max(clients, options.least), round_)
                requests = [Request(prompt, options.tokens) for prompt in prompts]
                for name in list(servers)[:: -1 if round_ % 2 else 1]:
                    with awake(running[name]):
                        answers = asyncio.run(closed_loop(running[name].address, requests, clients))
                    check(answers)
                    cells[name, clients].add(answers)
                if ours and clients in shares:
                    own = len(requests) * options.tokens / twin[ours].ask("streams", clients)
                    shares[clients].append(cells[ours, clients].tokens_per_second[-1] / own)
            if time.monotonic() + (time.monotonic() - started) > until:
                break
    return cells, {"server": ours, "shares": shares} if ours else {}


def _twin(options: argparse.Namespace, server: Server) -> Engine:
    numbers = (options.tokens, options.least, *options.prompts)
    return Engine("with_llm.py", model=server.model, options=tuple(map(str, numbers)))


def ratios_to_peers(cells: Cells, servers: Mapping[str, Server], numbers: Sequence[int]) -> Iterator[Document]:
    """Ours to each of the others, and in each round to whoever was best in it, by number of clients."""
    peers = [name for name, server in servers.items() if not server.is_ours]
    for ours in (name for name, server in servers.items() if server.is_ours and peers):
        for clients in numbers:
            cell = cells[ours, clients]
            others = [cells[peer, clients] for peer in peers]
            speeds = {other.server: other.tokens_per_second for other in others}
            waits = {other.server: other.first_token_p50 for other in others}
            speeds[BEST] = [max(row) for row in zip(*speeds.values(), strict=True)]
            waits[BEST] = [min(row) for row in zip(*waits.values(), strict=True)]
            for peer in speeds:
                yield {
                    "server": ours,
                    "peer": peer,
                    "clients": clients,
                    "throughput": [a / b for a, b in zip(cell.tokens_per_second, speeds[peer], strict=True)],
                    "first_token": [a / b for a, b in zip(cell.first_token_p50, waits[peer], strict=True)],
                }


def _throughput_table(cells: Sequence[Cell]) -> Table:
    table = make_table("server", "clients", "tokens/s", "range", "first ms p50", "range", "p99", "gap ms p50", "p99")
    for cell in cells:
        first, gaps = (percentiles("", seconds) for seconds in (cell.first_token_seconds, cell.gap_seconds))
        by_round = [seconds * 1e3 for seconds in cell.first_token_p50]
        milliseconds = [f"{seconds * 1e3:.0f}" for seconds in (*first.values(), *gaps.values())]
        milliseconds.insert(1, spread(by_round, 0))
        speed = cell.tokens_per_second
        table.add_row(cell.server, str(cell.clients), f"{median(speed):.1f}", spread(speed, 1), *milliseconds)
    return table


def _ratio_table(ratios: Sequence[Document]) -> Table:
    table = make_table("server", "against", "clients", "throughput ×", "range", "time to first token ×", "range")
    for row in ratios:
        figures = [
            part for key in ("throughput", "first_token") for part in (f"{median(row[key]):.2f}", spread(row[key]))
        ]
        table.add_row(row["server"], row["peer"], str(row["clients"]), *figures)
    return table
