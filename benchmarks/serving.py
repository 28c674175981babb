"""Our server against llama.cpp's and vLLM's, over OpenAI's `/v1/completions`, and what load does to it; shape S.

    python benchmarks/serving.py FOLDER                        throughput and latency, side by side; 12 minutes
    python benchmarks/serving.py FOLDER --scenario long        tokens' gaps while prompts of up to 4,000 arrive
    python benchmarks/serving.py FOLDER --scenario prefix      time to the first token with and without a shared prefix
    python benchmarks/serving.py FOLDER --scenario overload    twice what it can serve, for --minutes
    python benchmarks/serving.py FOLDER --scenario cancel      1,000 requests whose clients leave

FOLDER keeps environments and models (20 GB), which the first run makes; `--prepare` only makes them. Every server is a
process of its own with two threads and is stopped (SIGSTOP) while another is asked; they take turns by number of
clients and round, and a ratio is the median of the rounds' ratios. Clients send the next request when the last one has
ended; prompts are of mixed lengths and have nothing in common. Prints tables and, as the last line, one JSON object
(`--json`: only that). Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from clients import Address, Answer, Request, check, closed_loop, complete, open_loop, percentile
from contestants.protocol import text, texts
from engines import Engine, exit_on_signals
from engines import running as contestants
from environments import prepare
from rich.console import Console
from rich.table import Table
from servers import MAX_SEQUENCES, SERVERS, Running, Server, awake, serving

from amalgam.tools.bench import commit, hardware

CLIENTS = (1, 4, 8, 16)
SHARE_CLIENTS = (1, 16)  # with so many, our server is compared with its engine alone
PROMPTS = (16, 32, 64, 128)
LONG_PROMPTS, SHORT_PROMPTS = (4000, 1000, 3000, 2000), (32, 64, 128, 256)
LONG_TOKENS = 128
PREFIX, SUFFIX = 2048, 64
SAMPLE_SECONDS = 1.0
MIB = 2**20

Document = dict[str, Any]


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
            **_percentiles("first_token", self.first_token_seconds),
            **_percentiles("gap", self.gap_seconds),
        }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p50": percentile(seconds, 0.5), f"{name}_p99": percentile(seconds, 0.99)}


def throughput(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    """All servers side by side, and how much of the engine's own throughput ours keeps."""
    until = time.monotonic() + options.minutes * 60
    cells = {(name, clients): Cell(name, clients) for name in servers for clients in options.clients}
    shares: dict[int, list[float]] = {clients: [] for clients in SHARE_CLIENTS if clients in options.clients}
    # The server whose twin, in a process of its own and without HTTP, gets the same prompts.
    ours = next((name for name, server in servers.items() if server.is_ours and shares), None)
    twins = {ours: _twin(options, servers[ours])} if ours else {}
    max_tokens = max(options.prompts) + options.tokens
    with serving(servers, options.folder, max_tokens=max_tokens) as running, contestants(twins, options.folder) as twin:
        for name in servers:
            with awake(running[name]):
                requests = [Request(prompt, 4) for prompt in texts((64,), 4, -1)]
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
    console.print(_throughput_table(list(cells.values())))
    ratios = list(_ratios(cells, servers, options.clients))
    if ratios:
        console.print(_ratio_table(ratios))
    for clients, measured in shares.items() if ours else ():
        console.print(
            f"Over HTTP, {ours} keeps {median(measured):.1%} of its own throughput with {clients} at a time "
            f"({_range(measured)})."
        )
    return {"cells": [cell.summary() for cell in cells.values()], "ratios": ratios, "http_share": shares}


def _twin(options: argparse.Namespace, server: Server) -> Engine:
    numbers = (options.tokens, options.least, *options.prompts)
    return Engine("with_llm.py", model=server.model, options=tuple(map(str, numbers)))


