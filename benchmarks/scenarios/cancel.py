"""What requests whose clients leave have left behind."""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence

from clients import Address, Answer, Request, check, closed_loop, complete
from contestants.protocol import text, texts
from rich.console import Console
from scenarios.common import MIB, Document, make_table, until_idle
from servers import MAX_SEQUENCES, Running, Server, awake, serving

BEFORE = 8 * MAX_SEQUENCES  # that are cancelled before the first look: they touch all blocks
EVERY = 1000  # requests between two looks
MOST_SECONDS = 2.0  # that a client waits for an answer in one piece


def cancel(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    results = []
    table = make_table(
        "server", "cancelled", "of these streams", "ended before", "KV blocks", "descriptors", "memory MiB"
    )
    for name, server in servers.items():
        with serving({name: server}, options.folder, max_tokens=128) as running, awake(running[name]):
            rows = asyncio.run(_cancel(running[name], options.requests))
        results.append({"server": name, "looks": rows})
        for row in rows:
            figures = (f"{row['kv_blocks']:.0f}", str(row["descriptors"]), f"{row['memory_mib']:.1f}")
            table.add_row(name, *(str(row[key]) for key in ("cancelled", "streams", "ended")), *figures)
    console.print(table)
    return {"results": results}


async def _cancel(server: Running, num_requests: int) -> list[Document]:
    """What there is after the first `BEFORE` requests, then after each `EVERY`; numbers of requests are added up."""
    rows: list[Document] = []
    left: list[Answer] = []
    # The largest step there is, for which the kernels take their buffers.
    check(
        await closed_loop(server.address, [Request(text(96, seed), 4) for seed in range(MAX_SEQUENCES)], MAX_SEQUENCES)
    )
    for seed, size in enumerate(_sizes(num_requests)):
        client = _Leaving(seed)
        requests = [Request(prompt, 64) for prompt in texts((8, 16, 32), size, seed)]
        left += await closed_loop(server.address, requests, MAX_SEQUENCES, client.ask)
        check([await complete(server.address, Request(text(16, seed), 8))])
        await until_idle(server)
        if refused := [answer for answer in left if answer.status not in (0, 200)]:
            raise RuntimeError(f"{len(refused)} were refused: {refused[0].status}, {refused[0].error}")
        if not rows:
            left.clear()
        rows.append(
            {
                "cancelled": sum(not has_ended(answer) for answer in left),
                "streams": sum(not has_ended(answer) and answer.status == 200 for answer in left),
                "ended": sum(map(has_ended, left)),
                "kv_blocks": server.gauges()["amalgam_kv_blocks_used"],
                "descriptors": server.num_descriptors,
                "memory_mib": server.resident_bytes / MIB,
            }
        )
    return rows


def _sizes(num_requests: int) -> Sequence[int]:
    whole, rest = divmod(num_requests, EVERY)
    return [BEFORE, *[EVERY] * whole, *[rest] * bool(rest)]


def has_ended(answer: Answer) -> bool:
    """Whether the client got all of its answer before it left; of one in one piece, its status is then known."""
    is_unary = answer.question.fields.get("stream") is False
    return answer.status == 200 if is_unary else answer.num_new_tokens is not None


class _Leaving:
    """Clients that leave: half of them a stream, by the third text, half an answer in one piece, some time."""

    def __init__(self, seed: int) -> None:
        self._chances = random.Random(seed)

    async def ask(self, address: Address, request: Request) -> Answer:
        if self._chances.random() < 0.5:
            return await complete(address, request, leave_after=self._chances.randrange(4))
        unary = Request(request.prompt, request.num_tokens, {"stream": False, "stream_options": None})
        answer = Answer(unary, 0.0)
        try:
            async with asyncio.timeout(self._chances.uniform(0, MOST_SECONDS)):
                await complete(address, unary, into=answer)
        except TimeoutError:
            pass
        return answer
