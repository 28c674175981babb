"""How fluid the statistics of a large model are: 94 layers of 128 experts, as Qwen3-235B-A22B has.

1. A snapshot in the process, and the answers that the page and clients read, over HTTP, while steps are counted:
   milliseconds at the median, the 99th percentile and the worst.
2. What pages that are open cost the server beside those steps: milliseconds of processor time per second, for one
   viewer and for twenty, with shared answers as the page asks for them, and with one for each.
3. The page's own updates of its two grids, in headless Chromium where there is one.

Run from the repository's root as `python -m benchmarks.dashboard`. Prints a table, and one JSON object as the last
line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table
from tests.server.browser import Page, open_browser
from tests.server.conftest import serving, wait_until
from tests.server.dashboard.looking import UPDATE_OFTEN
from tests.server.fakes import fake_settings
from tests.server.large import NUM_EXPERTS, NUM_LAYERS, TOP_K, LargeDeployment

from amalgam.experts.statistics import grid
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.routing import TokenSpan
from amalgam.tools.bench import commit, hardware

PATHS = (
    "/experts/grid",
    "/experts/grid?minutes=5",
    "/experts/precision_map",
    "/experts/hints",
    "/expert_stats",
    "/dashboard/expert?layer_id=3&expert_id=20",
)
POLLED = ("/experts/grid", "/experts/labels", "/dashboard/expert?layer_id=3&expert_id=20")
POLL_SECONDS = 4  # as the page does while statistics change
VIEWERS = ((1, True), (20, True), (20, False))  # how many, and whether they share answers
STEP_SECONDS = 0.01  # between steps that are counted meanwhile


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one thing over its repeats."""

    what: str
    repeats: int
    median: float
    p99: float
    worst: float


@dataclass(frozen=True)
class Cost:
    """Processor time of the server's process, less what it takes without viewers."""

    what: str
    milliseconds_per_second: float


def timing(what: str, milliseconds: list[float]) -> Timing:
    median, p99, worst = np.quantile(milliseconds, (0.5, 0.99, 1.0)).tolist()
    return Timing(what, len(milliseconds), median, p99, worst)


def repeat(what: str, call: Callable[[], object], repeats: int) -> Timing:
    call()
    milliseconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        milliseconds.append((time.perf_counter() - started) * 1e3)
    return timing(what, milliseconds)


def read_often(url: str, path: str, repeats: int) -> Timing:
    """An answer over HTTP, read to its end by a client with one connection."""
    with httpx.Client(base_url=url, timeout=60) as client:
        return repeat(f"GET {path}", lambda: client.get(path).raise_for_status(), repeats)


async def view(url: str, seconds: float, *, is_shared: bool) -> None:
    """What an open page asks for: the events, and every other one the statistics again."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client, asyncio.timeout(None) as limit:
        limit.reschedule(asyncio.get_running_loop().time() + seconds)
        polled_at = -POLL_SECONDS
        async with client.stream("GET", "/dashboard/events") as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or time.monotonic() - polled_at < POLL_SECONDS:
                    continue
                polled_at = time.monotonic()
                version = json.loads(line.removeprefix("data: "))["statistics_version"]
                params = {"statistics_version": version} if is_shared else {}
                answers = [client.get(httpx.URL(path).copy_merge_params(params)) for path in POLLED]
                for answer in await asyncio.gather(*answers):
                    answer.raise_for_status()


def view_together(url: str, num_viewers: int, seconds: float, is_shared: bool) -> None:
    async def run() -> None:
        viewers = (view(url, seconds, is_shared=is_shared) for _ in range(num_viewers))
        for end in await asyncio.gather(*viewers, return_exceptions=True):
            if not isinstance(end, TimeoutError):
                raise RuntimeError("a viewer ended early") from end

    asyncio.run(run())


def cost_of_viewers(url: str, seconds: float) -> list[Cost]:
    """The server is in this process, the viewers in another."""

    def load() -> float:
        started = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - started) / seconds * 1e3

    costs, alone = [], load()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for num_viewers, is_shared in VIEWERS:
            viewing = pool.submit(view_together, url, num_viewers, seconds + 3, is_shared)
            time.sleep(2)  # until they have connected
            what = f"viewers: {num_viewers}, {'answers shared' if is_shared else 'an answer each'}"
            costs.append(Cost(what, load() - alone))
            viewing.result()
    return costs


@contextmanager
def steps_counted(tracker: ExpertTracker) -> Iterator[None]:
    """Steps of 16 sequences, as decoding would make them."""
    is_over = threading.Event()
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(16, NUM_EXPERTS, generator=generator).topk(TOP_K) for _ in range(NUM_LAYERS)]

    def run() -> None:
        while not is_over.wait(STEP_SECONDS):
            tracker.begin_step([TokenSpan(i, i, i + 1, i, i) for i in range(16)])
            for layer_id, (weights, ids) in enumerate(layers):
                tracker.observe(layer_id, ids, weights)
            tracker.end_step()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def page_updates(page: Page, url: str, rounds: int) -> list[Timing]:
    """The two large grids, from a change of what they show to the drawn canvas."""
    page.open(url + "/dashboard")
    timings = []
    for select, name in (("#usage-order", "usage-update"), ("#precision-hot", "precision-update")):
        page.show(select)
        durations: list[float] = []
        for _ in range(rounds):
            durations += page.driver.execute_async_script(UPDATE_OFTEN, select, name)
        timings.append(timing(f"page: {name}", durations))
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--viewer-seconds", type=float, default=20, help="for each number of viewers")
    parser.add_argument("--page-rounds", type=int, default=10, help="of four updates each")
    arguments = parser.parse_args()
    deployment = LargeDeployment()
    tracker: ExpertTracker = deployment.tracker
    results = []
    with serving(fake_settings(port=0), lambda: deployment) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        with steps_counted(tracker):
            results.append(repeat("snapshot in the process", tracker.snapshot, arguments.repeats))
            results.append(repeat("grid in the process", lambda: grid(tracker.snapshot()), arguments.repeats))
            # A client of this process would take turns with the server for the interpreter.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                for path in PATHS:
                    results.append(pool.submit(read_often, url, path, arguments.repeats).result())
            costs = cost_of_viewers(url, arguments.viewer_seconds)
            with tempfile.TemporaryDirectory() as profile:
                try:
                    with open_browser(Path(profile)) as page:
                        results += page_updates(page, url, arguments.page_rounds)
                except pytest.skip.Exception as reason:
                    print(f"The page was not measured: {reason}", file=sys.stderr)
    table = Table("what", "repeats", "median ms", "p99 ms", "worst ms")
    for row in results:
        table.add_row(row.what, str(row.repeats), f"{row.median:.1f}", f"{row.p99:.1f}", f"{row.worst:.1f}")
    Console(width=100).print(table)
    table = Table("beside counted steps", "processor ms per second")
    for cost in costs:
        table.add_row(cost.what, f"{cost.milliseconds_per_second:.1f}")
    Console(width=100).print(table)
    figures = {"results": [asdict(row) for row in results], "viewers": [asdict(cost) for cost in costs]}
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), **figures}))


if __name__ == "__main__":
    main()
