"""What running streams feel of long prompts that arrive, and what a shared beginning saves.

    python benchmarks/streams.py [--config config/model_config.yaml] [--streams 32] [--prompts 8] [--slowdowns 2 1000]

Streams: so many run while prompts of up to 4,000 tokens arrive, several at a time; the gaps between their tokens,
for each `engine.max_slowdown`. One of 1000 is as good as none.

Shared beginnings: the time to the first token of a prompt that nobody has asked before, then of prompts that differ in
their last 64 tokens only; beside what the tokens that are left to compute would take at the first one's speed.

Prints tables and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from amalgam.config.reading import load_settings
from amalgam.engine.core import Engine
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import RequestOutput
from amalgam.runtime.opening import open_deployment
from amalgam.tools.bench import commit, hardware

LONGEST = 4000
AT_A_TIME = 2  # prompts under way
ENDING = 64


class Arrivals:
    """When each request's tokens came."""

    def __init__(self) -> None:
        self.times: dict[int, list[float]] = {}
        self.num_ended = threading.Semaphore(0)
        self.errors: list[Exception] = []

    def __call__(self, output: RequestOutput) -> None:
        now = time.monotonic()
        self.times.setdefault(output.request_id, []).extend([now] * len(output.token_ids))
        if output.is_finished:
            self.errors += [output.error] if output.error else []
            self.num_ended.release()


def random_ids(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(10, vocab_size) for _ in range(count)]


def sampling(num_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_tokens, temperature=1.0, seed=seed, ignore_eos=True)


def run_streams(engine: Engine, vocab_size: int, num_streams: int, num_prompts: int) -> dict[str, float]:
    """Gaps in milliseconds between the streams' tokens, alone and while prompts arrive."""
    rng, streams, prompts = random.Random(0), Arrivals(), Arrivals()
    with engine.between_steps():
        ids = [
            engine.submit(random_ids(rng, vocab_size, rng.randint(8, 64)), sampling(LONGEST, seed), streams)
            for seed in range(num_streams)
        ]
    while not all(len(streams.times.get(request_id, ())) > 40 for request_id in ids):
        time.sleep(0.05)
    began = time.monotonic()
    lengths = [LONGEST - 400 * (index % 8) for index in range(num_prompts)]
    first_tokens = []
    for index, length in enumerate(lengths):
        submitted = time.monotonic()
        request_id = engine.submit(random_ids(rng, vocab_size, length), sampling(2, index), prompts)
        if index >= AT_A_TIME - 1 or index == num_prompts - 1:
            prompts.num_ended.acquire()
        first_tokens.append((request_id, submitted))
    for _ in range(min(AT_A_TIME - 1, num_prompts - 1)):
        prompts.num_ended.acquire()
    ended = time.monotonic()
    for request_id in ids:
        engine.cancel(request_id)
        streams.num_ended.acquire()
    for error in streams.errors + prompts.errors:
        raise error
    gaps: dict[bool, list[float]] = {False: [], True: []}
    for request_id in ids:
        for before, after in pairwise(streams.times[request_id]):
            if after <= ended:
                gaps[after > began].append((after - before) * 1e3)
    p50, p99 = np.percentile(gaps[True], [50, 99]).tolist()
    return {
        "alone p50": median(gaps[False]),
        "p50": p50,
        "p99": p99,
        "p99 / p50": p99 / p50,
        "longest": max(gaps[True]),
        "prompt tokens/s": sum(lengths) / (ended - began),
        "first token": median(prompts.times[i][0] - submitted for i, submitted in first_tokens) * 1e3,
    }


def first_token(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """Milliseconds, and how many tokens were there already."""
    [answer] = engine.generate([prompt], sampling(1, 0))
    if answer.error is not None:
        raise answer.error
    return answer.usage.first_token_seconds * 1e3, answer.usage.num_cached_tokens


def run_shared(engine: Engine, vocab_size: int, length: int, repeats: int = 5) -> dict[str, float]:
    """Milliseconds to the first token, alone and behind a beginning that is there."""
    rng, cold, warm, num_cached = random.Random(length), [], [], 0
    for _ in range(repeats):
        beginning = random_ids(rng, vocab_size, length - ENDING)
        cold.append(first_token(engine, beginning + random_ids(rng, vocab_size, ENDING))[0])
        milliseconds, num_cached = first_token(engine, beginning + random_ids(rng, vocab_size, ENDING))
        warm.append(milliseconds)
    share = (length - num_cached) / length
    return {
        "tokens": length,
        "cached": num_cached,
        "cold": median(cold),
        "warm": median(warm),
        "predicted": median(cold) * share,
    }


def table(rows: Sequence[dict[str, float]]) -> None:
    print("".join(f"{name:>17}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:17.5g}" for value in row.values()), flush=True)
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("config/model_config.yaml"))
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--slowdowns", type=float, nargs="+", default=[2.0, 1000.0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    arguments = parser.parse_args()
    limits: dict[str, Any] = {
        "inference.max_seq_length": LONGEST + 80,
        "inference.max_batch_size": arguments.streams + AT_A_TIME,
        "engine.kv_cache_bytes": 2 << 30,
    }
    stalls, shared = [], []
    for slowdown in arguments.slowdowns:
        deployment = open_deployment(load_settings(arguments.config, {**limits, "engine.max_slowdown": slowdown}))
        try:
            engine, vocab_size = deployment.engine, deployment.spec.vocab_size
            engine.generate([[11] * 600], sampling(4, 0))
            figures = run_streams(engine, vocab_size, arguments.streams, arguments.prompts)
            stalls.append({"max_slowdown": slowdown, **figures})
            if slowdown == arguments.slowdowns[0]:
                shared = [run_shared(engine, vocab_size, length) for length in arguments.lengths]
        finally:
            deployment.close()
    print(f"{arguments.streams} streams, milliseconds between tokens while prompts arrive")
    table(stalls)
    print("milliseconds to the first token")
    table(shared)
    document = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "streams": stalls, "shared": shared}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