def _ratios(
    cells: dict[tuple[str, int], Cell], servers: dict[str, Server], numbers: Sequence[int]
) -> Iterator[Document]:
    """Ours to each of the others, and to the best of them, by number of clients."""
    peers = [name for name, server in servers.items() if not server.is_ours]
    for ours in (name for name, server in servers.items() if server.is_ours):
        for clients in numbers:
            cell = cells[ours, clients]
            for peer in peers:
                other = cells[peer, clients]
                yield {
                    "server": ours,
                    "peer": peer,
                    "clients": clients,
                    "throughput": [a / b for a, b in zip(cell.tokens_per_second, other.tokens_per_second, strict=True)],
                    "first_token": [a / b for a, b in zip(cell.first_token_p50, other.first_token_p50, strict=True)],
                }


def _throughput_table(cells: Sequence[Cell]) -> Table:
    table = _table("server", "clients", "tokens/s", "range", "first ms p50", "p99", "gap ms p50", "p99")
    for cell in cells:
        latencies = (cell.first_token_seconds, cell.gap_seconds)
        milliseconds = [f"{percentile(seconds, share) * 1e3:.0f}" for seconds in latencies for share in (0.5, 0.99)]
        speed = cell.tokens_per_second
        table.add_row(cell.server, str(cell.clients), f"{median(speed):.1f}", _range(speed, 1), *milliseconds)
    return table


def _ratio_table(ratios: Sequence[Document]) -> Table:
    table = _table("server", "against", "clients", "throughput ×", "range", "time to first token ×", "range")
    for row in ratios:
        figures = [
            part for key in ("throughput", "first_token") for part in (f"{median(row[key]):.2f}", _range(row[key]))
        ]
        table.add_row(row["server"], row["peer"], str(row["clients"]), *figures)
    return table


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("server", "against") else "right")
    return table


def _range(values: Sequence[float], digits: int = 2) -> str:
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


