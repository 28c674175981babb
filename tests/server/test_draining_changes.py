"""A server that ends while its weights change: what a client waits for is done, all else is given up."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from amalgam.config.placement import Rule
from amalgam.runtime.changes import RemapRecord
from amalgam.runtime.history import HistoryFile
from amalgam.runtime.jobs import status_of_record
from tests.cli.verb import run_verb
from tests.conftest import DEMO
from tests.server.conftest import wait_until
from tests.server.fakes import tell_url, url_told
from tests.server.test_lifecycle import is_ready

UP = "model.layers.1.mlp.experts.2.up_proj.weight"
MAPPING = {"weight_mapping": {UP: "other"}}


def serve_held(log: Path, config: Path, released: Connection, *, waits: bool) -> None:
    """A server of the demo whose changes stop at the first weight until a message comes.

    Args:
        waits: a drained server stays until then, too.
    """
    from amalgam.runtime import remapper
    from amalgam.server.http import lifecycle

    is_released = threading.Event()

    class HeldTurns(remapper.Turns):
        def __call__(self) -> Any:
            while not is_released.wait(0.01):
                self._check()
            return super().__call__()

    def release() -> None:
        released.recv()
        lifecycle.MIN_DRAIN_SECONDS = 0.0
        is_released.set()

    tell_url(released)
    remapper.Turns = HeldTurns  # type: ignore[misc]
    lifecycle.MIN_DRAIN_SECONDS = float("inf") if waits else 0.0
    threading.Thread(target=release, daemon=True).start()
    run_verb(log, ("serve", "--config", str(config)))


@dataclass(frozen=True)
class Stand:
    """A server that has begun a change."""

    url: str
    process: Any
    history: Path
    log: Path
    let_go: Connection

    def end(self) -> tuple[int, list[RemapRecord], tuple[Rule, ...] | None]:
        """The exit code; what a restart knows of the changes, and its rules."""
        self.process.join(60)
        history = HistoryFile(self.history)
        history.close()
        return self.process.exitcode, [record for record in history.records if not record.is_start], history.last_rules

    def signal(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo once more, as another source."""
    return Path(shutil.copytree(DEMO, tmp_path_factory.mktemp("sources") / "other"))


@pytest.fixture
def stand(context: ForkServerContext, tmp_path: Path, other: Path, request: pytest.FixtureRequest) -> Iterator[Stand]:
    history = tmp_path / "history.jsonl"
    content = {
        "model": {"base_path": str(DEMO), "mixed_precision": {"other_path": str(other)}},
        "inference": {"max_seq_length": 64},
        "weights": {"history": str(history), "resume": True},
        "server": {"port": 0, "drain_seconds": request.param},
    }
    config, log = tmp_path / "config.yaml", tmp_path / "log"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    released, let_go = context.Pipe()
    process = context.Process(target=serve_held, args=(log, config, released), kwargs={"waits": request.param > 1})
    process.start()
    try:
        stand = Stand(url_told(let_go), process, history, log, let_go)
        wait_until(lambda: is_ready(stand.url))
        yield stand
    finally:
        process.kill()
        process.join()


def is_changing(url: str) -> bool:
    return httpx.get(url + "/weights/changes", timeout=60).json()["running"] is not None


@pytest.mark.parametrize("stand", [600], indirect=True)
def test_a_change_that_nobody_waits_for_ends_with_the_server(stand: Stand) -> None:
    started = httpx.post(stand.url + "/weights/changes", json=MAPPING, timeout=60)
    assert started.status_code == 202
    place = f"{stand.url}/{started.headers['location']}"
    assert httpx.get(place, timeout=60).json()["state"] == "running"
    stand.signal()
    wait_until(lambda: httpx.get(place, timeout=60).json()["state"] != "running")
    told = httpx.get(place, timeout=60).json()
    assert (told["state"], told["version"], told["num_changed"]) == ("cancelled", 1, 0)
    for path in ("/update_weight_mapping", "/weights/changes"):
        refused = httpx.post(stand.url + path, json=MAPPING, timeout=60)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable")
        assert "retry-after" in refused.headers
    assert httpx.get(stand.url + "/weights", timeout=60).json()["current"] == 1
    stand.let_go.send(None)
    code, [record], rules = stand.end()
    assert (code, rules) == (0, ())
    assert (status_of_record(record).id, status_of_record(record).state) == (told["id"], "cancelled")


@pytest.mark.parametrize("stand", [600, 1], indirect=True)
def test_a_change_that_a_client_waits_for_has_the_time_of_a_request(stand: Stand, request: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, stand.url + "/update_weight_mapping", json=MAPPING, timeout=60)
        wait_until(lambda: is_changing(stand.url))
        stand.signal()
        has_time = request.node.callspec.params["stand"] > 1
        if has_time:
            wait_until(lambda: not is_ready(stand.url))
            assert not answer.done()
            stand.let_go.send(None)
        assert answer.result().status_code == (200 if has_time else 503)
    code, [record], rules = stand.end()
    assert code == 0
    assert (record.error is None, record.version) == (has_time, 2 if has_time else 1)
    assert rules == ((Rule(pattern=UP, source="other"),) if has_time else ())
