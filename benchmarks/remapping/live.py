"""A server of ours that is changed while it answers: its process, its streams, its memory.

In: a configuration. Out: answers with the weight version that each names and the times of its tokens; what a re-map
took. Must never know what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
from engines import Child, free_port, process_memory, reset_peak_memory

from amalgam.tools.load.http import Address, Connections

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.002
SETTLE_SECONDS = 0.5
SETTLE_READS = 40
SETTLED_READS = 4  # alike, one after the other
SETTLED_BYTES = 2**18


@dataclass(frozen=True)
class Question:
    """What `POST /generate` is asked, but for streaming."""

    prompt: str
    num_tokens: int
    seed: int
    is_greedy: bool = False
    ignore_eos: bool = True

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.num_tokens,
            "do_sample": not self.is_greedy,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
        }


@dataclass
class StreamedAnswer:
    """An answer as it comes; a reader of its events.

    Attributes:
        sent: by `time.perf_counter`, as `arrivals`, one for each event with text.
        version: the weight version that it names; None until it has ended.
    """

    question: Question
    sent: float = 0.0
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    version: int | None = None
    num_tokens: int = 0
    error: str = ""
    _rest: bytes = b""
    _status: int = 0

    @property
    def ended(self) -> float:
        return self.arrivals[-1]

    @property
    def gaps(self) -> Iterator[tuple[float, float]]:
        """When each token but the first came, and the one before it."""
        return pairwise(self.arrivals)

    def head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        self._status = status
        return False

    def piece(self, data: bytes, now: float) -> bool:
        if self._status != 200:
            self.error += data.decode(errors="replace")
            return False
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                self._take(orjson.loads(event[6:]), now)
        return False

    def _take(self, fields: Mapping[str, Any], now: float) -> None:
        if "error" in fields:
            self.error = json.dumps(fields["error"])
            return
        if fields["text"]:
            self.text += fields["text"]
            self.arrivals.append(now)
        if "weight_version" in fields:
            self.version, self.num_tokens = fields["weight_version"], fields["generated_tokens"]


class LiveServer(Child):
    """A server that is ready.

    Args:
        flags: for its command line, behind the configuration.
        verb: what starts it; none: a server.
    """

    def __init__(self, config: Path, log: Path, flags: Sequence[str] = (), verb: Sequence[str] = ()) -> None:
        self.port = free_port()
        program = (
            [str(Path(sys.executable).with_name("amalgam")), *verb] if verb else [sys.executable, str(ROOT / "main.py")]
        )
        super().__init__([*program, "--config", str(config), "--port", str(self.port), *flags], log)
        self.wait_until(lambda: bool(self.ask("/ready")))

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A JSON answer. Blocking.

        Raises:
            urllib.error.HTTPError: any status but 200.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    async def remap(self, mapping: Mapping[str, str]) -> dict[str, Any]:
        """The answer of `POST /update_weight_mapping`."""
        return await asyncio.to_thread(self.ask, "/update_weight_mapping", {"weight_mapping": mapping})

    def counters(self) -> Mapping[str, float]:
        """The metrics by name, over all labels."""
        found: dict[str, float] = defaultdict(float)
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                if not line.startswith("#"):
                    name, _, value = line.rpartition(" ")
                    found[name.partition("{")[0]] += float(value)
        return found

    async def stream(self, question: Question, into: StreamedAnswer | None = None) -> StreamedAnswer:
        """One answer to its end, over a connection of its own."""
        answer = into or StreamedAnswer(question)
        connections = Connections(Address("http", "127.0.0.1", self.port), keeps=False)
        body = json.dumps({**question.body, "stream": True}).encode()
        answer.sent = time.perf_counter()
        await connections.exchange("POST", "/generate", [("Content-Type", "application/json")], body, answer)
        if answer.error or answer.version is None:
            raise RuntimeError(f"An answer failed: {answer.error or 'its stream ended early'}")
        return answer

    @property
    def resident_bytes(self) -> int:
        return process_memory(self.process.pid, "VmRSS")

    async def settled_bytes(self) -> int:
        """`resident_bytes` once it stays the same: weights that nobody uses any more are freed behind the answers."""
        before, num_alike = self.resident_bytes, 0
        for _ in range(SETTLE_READS):
            await asyncio.sleep(SETTLE_SECONDS)
            now = self.resident_bytes
            num_alike = num_alike + 1 if abs(now - before) < SETTLED_BYTES else 0
            if num_alike == SETTLED_READS:
                break
            before = now
        return now

    @contextmanager
    def watching_memory(self) -> Iterator[dict[str, int]]:
        """What the process takes at its peak while the context lasts.

        Filled at its end: `resident`, by the kernel's own mark, with pages of mapped files; `anonymous`, sampled.
        """
        peaks = {"anonymous": 0}
        is_over = threading.Event()

        def sample() -> None:
            while not is_over.wait(POLL_SECONDS):
                peaks["anonymous"] = max(peaks["anonymous"], self.anonymous_bytes)

        reset_peak_memory(self.process.pid)
        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            yield peaks
        finally:
            is_over.set()
            sampler.join()
            peaks["resident"] = process_memory(self.process.pid, "VmHWM")

    @property
    def anonymous_bytes(self) -> int:
        return process_memory(self.process.pid, "RssAnon")
