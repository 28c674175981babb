"""Gaps between the tokens of 28 streams while four long prompts arrive; and their answers beside those of single runs.

Every request has a seed of its own, and its text is kept. Ours then runs once more with so small a KV cache that
requests have to give their blocks back; afterwards a server that keeps no prefixes answers the same requests one at a
time. Answers that differ are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from clients import Address, Answer, Request, check, closed_loop, complete
from contestants.protocol import text
from rich.console import Console
from scenarios.common import Document, make_table, percentiles, spread, until
from servers import MAX_SEQUENCES, Server, awake, serving

LONG_PROMPTS, LONG_TOKENS = (4000, 1000, 3000, 2000), 64
SHORT_PROMPTS, SHORT_TOKENS = (32, 64, 128, 256), 128
MAX_TOKENS = max(LONG_PROMPTS) + LONG_TOKENS
NUM_TALKING = MAX_SEQUENCES - len(LONG_PROMPTS)
SMALL_ROOM = 2 * MAX_TOKENS  # tokens in the small KV cache: half of what the requests of a moment need
LONG_SEED = 90_000  # and above: long prompts; below: those of the streams
ROUND_SEEDS = 100_000  # a round's seeds are its own


def long_prompts(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    rows, exact = [], []
    for name, server in servers.items():
        answers: list[Answer] = []
        for slowdown in options.slowdowns if server.is_ours else (None,):
            rounds = []
            for round_ in range(options.rounds):
                flags = ("--engine.max_slowdown", str(slowdown)) if slowdown else ()
                talk = _talk(options, name, server, round_, flags)
                rounds.append(talk.figures())
                answers += talk.answers
            rows.append({"server": name, "max_slowdown": slowdown, "rounds": rounds})
        if server.is_ours:
            small = _talk(options, name, server, 0, (), room=SMALL_ROOM)
            answers += small.answers
            exact.append({"server": name, **small.counters, **_compare(options, name, server, answers)})
    _show_gaps(console, rows)
    for row in exact:
        console.print(
            f"{row['server']}: with a small KV cache {row['preemptions']:.0f} preemptions, "
            f"{row['cached_tokens']:.0f} prompt tokens cached; of {row['answers']} answers to {row['checked']} "
            f"requests, each of which was repeated alone, differing: {row['differing']}"
        )
    return {"results": rows, "exact": exact, "failed": any(row["differing"] for row in exact)}


@dataclass(frozen=True)
class Talk:
    """What came of streams beside long prompts.

    Attributes:
        talked, arrived: answers of the streams and to the long prompts.
        started: when the first long prompt was sent.
        counters: of the server, at the end.
    """

    talked: Sequence[Answer]
    arrived: Sequence[Answer]
    started: float
    counters: Mapping[str, float]

    @property
    def answers(self) -> list[Answer]:
        return [*self.talked, *self.arrived]

    def figures(self) -> Document:
        """Gaps of the streams in seconds: before the prompts, and until the last of these has its first token."""
        settled = max(answer.arrivals[0] for answer in self.talked[:NUM_TALKING])
        until = max(answer.arrivals[0] for answer in self.arrived)
        before, during = self._gaps(settled, self.started), self._gaps(self.started, until)
        return {
            "before": before,
            "during": during,
            "p99_to_p50": during["gap_p99"] / during["gap_p50"],
            "p99_to_undisturbed_p50": during["gap_p99"] / before["gap_p50"],
            "first_token_seconds": {len(one.question.prompt): one.first_token_seconds for one in self.arrived},
        }

    def _gaps(self, begin: float, end: float) -> dict[str, float]:
        pairs = [pair for answer in self.talked for pair in zip(answer.arrivals, answer.arrivals[1:], strict=False)]
        return percentiles("gap", [after - before for before, after in pairs if begin < after <= end])


def short_request(seed: int) -> Request:
    """Its first half is that of all of its length, so that the prefix cache has something to find."""
    length = SHORT_PROMPTS[seed % len(SHORT_PROMPTS)]
    beginning = text(length // 2, length)
    return Request(beginning + text(length - len(beginning), seed), SHORT_TOKENS, {"seed": seed})


def long_request(index: int, round_: int) -> Request:
    seed = round_ * ROUND_SEEDS + LONG_SEED + index
    return Request(text(LONG_PROMPTS[index], seed), LONG_TOKENS, {"seed": seed})


def _talk(
    options: argparse.Namespace, name: str, server: Server, round_: int, flags: tuple[str, ...], room: int | None = None
) -> Talk:
    with (
        serving({name: server}, options.folder, max_tokens=MAX_TOKENS, room=room, flags=flags) as running,
        awake(running[name]),
    ):
        talked, arrived, started = asyncio.run(_streams_and_prompts(running[name].address, round_))
        gauges = running[name].gauges() if server.is_ours else {}
        names = {"preemptions": "amalgam_preemptions_total", "cached_tokens": "amalgam_prefix_hit_tokens_total"}
        return Talk(talked, arrived, started, {key: gauges.get(metric, 0.0) for key, metric in names.items()})


async def _streams_and_prompts(address: Address, round_: int) -> tuple[list[Answer], list[Answer], float]:
    finished = asyncio.Event()
    talked: list[Answer] = []

    def short_requests() -> Iterator[Request]:
        seed = round_ * ROUND_SEEDS
        while not finished.is_set():
            yield short_request(seed)
            seed += 1

    async def observed(to: Address, request: Request) -> Answer:
        answer = Answer(request, time.perf_counter())
        talked.append(answer)
        check([await complete(to, request, into=answer)])  # at once: a server that is gone would be asked for ever
        return answer

    talkers = asyncio.create_task(closed_loop(address, short_requests(), NUM_TALKING, observed))
    await until(lambda: sum(len(answer.arrivals) > 16 for answer in talked) >= NUM_TALKING or talkers.done())
    started = time.perf_counter()
    arriving = []
    for index in range(len(LONG_PROMPTS)):
        arriving.append(asyncio.create_task(complete(address, long_request(index, round_))))
        await asyncio.sleep(1)
    arrived = [await task for task in arriving]
    finished.set()
    await talkers
    check(arrived)
    return talked, arrived, started


def _compare(options: argparse.Namespace, name: str, server: Server, answers: Sequence[Answer]) -> Document:
    """The answers beside those of a server that has one request at a time and keeps no prefixes."""
    requests = chosen([answer.question for answer in answers], options.checked)
    flags = ("--engine.prefix_cache", "false")
    with (
        serving({name: server}, options.folder, max_tokens=MAX_TOKENS, flags=flags) as running,
        awake(running[name]),
    ):
        alone = asyncio.run(closed_loop(running[name].address, requests, 1))
    check(alone)
    return differences(answers, alone)


def chosen(requests: Sequence[Request], most_short: int) -> list[Request]:
    """Each of the long prompts, and so many of the streams' requests, drawn at random but the same each time."""
    known = {request.fields["seed"]: request for request in requests}
    short = sorted(seed for seed in known if seed % ROUND_SEEDS < LONG_SEED)
    drawn = random.Random(0).sample(short, min(most_short, len(short)))
    return [known[seed] for seed in sorted({*known} - {*short} | {*drawn})]


