"""Twice as many requests as are answered, for minutes: each is answered whole or refused, and memory stays."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

from clients import Answer, Request, check, closed_loop, open_loop, percentile
from contestants.protocol import texts
from rich.console import Console
from scenarios.common import MIB, Document, make_table, until_idle
from servers import MAX_SEQUENCES, Running, Server, awake, serving

SAMPLE_SECONDS = 1.0
REFUSALS = (429, 503)


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

    def memory_mib(self, parts: int = 10) -> list[float]:
        """Means of equal parts of the time; of as many as there are samples, if there are fewer."""
        size = -(-len(self.resident_bytes) // parts)
        rows = (self.resident_bytes[start : start + size] for start in range(0, len(self.resident_bytes), size or 1))
        return [mean(row) / MIB for row in rows]


def overload(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    results = []
    flags = ("--engine.max_queue", "64")
    for name, server in servers.items():
        with (
            serving(
                {name: server}, options.folder, max_tokens=max(options.prompts) + options.tokens, flags=flags
            ) as running,
            awake(running[name]),
        ):
            result = asyncio.run(_overload(running[name], options))
        results.append({"server": name, **result})
        table = make_table(f"{name}, {options.minutes:g} minutes", "")
        for key, value in result.items():
            table.add_row(key.replace("_", " "), _shown(value))
        console.print(table)
    return {"results": results}


async def _overload(server: Running, options: argparse.Namespace) -> Document:
    requests = [Request(prompt, options.tokens) for prompt in texts(options.prompts, 4 * MAX_SEQUENCES, 0)]
    started = time.perf_counter()
    check(await closed_loop(server.address, requests, MAX_SEQUENCES))
    capacity = len(requests) / (time.perf_counter() - started)
    await until_idle(server)
    before = server.num_descriptors, server.gauges()["amalgam_kv_blocks_used"]
    samples = Samples()
    following = asyncio.create_task(samples.follow(server))
    count = int(2 * capacity * options.minutes * 60)
    offered = [Request(prompt, options.tokens) for prompt in texts(options.prompts, count, 1)]
    started = time.perf_counter()
    answers = await open_loop(server.address, offered, 2 * capacity)
    seconds = time.perf_counter() - started
    following.cancel()
    await until_idle(server)
    counts = fates(answers)
    return {
        "requests_per_second_alone": capacity,
        "requests_per_second_answered": counts["answered"] / seconds,
        **counts,
        "memory_mib": samples.memory_mib(),
        "most_descriptors": max(samples.descriptors),
        "descriptors_before_and_after": (before[0], server.num_descriptors),
        "kv_blocks_before_and_after": (before[1], server.gauges()["amalgam_kv_blocks_used"]),
    }


def fates(answers: Sequence[Answer]) -> Document:
    """How many were answered whole, refused, or lost; how long refusals took, and when they ask to come again."""
    refused = [answer for answer in answers if answer.status in REFUSALS]
    whole = [
        answer for answer in answers if not answer.error_kind and answer.num_new_tokens == answer.question.num_tokens
    ]
    waits = [answer.total_seconds * 1e3 for answer in refused]
    return {
        "sent": len(answers),
        "answered": len(whole),
        "refused": len(refused),
        "lost": len(answers) - len(whole) - len(refused),
        "lost_how": sorted({answer.error for answer in answers if answer.error_kind and answer not in refused})[:3],
        "refused_after_ms": {
            "p50": percentile(waits, 0.5),
            "p99": percentile(waits, 0.99),
            "max": max(waits, default=float("nan")),
        },
        "retry_after": dict(Counter(answer.retry_after for answer in refused)),
    }


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, dict):
        return ", ".join(f"{key or 'none'}: {_shown(item)}" for key, item in value.items())
    return " ".join(map(_shown, value)) if isinstance(value, list | tuple) else str(value)
