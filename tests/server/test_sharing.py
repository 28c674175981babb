"""Answers that many viewers ask for at once are made once, and are never older than what was asked for."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from amalgam.errors import RequestError
from amalgam.runtime.statistics import ExpertStatistics
from amalgam.server import sharing
from amalgam.server.sharing import MAX_ANSWERS, SharedAnswers
from tests.server.conftest import serving, wait_until
from tests.server.fakes import fake_settings
from tests.server.large import LABELS, LargeDeployment, source_of

NUM_VIEWERS = 20


class Kitchen:
    """Makes numbered answers."""

    def __init__(self) -> None:
        self.num_made = 0

    def make(self) -> bytes:
        self.num_made += 1
        return b"%d" % self.num_made


def test_those_who_ask_meanwhile_wait_for_the_same_answer() -> None:
    kitchen, may_end = Kitchen(), threading.Event()

    def make_slowly() -> bytes:
        may_end.wait(60)
        return kitchen.make()

    async def ask() -> list[bytes]:
        answers = SharedAnswers()
        tasks = [asyncio.create_task(answers.get("grid", 5, 7, make_slowly)) for _ in range(NUM_VIEWERS)]
        await asyncio.sleep(0)
        tasks.pop().cancel()  # one that leaves takes nothing from the others
        may_end.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(ask()) == [b"1"] * (NUM_VIEWERS - 1)
    assert kitchen.num_made == 1


def test_an_answer_is_never_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    kitchen = Kitchen()

    async def ask() -> None:
        answers = SharedAnswers()
        assert await answers.get("grid", 7, 7, kitchen.make) == b"1"
        assert await answers.get("grid", 5, 9, kitchen.make) == b"1"  # asked for before the others' answer was made
        assert await answers.get("grid", 8, 9, kitchen.make) == b"2"
        assert await answers.get("grid", 9, 9, kitchen.make) == b"2"
        assert await answers.get("labels", 9, 9, kitchen.make) == b"3"
        assert await answers.get("grid", None, 9, kitchen.make) == b"4"
        answers.forget()
        assert await answers.get("grid", 9, 9, kitchen.make) == b"5"
        monkeypatch.setattr(sharing, "MAX_AGE_SECONDS", -1.0)
        assert await answers.get("grid", 9, 9, kitchen.make) == b"6"

    asyncio.run(ask())


def test_answers_are_bounded_and_errors_reach_all() -> None:
    kitchen = Kitchen()

    def fail() -> bytes:
        raise RequestError("No such label.")

    async def ask() -> None:
        answers = SharedAnswers()
        for key in range(MAX_ANSWERS + 1):
            await answers.get(key, 0, 0, kitchen.make)
        num_made = kitchen.num_made
        assert await answers.get(MAX_ANSWERS, 0, 0, kitchen.make) == b"%d" % num_made
        assert await answers.get(0, 0, 0, kitchen.make) == b"%d" % (num_made + 1)  # the oldest was forgotten
        failures = await asyncio.gather(*(answers.get("x", 0, 0, fail) for _ in range(3)), return_exceptions=True)
        assert [type(failure) for failure in failures] == [RequestError] * 3

    asyncio.run(ask())


def test_viewers_share_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = LargeDeployment()
    num_made = 0
    grid = ExpertStatistics.grid

    def counted_grid(*arguments: Any) -> dict[str, Any]:
        nonlocal num_made
        num_made += 1
        return grid(*arguments)

    monkeypatch.setattr(ExpertStatistics, "grid", counted_grid)
    monkeypatch.setattr(sharing, "MAX_AGE_SECONDS", 600.0)
    with serving(fake_settings(port=0), lambda: deployment) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        tracker = deployment.tracker

        def view(version: int, **query: str) -> bytes:
            response = client.get("/experts/grid", params={"statistics_version": version, **query})
            assert response.status_code == 200
            return response.content

        version = tracker.revision
        assert len({view(version) for _ in range(NUM_VIEWERS)}) == num_made == 1
        assert view(version, label=LABELS[0]) != view(version, label=LABELS[1])
        assert num_made == 3
        deployment.update_weight_mapping({"a": source_of("fp8")})
        view(version)
        assert num_made == 4
        tracker.reset()
        assert b'"total_tokens":1000,' in view(version)  # what it had been told of
        assert b'"total_tokens":0,' in view(tracker.revision)
        assert num_made == 5
        assert client.get("/experts/grid").json()["total_tokens"] == 0
        assert num_made == 6
