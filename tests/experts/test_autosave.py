"""Statistics survive a restart, whatever has changed meanwhile."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amalgam.errors import AmalgamError, ConfigError, ConflictError
from amalgam.experts.autosave import Autosave
from amalgam.experts.saved.files import load, to_bytes
from amalgam.experts.saved.sets import SavedSet
from amalgam.experts.tracker import ExpertTracker
from tests.errors import raises
from tests.experts.routing import LAYER_IDS, START, TOP_K, Clock, busy_tracker, make_tracker, run_tokens


@pytest.mark.parametrize("name", ["statistics.npz", "statistics.safetensors"])
def test_statistics_survive_a_restart(tmp_path: Path, name: str) -> None:
    path, clock = tmp_path / "kept" / name, Clock()
    first = busy_tracker(0, clock)
    first.autosave_to(path)
    clock.now += 30
    run_tokens(first, 3)
    first.close()
    clock.now += 60
    second = make_tracker(clock, pair_sampling=1)
    second.autosave_to(path)
    before, after = first.saved_set(), second.saved_set()
    np.testing.assert_array_equal(after.total.counts, before.total.counts)
    assert (after.start, after.labels.keys()) == (START, before.labels.keys())
    run_tokens(second, 2)
    snapshot = second.snapshot()
    assert snapshot.tally.num_tokens.sum() == 15
    assert snapshot.tally.counts.sum() == 15 * TOP_K * len(LAYER_IDS)
    assert snapshot.started_at == START + 90
    # The window reaches back behind the restart, but not to the first tokens.
    assert second.snapshot(minutes=1.2).tally.num_tokens.sum() == 5
    assert second.snapshot(minutes=60).tally.num_tokens.sum() == 15
    second.close()
    third = make_tracker(clock, pair_sampling=1)
    third.autosave_to(path)
    assert third.snapshot().tally.num_tokens.sum() == 15
    assert third.layer_pairs(1).num_tokens == 15
    third.close()


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5, 5.0, 7.0, 10.0, 60.0, 3600.0])
def test_windows_survive_another_bucket_length(tmp_path: Path, seconds: float) -> None:
    path, clock = tmp_path / "statistics.npz", Clock()
    first = make_tracker(clock)
    first.autosave_to(path)
    for _ in range(300):  # half an hour, a token every six seconds
        run_tokens(first, 1)
        clock.now += 6
    run_tokens(first, 1)
    first.close()
    second = make_tracker(clock, bucket_seconds=seconds)
    second.autosave_to(path)
    assert second.snapshot(60).tally.num_tokens.sum() == 301
    run_tokens(second, 1)
    for minutes in (1, 5, 20):  # a window begins early by a bucket of either run, and by a twenty-fourth
        expected, slack = minutes * 10 + 2, (max(seconds, 5) + 5 + minutes * 60 / 24) / 6 + 1
        assert -1 <= second.snapshot(minutes).tally.num_tokens.sum() - expected <= slack
    second.close()
    third = make_tracker(clock)
    third.autosave_to(path)
    assert third.snapshot(60).tally.num_tokens.sum() == 302
    assert third.snapshot(60).tally.counts.sum() == 302 * TOP_K * len(LAYER_IDS)
    third.close()


def test_a_restart_within_a_tick_loses_nothing(tmp_path: Path) -> None:
    path, clock = tmp_path / "statistics.npz", Clock()
    for total in (1, 2, 3):
        tracker = make_tracker(clock)
        tracker.autosave_to(path)
        run_tokens(tracker, 1)
        assert tracker.snapshot(1).tally.num_tokens.sum() == total
        tracker.close()


def test_a_file_that_does_not_name_its_ticks_is_read_with_the_former_default(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    saved = busy_tracker(0, clock).saved_set(with_history=True)
    tracker = make_tracker(clock, bucket_seconds=10)
    tracker.restore(replace(saved, tick_seconds=None), "The file")
    assert tracker.snapshot(1).tally.num_tokens.sum() == 10
    assert "The file does not say its statistics.bucket_seconds" in caplog.text


def test_labels_that_find_no_room_are_named(caplog: pytest.LogCaptureFixture) -> None:
    tracker = make_tracker(Clock(), max_labels=1)
    tracker.restore(busy_tracker(0).saved_set(), "The file")
    assert list(tracker.snapshot().labels) == ["en"]
    assert "The file has 2 labels, and statistics.max_labels is 1: the last 1 of them are dropped" in caplog.text


def test_a_file_of_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    for content in (to_bytes(ExpertTracker((1, 2), 8, 2, make_tracker(Clock()).settings).saved_set()), b"junk"):
        path.write_bytes(content)
        with pytest.raises(AmalgamError):
            make_tracker(Clock()).autosave_to(path)
        assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_to_does_not_stop_the_traffic(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tracker = make_tracker(Clock())
    tracker.autosave_to(tmp_path / "file" / "statistics.npz")
    run_tokens(tracker, 1)
    tracker.close()
    assert tracker.snapshot().tally.num_tokens.sum() == 1


def test_two_processes_do_not_keep_their_statistics_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    first, second = make_tracker(Clock()), make_tracker(Clock())
    first.autosave_to(path)
    with raises(ConflictError, path, "statistics.file"):
        second.autosave_to(path)
    run_tokens(first, 3)
    first.close()
    first.close()
    second.autosave_to(path)
    assert second.snapshot().tally.num_tokens.sum() == 3
    second.close()
    assert {item.name for item in tmp_path.iterdir()} == {"statistics.npz"}


def test_a_file_that_is_refused_stays_free_for_others(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    path.write_bytes(b"junk")
    with pytest.raises(AmalgamError):
        make_tracker(Clock()).autosave_to(path)
    path.unlink()
    tracker = make_tracker(Clock())
    tracker.autosave_to(path)
    tracker.close()


class Failing:
    """Counts that cannot be read the first times."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors
        self.tracker = busy_tracker(0, Clock())
        self.has_failed = threading.Event()

    def saved_set(self, *, with_history: bool) -> SavedSet:
        if self.errors:
            raise self.errors.pop()
        self.has_failed.set()
        return self.tracker.saved_set(with_history=with_history)

    def restore(self, saved: SavedSet, where: str) -> None:
        raise AssertionError("there is nothing to restore")


def test_a_save_that_fails_is_followed_by_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "statistics.npz"
    failing = Failing([OSError("No space"), MemoryError("too little memory"), ConfigError("It does not fit.")])
    autosave = Autosave(failing, path, 1e-3)
    assert failing.has_failed.wait(60)
    autosave.close()
    assert load(path).total.num_tokens.tolist() == failing.tracker.saved_set().total.num_tokens.tolist()
    for reason in ("No space", "too little memory", "It does not fit."):
        assert reason in caplog.text
