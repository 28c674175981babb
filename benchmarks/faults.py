"""Overload, clients that leave, an engine that dies, signals, hostile requests: what a server makes of them, how soon.

    python benchmarks/faults.py [--only leaving SIGTERM]         two minutes of a quiet machine

Each fault is done to a real server of the demo. A row has what was measured beside its limit, and how many answers were
lost or wrong; the exit code is 1 if any was, and does not depend on times. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from clients import percentile
from engines import exit_on_signals
from faulty.hostile import BODIES, GRAMMARS, NUMBERS, TEMPLATE
from faulty.rows import Row, ends_well, is_refused, is_whole, slowest
from faulty.server import GENERATE, PATIENCE, mortal_server, seconds_until
from rich.console import Console
from rich.table import Table

from amalgam.tools.bench import commit, hardware

MODEL, QUEUE = "demo", 8
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"


def overload() -> Iterator[Row]:
    flags = ("--engine.max_queue", str(QUEUE), "--inference.max_batch_size", str(QUEUE))
    with ThreadPoolExecutor(12 * QUEUE) as pool, mortal_server(*flags) as server:
        for _ in range(2 * QUEUE):  # half of them run, half of them wait
            pool.submit(server.generate, 4000)
        seconds_until(lambda: server.num_requests == 2 * QUEUE)
        for what, answers in {
            "overload: refused, one after another": [server.generate(1) for _ in range(50)],
            "overload: refused, 80 at once": server.generate_together(10 * QUEUE),
        }.items():
            yield slowest(what, 50, answers, lambda one: one.status_code == 503 and "retry-after" in one.headers)
        more = server.num_requests - 2 * QUEUE
        yield Row("overload: admitted beyond the cap", more, 1, "requests", 2 * QUEUE, int(more > 0))


def leaving() -> Iterator[Row]:
    with mortal_server() as server, ThreadPoolExecutor(8) as pool:
        server.generate(4)
        blocks, count = server.gauge("kv_blocks_used"), 200
        list(pool.map(server.leave, range(count)))
        seconds = seconds_until(lambda: server.gauge("kv_blocks_used") == blocks and not server.num_requests)
        yield Row(f"{count} clients left: KV blocks at baseline", seconds, 1, "s", 1, int(seconds > PATIENCE))


def engine_death() -> Iterator[Row]:
    with mortal_server() as server, ThreadPoolExecutor(QUEUE) as pool:
        waiting = [pool.submit(server.generate, 4000, index % 2 == 0) for index in range(QUEUE)]
        seconds_until(lambda: server.num_requests == QUEUE)
        began = time.perf_counter()
        os.kill(server.process.pid, signal.SIGUSR1)
        seconds = server.seconds_until_status("/health", 503)
        yield Row("engine dies: /health 503", seconds, 1, "s", 1, int(seconds > PATIENCE))
        answers = [one.result()[1] for one in waiting]
        wrong = sum(not ends_well(answer) or is_whole(answer) for answer in answers)
        yield Row("engine dies: all waiters answered", time.perf_counter() - began, 2, "s", QUEUE, wrong)
        seconds = seconds_until(lambda: not server.is_running)
        yield Row("engine dies: exit", seconds, 10, "s", 1, int(not server.process.poll()))


def terminated() -> Iterator[Row]:
    for count in (0, QUEUE):
        with mortal_server() as server, ThreadPoolExecutor(QUEUE) as pool:
            waiting = [pool.submit(server.generate, 300, index % 2 == 0) for index in range(count)]
            seconds_until(lambda: server.num_requests == count)  # noqa: B023 – called here
            os.kill(server.process.pid, signal.SIGTERM)
            seconds = server.seconds_until_status("/ready", 503)
            yield Row(f"SIGTERM, {count} requests: /ready 503", seconds, 0.5, "s", 1, int(seconds > PATIENCE))
            wrong = sum(not (is_whole(answer) and ends_well(answer)) for _, answer in (one.result() for one in waiting))
            seconds = seconds_until(lambda: not server.is_running)
            wrong += server.process.poll() != 0
            yield Row(f"SIGTERM, {count} requests: answers whole, exit", seconds, PATIENCE, "s", count, wrong)


def hostile() -> Iterator[Row]:
    with mortal_server() as server, ThreadPoolExecutor(8) as pool:
        server.post(GENERATE, b"{}")
        yield slowest("bad numbers", 50, [server.post(GENERATE, body) for body in NUMBERS], is_refused)
        asked = {"model": MODEL, "prompt": "a", "max_tokens": 4}
        server.post(COMPLETE, {**asked, "guided_regex": "a"})  # reads the vocabulary
        answers = [server.post(COMPLETE, {**asked, **grammar}) for grammar in GRAMMARS]
        yield slowest("hostile schemas and regexes", 1000, answers, lambda one: one.status_code < 500)
        with server.asking_health() as health:
            answers = list(pool.map(lambda body: server.post(CHAT, body), BODIES * 3))
        yield slowest("hostile bodies: answered", PATIENCE * 1e3, answers, is_refused)
        p99 = percentile([seconds for seconds, _ in health], 0.99) * 1e3
        wrong = sum(not is_whole(one) for _, one in health)
        yield Row("hostile bodies: /health p99", p99, 250, "ms", len(health), wrong)


def megabytes() -> Iterator[Row]:
    with mortal_server() as server, ThreadPoolExecutor(8) as pool:
        server.generate(1)
        before, small, refused = server.start_peak(), [], []
        for _ in range(5):
            large = [pool.submit(server.generate, 1, False, "many words " * 95_000) for _ in range(8)]
            time.sleep(0.02)  # they are on their way
            small.append(server.generate(1))
            refused += [one.result() for one in large]
        yield slowest("beside 8 prompts of a megabyte: a small request", 1000, small, is_whole)
        yield slowest("the 8 prompts: refused", PATIENCE * 1e3, refused, is_refused)
        yield Row("the 8 prompts: memory", server.peak() - before, 256, "MiB", len(small))


def template() -> Iterator[Row]:
    with TemporaryDirectory() as folder:
        (file := Path(folder, "template.jinja")).write_text(TEMPLATE)
        with mortal_server("--server.chat_template", str(file)) as server:
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
            yield slowest("hostile chat template", 1000, [server.post(CHAT, chat) for _ in range(3)], is_refused)
            yield slowest("hostile chat template: the next request", 1000, [server.generate(1)], is_whole)


FAULTS = {
    "overload": overload,
    "leaving": leaving,
    "death": engine_death,
    "SIGTERM": terminated,
    "hostile": hostile,
    "megabytes": megabytes,
    "template": template,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    options = parser.parse_args()
    exit_on_signals()
    rows = []
    for row in (row for name in options.only for row in FAULTS[name]()):
        print(f"{row.what}: {row.measured:.3g} {row.unit}, {row.verdict}", file=sys.stderr, flush=True)
        rows.append(row)
    table = Table("fault", "measured", "limit", "", "of", "wrong", "verdict")
    for row in rows:
        figures = (f"{row.measured:.3g}", f"{row.limit:g}", row.unit, str(row.count), str(row.wrong))
        table.add_row(row.what, *figures, row.verdict)
    Console(width=120).print(table)
    document = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "rows": [asdict(row) for row in rows]}
    print(json.dumps(document))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