def long_prompts(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    """Gaps between the tokens of 28 streams while four long prompts arrive."""
    results = []
    table = _table("server", "gap ms p50", "p99", "p99/p50", "before: p50", "p99", "first token s")
    with serving(servers, options.folder, max_tokens=max(LONG_PROMPTS) + LONG_TOKENS) as running:
        for name in servers:
            with awake(running[name]):
                result = asyncio.run(_long_prompts(running[name].address))
            results.append({"server": name, **result})
            before, during = result["before"], result["during"]
            first = " ".join(f"{seconds:.1f}" for seconds in result["first_token_seconds"].values())
            ratio = during["gap_p99"] / during["gap_p50"]
            figures = [f"{part['gap_' + share] * 1e3:.0f}" for part in (during, before) for share in ("p50", "p99")]
            table.add_row(name, *figures[:2], f"{ratio:.2f}", *figures[2:], first)
    console.print(table)
    return {"results": results}


async def _long_prompts(address: Address) -> Document:
    talking, finished = MAX_SEQUENCES - len(LONG_PROMPTS), asyncio.Event()
    talked: list[Answer] = []

    def short_requests() -> Iterator[Request]:
        seed = 0
        while not finished.is_set():
            yield Request(text(SHORT_PROMPTS[seed % len(SHORT_PROMPTS)], seed), LONG_TOKENS)
            seed += 1

    async def observed(to: Address, request: Request) -> Answer:
        answer = Answer(request, time.perf_counter())
        talked.append(answer)
        return await complete(to, request, into=answer)

    talkers = asyncio.create_task(closed_loop(address, short_requests(), talking, observed))
    await _until(lambda: sum(len(answer.arrivals) > 16 for answer in talked) >= talking or talkers.done())
    started = time.perf_counter()
    arriving = []
    for index, length in enumerate(LONG_PROMPTS):
        arriving.append(asyncio.create_task(complete(address, Request(text(length, -1 - index), LONG_TOKENS))))
        await asyncio.sleep(1)
    answers = [await task for task in arriving]
    finished.set()
    check([*answers, *await talkers])
    until = max(answer.arrivals[0] for answer in answers)
    settled = max(answer.arrivals[0] for answer in talked[:talking])

    def gaps(begin: float, end: float) -> dict[str, float]:
        pairs = [pair for answer in talked for pair in zip(answer.arrivals, answer.arrivals[1:], strict=False)]
        return _percentiles("gap", [after - before for before, after in pairs if begin < after <= end])

    return {
        "before": gaps(settled, started),
        "during": gaps(started, until),
        "first_token_seconds": {len(answer.question.prompt): answer.first_token_seconds for answer in answers},
    }


def shared_prefix(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    """Time to the first token of prompts that begin alike, against prompts that do not."""
    results = []
    table = _table("server", "unshared s", "shared s", "ratio", "tokens cached", "ratio that they predict")
    max_tokens = PREFIX + SUFFIX + 1
    with serving(servers, options.folder, max_tokens=max_tokens, shares_prefixes=True) as running:
        for name in servers:
            with awake(running[name]):
                pairs = asyncio.run(_shared_prefix(running[name].address, options.rounds))
            unshared, shared = ([pair[side].first_token_seconds for pair in pairs] for side in (0, 1))
            cached = [pair[1].num_cached_tokens or 0 for pair in pairs]
            predicted = 1 - median(cached) / pairs[0][1].num_prompt_tokens
            ratio = median(b / a for a, b in zip(unshared, shared, strict=True))
            result = {"server": name, "unshared": unshared, "shared": shared, "cached": cached, "predicted": predicted}
            results.append(result)
            speeds = (f"{median(unshared):.2f}", f"{median(shared):.2f}", f"{ratio:.3f}")
            table.add_row(name, *speeds, f"{median(cached):.0f}", f"{predicted:.3f}")
    console.print(table)
    return {"prefix": PREFIX, "suffix": SUFFIX, "results": results}


async def _shared_prefix(address: Address, rounds: int) -> list[tuple[Answer, Answer]]:
    prefix = text(PREFIX, -1)
    check([await complete(address, Request(prefix + text(SUFFIX, -2), 1))])
    pairs = []
    for round_ in range(rounds):
        unshared = await complete(address, Request(text(PREFIX + SUFFIX, 2 * round_), 1))
        shared = await complete(address, Request(prefix + text(SUFFIX, 2 * round_ + 1), 1))
        check([unshared, shared])
        pairs.append((unshared, shared))
    return pairs


@dataclass
class Samples:
    """Memory and descriptors of a server over time."""

    resident_bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    async def follow(self, server: Running) -> None:
        while True:
            self.resident_bytes.append(server.resident_bytes)
            self.descriptors.append(server.num_descriptors)
            await asyncio.sleep(SAMPLE_SECONDS)


def overload(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    """Twice as many requests as are answered, for minutes: each is answered whole or refused, and memory stays."""
    results = []
    flags = ("--engine.max_queue", "64")
    for name, server in servers.items():
        with (
            serving({name: server}, options.folder, max_tokens=max(PROMPTS) + options.tokens, flags=flags) as running,
            awake(running[name]),
        ):
            result = asyncio.run(_overload(running[name], options))
        results.append({"server": name, **result})
        table = _table(f"{name}, {options.minutes:g} minutes", "")
        for key, value in result.items():
            table.add_row(key.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else str(value))
        console.print(table)
    return {"results": results}


async def _overload(server: Running, options: argparse.Namespace) -> Document:
    requests = [Request(prompt, options.tokens) for prompt in texts(PROMPTS, 4 * MAX_SEQUENCES, -1)]
    started = time.perf_counter()
    check(await closed_loop(server.address, requests, MAX_SEQUENCES))
    capacity = len(requests) / (time.perf_counter() - started)
    await _until_idle(server)
    before = server.num_descriptors, server.gauges()["amalgam_kv_blocks_used"]
    samples = Samples()
    following = asyncio.create_task(samples.follow(server))
    count = int(2 * capacity * options.minutes * 60)
    offered = [Request(prompt, options.tokens) for prompt in texts(PROMPTS, count, 1)]
    started = time.perf_counter()
    answers = await open_loop(server.address, offered, 2 * capacity)
    seconds = time.perf_counter() - started
    following.cancel()
    await _until_idle(server)
    refused = [answer for answer in answers if answer.status in (429, 503)]
    whole = [answer for answer in answers if not answer.error_kind and answer.num_new_tokens == options.tokens]
    third = max(1, len(samples.resident_bytes) // 3)
    return {
        "requests_per_second_alone": capacity,
        "requests_per_second_answered": len(whole) / seconds,
        "sent": len(answers),
        "answered": len(whole),
        "refused": len(refused),
        "lost": len(answers) - len(whole) - len(refused),
        "lost_how": sorted({answer.error for answer in answers if answer.error_kind and answer not in refused})[:3],
        "memory_mib_first_third": mean(samples.resident_bytes[:third]) / MIB,
        "memory_mib_last_third": mean(samples.resident_bytes[-third:]) / MIB,
        "most_descriptors": max(samples.descriptors),
        "descriptors_before_and_after": (before[0], server.num_descriptors),
        "kv_blocks_before_and_after": (before[1], server.gauges()["amalgam_kv_blocks_used"]),
    }


def cancel(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    """What requests whose clients leave have left behind."""
    results = []
    table = _table("server", "cancelled", "", "KV blocks", "descriptors", "memory MiB")
    for name, server in servers.items():
        with serving({name: server}, options.folder, max_tokens=128) as running, awake(running[name]):
            before, after = asyncio.run(_cancel(running[name], options.requests))
        results.append({"server": name, "cancelled": options.requests, "before": before, "after": after})
        for label, row in (("before", before), ("after", after)):
            figures = (f"{row['kv_blocks']:.0f}", str(row["descriptors"]), f"{row['memory_mib']:.1f}")
            table.add_row(name, str(options.requests), label, *figures)
    console.print(table)
    return {"results": results}


async def _cancel(server: Running, count: int) -> tuple[Document, Document]:
    chances = random.Random(0)

    async def leave(address: Address, request: Request) -> Answer:
        return await complete(address, request, leave_after=chances.randrange(4))

    async def state(seed: int, cancelled: int) -> Document:
        requests = [Request(prompt, 64) for prompt in texts((8, 16, 32), cancelled, seed)]
        await closed_loop(server.address, requests, MAX_SEQUENCES, leave)
        check([await complete(server.address, Request(text(16, seed), 8))])
        await _until_idle(server)
        blocks = server.gauges()["amalgam_kv_blocks_used"]
        memory = server.resident_bytes / MIB
        return {"kv_blocks": blocks, "descriptors": server.num_descriptors, "memory_mib": memory}

    return await state(0, 8 * MAX_SEQUENCES), await state(1, count)


async def _until_idle(server: Running) -> None:
    await _until(lambda: not any(server.gauges()[f"amalgam_requests_{state}"] for state in ("running", "waiting")))
    await asyncio.sleep(1)  # connections that have ended are let go


async def _until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait for what must come.

    Raises:
        TimeoutError: it has not.
    """
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.1)


SCENARIOS = {
    "throughput": throughput,
    "long": long_prompts,
    "prefix": shared_prefix,
    "overload": overload,
    "cancel": cancel,
}
OURS_ONLY = {"overload", "cancel"}  # they read our metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="keeps environments and models")
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="throughput")
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), help="default: by scenario")
    parser.add_argument("--clients", nargs="+", type=int, default=CLIENTS)
    parser.add_argument("--prompts", nargs="+", type=int, default=PROMPTS, help="their lengths")
    parser.add_argument("--tokens", type=int, default=32, help="new ones for each prompt")
    parser.add_argument("--least", type=int, default=4, help="requests of a round, where there are fewer clients")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10.0, help="no round starts that would end later")
    parser.add_argument("--requests", type=int, default=1000, help="that are cancelled")
    parser.add_argument("--prepare", action="store_true", help="only make environments and models")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    exit_on_signals()
    options.folder = options.folder.resolve()
    everyone = list(SERVERS)[:4] if options.scenario == "throughput" else list(SERVERS)[:1]
    names = options.servers or everyone
    servers = {name: SERVERS[name] for name in names}
    if options.scenario in OURS_ONLY and not all(server.is_ours for server in servers.values()):
        parser.error(f"--scenario {options.scenario} is for our own servers")
    environments = {server.environment for server in servers.values()} - {""}
    prepare(options.folder, environments, {server.model for server in servers.values()})
    if options.prepare:
        return 0
    console = Console(quiet=options.json, width=None if sys.stdout.isatty() else 120)
    result = SCENARIOS[options.scenario](options, servers, console)
    document = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "scenario": options.scenario, **result}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
