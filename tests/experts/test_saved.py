"""Saved sets come back as they were, merge, and refuse what is not theirs; statistics survive a restart."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amalgam.errors import AmalgamError, CheckpointError, ConfigError, RequestError
from amalgam.experts import saved
from amalgam.experts.tracker import ExpertTracker
from tests.experts.routing import LAYER_IDS, START, TOP_K, Clock, make_tracker, route, run_step, run_tokens, span


def busy_tracker(seed: int, clock: Clock | None = None, **settings: Any) -> ExpertTracker:
    tracker, rng = make_tracker(clock or Clock(), pair_sampling=1, **settings), np.random.default_rng(seed)
    for label in ("en", "zh"):
        tracker.admit(0, label, 0)
        tracker.count_request(label)
    run_step(tracker, [span(5, label="en", generated_from=3), span(4, 5, label="zh"), span(1, 9)], route(rng, 10))
    return tracker


def assert_same(first: saved.SavedSet, second: saved.SavedSet) -> None:
    assert (first.layer_ids, first.num_experts, first.start, first.end) == (
        second.layer_ids, second.num_experts, second.start, second.end,
    )  # fmt: skip
    tallies = [(first.total, second.total), *((first.labels[name], second.labels[name]) for name in first.labels)]
    for mine, theirs in tallies:
        np.testing.assert_array_equal(mine.counts, theirs.counts)
        np.testing.assert_allclose(mine.gate_mass, theirs.gate_mass)
        np.testing.assert_array_equal(mine.num_tokens, theirs.num_tokens)
        assert mine.num_requests == theirs.num_requests
    np.testing.assert_array_equal(first.last_activation, second.last_activation)
    assert list(first.labels) == list(second.labels)
    assert first.pairs is not None and second.pairs is not None
    np.testing.assert_array_equal(first.pairs.together, second.pairs.together)
    np.testing.assert_array_equal(first.pairs.onward, second.pairs.onward)


def test_a_set_comes_back_as_it_was(tmp_path: Path) -> None:
    original = busy_tracker(0).saved_set(with_history=True)
    content = saved.to_bytes(original)
    assert_same(saved.from_bytes(content, "it"), original)
    saved.write_file(tmp_path, "a.npz", content)
    assert_same(saved.load_named(tmp_path, "a"), original)
    assert saved.list_names(tmp_path) == ["a"]


def test_merged_sets_are_the_traffic_of_both() -> None:
    first, second = busy_tracker(1).saved_set(), busy_tracker(2).saved_set()
    both = saved.merge([first, second])
    np.testing.assert_array_equal(both.total.counts, first.total.counts + second.total.counts)
    np.testing.assert_array_equal(both.labels["zh"].counts, first.labels["zh"].counts + second.labels["zh"].counts)
    assert both.pairs is not None and both.pairs.num_tokens == 20
    assert first.total.num_tokens.sum() == 10  # the parts are as they were
    other = ExpertTracker((1, 2), 8, 2, make_tracker(Clock()).settings, Clock()).saved_set()
    with pytest.raises(ConfigError, match="holds 2 layers of 8 experts, and this model has 3 of 8"):
        saved.merge([first, other])


def rewritten(content: bytes, **changes: Any) -> bytes:
    """A saved set with some arrays exchanged (None: left out), or keys of its meta."""
    with np.load(io.BytesIO(content)) as arrays:
        members = dict(arrays)
    meta = json.loads(members["meta"].tobytes())
    for name, value in changes.items():
        if name in meta:
            meta[name] = value
        elif value is None:
            del members[name]
        else:
            members[name] = value
    members["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **members)
    return buffer.getvalue()


def pickled() -> bytes:
    class Canary:
        def __reduce__(self) -> Any:
            return (Path("/tmp/amalgam-canary-fired").touch, ())

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        array = io.BytesIO()
        np.lib.format.write_array(array, np.array([Canary()], object), allow_pickle=True)
        archive.writestr("meta.npy", array.getvalue())
    return buffer.getvalue()


DAMAGE = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "no zip": lambda content: b"x" * 1000,
    "a pickle": lambda content: pickle.dumps({"a": 1}),
    "an array of objects": lambda content: pickled(),
    "no counts": lambda content: rewritten(content, counts=None),
    "counts of another shape": lambda content: rewritten(content, counts=np.zeros((2, 3, 9), np.int64)),
    "counts below zero": lambda content: rewritten(content, counts=np.full((2, 3, 8), -1)),
    "counts as text": lambda content: rewritten(content, counts=np.full((2, 3, 8), "a")),
    "infinite mass": lambda content: rewritten(content, gate_mass=np.full((2, 3, 8), np.inf)),
    "another version": lambda content: rewritten(content, version=99),
    "impossible sizes": lambda content: rewritten(content, num_experts=-8),
    "sizes of 2^40": lambda content: rewritten(content, num_experts=2**40),
    "labels that are none": lambda content: rewritten(content, labels=[1, 2]),
    "too many labels": lambda content: rewritten(content, labels=["a", "b", "c"]),
    "times that run back": lambda content: rewritten(content, end=0),
    "no time": lambda content: rewritten(content, start=float("nan")),
    "no meta": lambda content: rewritten(content, last_activation=np.zeros((1, 1))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_set_is_refused(case: str) -> None:
    content = DAMAGE[case](saved.to_bytes(busy_tracker(0).saved_set()))
    with pytest.raises(CheckpointError, match="the file is not a saved set"):
        saved.from_bytes(content, "the file")
    assert not Path("/tmp/amalgam-canary-fired").exists()


def test_a_set_that_unpacks_to_too_much_is_refused_before_it_does() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("meta.npy", b"\0" * 50_000_000)
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(CheckpointError, match="too many bytes"):
        saved.from_bytes(buffer.getvalue(), "it")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "", ".", "..", ".x", "a\n", "a\0", "<b>", "a" * 300])
def test_names_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="name is"):
        saved.load_named(tmp_path, name)


def test_a_link_is_no_saved_set(tmp_path: Path) -> None:
    outside = tmp_path / "outside.npz"
    outside.write_bytes(saved.to_bytes(busy_tracker(0).saved_set()))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.npz").symlink_to(outside)
    assert saved.list_names(folder) == []
    with pytest.raises(RequestError, match="There is no saved set 'a'"):
        saved.load_named(folder, "a")


def test_statistics_survive_a_restart(tmp_path: Path) -> None:
    path, clock = tmp_path / "kept" / "statistics.npz", Clock()
    first = busy_tracker(0, clock)
    first.keep_in(path)
    clock.now += 30
    run_tokens(first, 3)
    first.close()
    clock.now += 60
    second = make_tracker(clock, pair_sampling=1)
    second.keep_in(path)
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
    third.keep_in(path)
    assert third.snapshot().tally.num_tokens.sum() == 15
    assert third.layer_pairs(1).num_tokens == 15
    third.close()


def test_a_file_of_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    for content in (saved.to_bytes(ExpertTracker((1, 2), 8, 2, make_tracker(Clock()).settings).saved_set()), b"junk"):
        path.write_bytes(content)
        with pytest.raises(AmalgamError):
            make_tracker(Clock()).keep_in(path)
        assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_to_does_not_stop_the_traffic(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tracker = make_tracker(Clock())
    tracker.keep_in(tmp_path / "file" / "statistics.npz")
    run_tokens(tracker, 1)
    tracker.close()
    assert tracker.snapshot().tally.num_tokens.sum() == 1