def differences(answers: Sequence[Answer], alone: Sequence[Answer]) -> Document:
    """How many answers say something else than the same request alone; requests are told apart by their seeds."""
    expected = {one.question.fields["seed"]: (one.text, one.num_new_tokens) for one in alone}
    compared = [answer for answer in answers if answer.question.fields["seed"] in expected]
    wrong = [one for one in compared if (one.text, one.num_new_tokens) != expected[one.question.fields["seed"]]]
    seeds = sorted({one.question.fields["seed"] for one in wrong})
    return {"checked": len(expected), "answers": len(compared), "differing": len(wrong), "differing_seeds": seeds}


def _show_gaps(console: Console, rows: Sequence[Document]) -> None:
    table = make_table(
        "server", "max slowdown", "gap ms p50", "p99", "p99/p50", "before: p50", "p99/before", "first token s"
    )
    for row in rows:
        rounds = row["rounds"]
        gaps = [
            f"{median(one[part][f'gap_{share}'] for one in rounds) * 1e3:.0f}"
            for part, share in (("during", "p50"), ("during", "p99"), ("before", "p50"))
        ]
        ratios = []
        for key in ("p99_to_p50", "p99_to_undisturbed_p50"):
            values = [one[key] for one in rounds]
            ratios.append(f"{median(values):.2f} ({spread(values)})")
        first = [median(one["first_token_seconds"][length] for one in rounds) for length in LONG_PROMPTS]
        shown = " ".join(f"{seconds:.1f}" for seconds in first)
        table.add_row(row["server"], f"{row['max_slowdown'] or '–'}", *gaps[:2], ratios[0], gaps[2], ratios[1], shown)
    console.print(table)
