"""What a re-map takes while it is made, and what a killed one leaves."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from clients import percentile
from remapping.bench import MOST_TOKENS, QUESTIONS, Bench, Change, Weights, ask_each
from remapping.live import LiveServer

from amalgam.config.placement import BASE_SOURCE


def show_memory(bench: Bench, sources: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    with bench.serving(MOST_TOKENS) as server:
        weights = Weights.of(server, sources)
        layers = list(weights.experts)[: max(len(weights.experts) // 2, 1)]
        names = [name for layer in layers for expert in weights.experts[layer] for name in expert]
        asyncio.run(ask_each(server))
        for source in (*[source for source in sources if source != BASE_SOURCE], BASE_SOURCE):
            before, anonymous = asyncio.run(server.settled_bytes()), server.anonymous_bytes
            with server.watching_memory() as peaks:
                result = server.ask("/update_weight_mapping", {"weight_mapping": dict.fromkeys(names, source)})
            asyncio.run(ask_each(server))  # lets go of the version before
            changed = result["loaded_bytes"]
            difference = sum(change["bytes_after"] - change["bytes_before"] for change in result["changes"])
            rows.append(
                {
                    "to": source,
                    "weights": result["num_loaded"],
                    "seconds": result["seconds"],
                    "changed": changed,
                    "resident_before": before,
                    "resident_peak": peaks["resident"],
                    "anonymous_before": anonymous,
                    "anonymous_peak": peaks["anonymous"],
                    "peak_of_changed": (peaks["resident"] - before) / changed,
                    "of_limit": peaks["resident"] / ((before + changed) * 1.05),
                    "left": asyncio.run(server.settled_bytes()) - before - difference,
                }
            )
    return rows


class Changes:
    """One change after the other, until the server is gone.

    Attributes:
        is_under_way: a change has been asked for and not been answered.
        fingerprints: of the weights that a start may find: those of the last answer, and what was under way then.
    """

    def __init__(self, server: LiveServer, changes: Iterator[Change]) -> None:
        self._server = server
        self._changes = changes
        self.is_under_way = False
        self.fingerprints = {server.ask("/manifest")["fingerprint"]}

    def make(self) -> None:
        with suppress(OSError, http.client.HTTPException):
            while True:
                body = {"weight_mapping": next(self._changes)}
                self.fingerprints.add(self._server.ask("/weights/plan", body)["fingerprint"])
                self.is_under_way = True
                result = self._server.ask("/update_weight_mapping", body)
                self.is_under_way, self.fingerprints = False, {result["fingerprint"]}


def show_kills(
    bench: Bench, sources: Sequence[str], count: int, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    cache = bench.folder / "packed"
    flags = f"--inference.packed_cache {cache} --weights.history {bench.folder / 'history.jsonl'} --weights.resume true"
    num_midway = num_differing = num_leftovers = 0
    starts: list[float] = []
    expected: set[str] = set()
    answers: dict[str, str] = {}
    for index in range(count + 1):
        progress(f"{index} of {count}")
        began = time.perf_counter()
        with bench.serving(MOST_TOKENS, *flags.split()) as server:
            starts.append(time.perf_counter() - began)
            fingerprint = server.ask("/manifest")["fingerprint"]
            text = asyncio.run(server.stream(QUESTIONS[0])).text
            is_known = not expected or fingerprint in expected
            num_differing += not is_known or answers.setdefault(fingerprint, text) != text
            num_leftovers += len(list(cache.glob(".*")))
            if index == count:
                break
            weights = Weights.of(server, sources)
            changes = Changes(
                server,
                weights.in_turn(bench.rng, lambda weights=weights: weights.any_layer(bench.rng)),  # type: ignore[misc]
            )
            num_midway += kill_midway(server, changes, bench.rng.uniform(0, 0.15))
            expected = changes.fingerprints
    return [
        {
            "kills": count,
            "midway": num_midway,
            "differing": num_differing,
            "leftovers": num_leftovers,
            "start_seconds": percentile(starts, 0.5),
        }
    ]


def kill_midway(server: LiveServer, changes: Changes, delay: float) -> bool:
    """End a server that makes one change after the other, so long after the first began; whether one was under way."""
    thread = threading.Thread(target=changes.make)
    thread.start()
    while thread.is_alive() and not changes.is_under_way:
        time.sleep(0.001)
    time.sleep(delay)
    was_under_way = changes.is_under_way
    server.close()  # SIGKILL to it and whatever it has started
    thread.join()
    return was_under_way
