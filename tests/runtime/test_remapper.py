"""Changes of the weights whose followers fail, over a book of versions and an engine that only counts."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from amalgam.config.settings import build_settings
from amalgam.runtime.changes import ChangeRequest, RemapLog, RemapRecord
from amalgam.runtime.jobs import Jobs, JobState
from amalgam.runtime.remapper import Remapper
from tests.runtime.test_versions import Stand

FOLLOWERS = ("log", "trials", "draft")


class Followers:
    """What hears of a change once it is live; the one called `broken` raises."""

    def __init__(self) -> None:
        self.broken = ""
        self.told: list[str] = []

    def write(self, record: RemapRecord) -> None:
        if record.rules is not None:
            self.hear("log")

    def current_changed(self, version_id: int) -> None:
        self.hear("trials")

    def follow(self, *arguments: Any) -> None:
        self.hear("draft")

    def hear(self, who: str) -> None:
        self.told.append(who)
        if who == self.broken:
            raise ValueError(f"{who} is broken")


@pytest.fixture
def stand() -> Iterator[Stand]:
    """With version 2 named beside the current one."""
    stand = Stand()
    stand.book.name("kept", stand.made(2))
    yield stand
    stand.book.close()


@pytest.fixture
def followers() -> Followers:
    return Followers()


@pytest.fixture
def jobs(stand: Stand) -> Jobs:
    return Jobs(lambda: stand.book.current.version_id)


@pytest.fixture
def remapper(stand: Stand, followers: Followers, jobs: Jobs) -> Remapper:
    loaded: Any = SimpleNamespace(seconds=0.0, read_bytes=0)
    engine: Any = stand.engine
    speculation: Any = followers
    settings, log = build_settings({"model": {"base_path": "unused"}}), RemapLog((), followers.write)
    remapper = Remapper(settings, stand.book, engine, jobs, log, speculation, loaded)
    remapper.on_live = followers.current_changed
    return remapper


@pytest.mark.parametrize("broken", FOLLOWERS)
def test_a_change_that_is_live_is_done_whatever_follows_it(
    stand: Stand,
    remapper: Remapper,
    followers: Followers,
    jobs: Jobs,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    followers.broken = broken
    result = remapper.change(ChangeRequest(version=2))
    assert (result.version, stand.book.current.version_id, stand.engine.current) == (2, 2, 2)
    assert tuple(followers.told) == FOLLOWERS
    [status] = jobs.read()
    assert (status.state, status.version, status.error) == (JobState.DONE, 2, None)
    assert f"{broken} is broken" in caplog.text
    assert remapper.rollback().version == 1  # what was in use before is known


def test_a_name_that_is_given_stays_given(stand: Stand, remapper: Remapper, followers: Followers, jobs: Jobs) -> None:
    followers.broken = "log"
    assert remapper.change(ChangeRequest(version=2, name="other")).name == "other"
    assert stand.book.find("other").version_id == 2 and jobs.read()[0].state is JobState.DONE


@pytest.mark.parametrize("broken", ["log", "draft"])
def test_what_follows_a_version_that_was_left_does_so_without_the_others(
    stand: Stand, remapper: Remapper, followers: Followers, jobs: Jobs, broken: str
) -> None:
    followers.broken = broken
    remapper.follow_back(9, "It computed NaN.")
    assert followers.told == ["log", "draft"]


def test_an_error_is_the_one_of_the_change_and_not_of_its_log(
    stand: Stand, remapper: Remapper, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise MemoryError("of the change")

    def fail_to_log(*arguments: Any) -> None:
        raise ValueError("of the log")

    monkeypatch.setattr(stand.engine, "prepare", fail)
    monkeypatch.setattr(RemapLog, "add_failure", fail_to_log)
    with pytest.raises(MemoryError):
        remapper.change(ChangeRequest(version=2))
    [status] = jobs.read()
    assert (status.state, status.version, status.error) == (JobState.FAILED, 1, "of the change")
