"""What clients feel of a re-map: gaps between tokens, the first token of the new version, the exchange itself."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from clients import percentile
from remapping.bench import ENDINGS, LONG_TOKENS, MOST_TOKENS, Bench, Change, Weights, ask_each, clients, until
from remapping.live import LiveServer, Question, StreamedAnswer

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import RequestOutput
from amalgam.runtime.opening import open_deployment


def gaps_beside(
    answers: Sequence[StreamedAnswer], windows: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Milliseconds between tokens of the same answer, those that overlap one of the windows, and the others."""
    during, between = [], []
    for answer in answers:
        for before, after in answer.gaps:
            overlaps = any(before < end and after > begin for begin, end in windows)
            (during if overlaps else between).append((after - before) * 1e3)
    return during, between


def pause_row(name: str, answers: Sequence[StreamedAnswer], windows: Sequence[tuple[float, float]]) -> dict[str, Any]:
    during, between = gaps_beside(answers, windows)
    p99, p99_without = percentile(during, 0.99), percentile(between, 0.99)
    return {
        "what": name,
        "remaps": len(windows),
        "remap_seconds": sum(end - begin for begin, end in windows) / max(len(windows), 1),
        "gaps": len(during),
        "p50": percentile(during, 0.5),
        "p50_without": percentile(between, 0.5),
        "p99": p99,
        "p99_without": p99_without,
        "longest": max(during, default=float("nan")),
        "longest_without": max(between, default=float("nan")),
        "ratio": p99 / p99_without,
    }


def long_streams(bench: Bench, server: LiveServer) -> tuple[list[StreamedAnswer], list[asyncio.Task[StreamedAnswer]]]:
    """Streams that last longer than what is shown, as they come."""
    questions = [Question(ENDINGS[i % 4], LONG_TOKENS - MOST_TOKENS, i) for i in range(bench.num_streams)]
    answers = [StreamedAnswer(question) for question in questions]
    return answers, [asyncio.create_task(server.stream(answer.question, answer)) for answer in answers]


def have_begun(answers: Sequence[StreamedAnswer]) -> bool:
    """Whether the prompts of all are behind them."""
    return all(len(answer.arrivals) > 20 for answer in answers)


async def pause_of_streams(
    bench: Bench, server: LiveServer, changes: Iterator[Change], num_remaps: int, name: str
) -> dict[str, Any]:
    """Long streams, none of which begins or ends meanwhile."""
    answers, streams = long_streams(bench, server)
    windows: list[tuple[float, float]] = []
    try:
        await until(lambda: have_begun(answers))
        quiet = 0.0
        for _ in range(num_remaps):
            if any(stream.done() for stream in streams):
                break
            began = time.perf_counter()
            await server.remap(next(changes))
            windows.append((began, time.perf_counter()))
            quiet = max(quiet, windows[-1][1] - began, 0.05)
            await asyncio.sleep(quiet)
    finally:
        for stream in streams:
            stream.cancel()
        results = await asyncio.gather(*streams, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return pause_row(name, answers, windows)


async def pause_of_clients(
    bench: Bench, server: LiveServer, changes: Iterator[Change], num_remaps: int
) -> dict[str, Any]:
    """Clients that ask anew: after a re-map, old and new answers are in turn until the last old one has ended."""
    numbers = itertools.count()

    def question() -> Question:
        number = next(numbers)
        return Question(ENDINGS[number % 4], 32 + number % 64, number)

    began: list[tuple[float, int]] = []
    async with clients(server, bench.num_streams, question) as answers:
        await until(lambda: len(answers) >= bench.num_streams)
        for _ in range(num_remaps):
            begin = time.perf_counter()
            result = await server.remap(next(changes))
            began.append((begin, result["weight_version"]))
            enough = len(answers) + 4 * bench.num_streams  # old ones, and as many again without a re-map
            await until(lambda enough=enough: len(answers) >= enough)  # type: ignore[misc]
    windows = [
        (begin, max(answer.ended for answer in answers if answer.version is not None and answer.version < version))
        for begin, version in began
    ]
    return pause_row("one expert, clients ask anew, until drained", answers, windows)


def show_pause(bench: Bench, sources: Sequence[str], num_remaps: int) -> list[dict[str, Any]]:
    with bench.serving(LONG_TOKENS) as server:
        weights = Weights.of(server, sources)

        experts = weights.in_turn(bench.rng, lambda: weights.any_expert(bench.rng))
        layers = weights.in_turn(bench.rng, lambda: weights.any_layer(bench.rng))
        return [
            asyncio.run(pause_of_streams(bench, server, experts, num_remaps, "one expert")),
            asyncio.run(pause_of_streams(bench, server, layers, max(num_remaps // 4, 1), "a layer's experts")),
            asyncio.run(pause_of_clients(bench, server, experts, max(num_remaps // 4, 1))),
        ]


async def first_tokens(server: LiveServer, changes: Iterator[Change], count: int) -> list[float]:
    seconds = []
    for index in range(count):
        began = time.perf_counter()
        result = await server.remap(next(changes))
        answer = await server.stream(Question(ENDINGS[0], 1, index))
        if answer.version != result["weight_version"]:
            raise RuntimeError(f"Version {result['weight_version']} is in use, and {answer.version} has answered.")
        seconds.append(answer.ended - began)
    return seconds


def show_first(bench: Bench, sources: Sequence[str], count: int) -> list[dict[str, Any]]:
    rows = []

    async def beside_streams(server: LiveServer, changes: Iterator[Change]) -> list[float]:
        answers, streams = long_streams(bench, server)
        try:
            await until(lambda: have_begun(answers))
            return await first_tokens(server, changes, count)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    with bench.serving(LONG_TOKENS) as server:
        weights = Weights.of(server, sources)
        changes = weights.in_turn(bench.rng, lambda: weights.any_expert(bench.rng))
        asyncio.run(ask_each(server))
        for name, seconds in (
            ("idle", asyncio.run(first_tokens(server, changes, count))),
            (f"beside {bench.num_streams} streams", asyncio.run(beside_streams(server, changes))),
        ):
            rows.append({"load": name, "trials": count, "median": percentile(seconds, 0.5), "longest": max(seconds)})
    return rows


def show_flip(bench: Bench, count: int) -> list[dict[str, Any]]:
    """In this process: nothing but the exchange, which waits for the step under way at most."""
    sizes = {"inference.max_seq_length": LONG_TOKENS, "inference.max_batch_size": bench.num_streams}
    deployment = open_deployment(bench.settings({}, **sizes))
    milliseconds, num_outputs, has_ended = [], itertools.count(), threading.Semaphore(0)

    def on_output(output: RequestOutput) -> None:
        next(num_outputs)
        if output.is_finished:
            has_ended.release()

    try:
        engine = deployment.engine
        params = SamplingParams(max_new_tokens=LONG_TOKENS, ignore_eos=True, seed=0)
        prompt = deployment.tokenizer.encode(ENDINGS[0])
        request_ids = [engine.submit(prompt, params, on_output) for _ in range(bench.num_streams)]
        for _ in range(count):
            time.sleep(0.01)
            began = time.perf_counter()
            engine.set_version(engine.version)
            milliseconds.append((time.perf_counter() - began) * 1e3)
        for request_id in request_ids:
            engine.cancel(request_id)
        for _ in request_ids:
            has_ended.acquire()
    finally:
        deployment.close()
    return [
        {
            "flips": count,
            "p50": percentile(milliseconds, 0.5),
            "p99": percentile(milliseconds, 0.99),
            "longest": max(milliseconds),
        }
    ]
