"""Saved sets come back as they were, merge, and refuse what is not theirs; statistics survive a restart."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amalgam.errors import AmalgamError, CheckpointError, ConfigError, ConflictError, RequestError
from amalgam.experts import saved
from amalgam.experts.tracker import ExpertTracker
from tests.errors import raises
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
    other = ExpertTracker((1, 2), 8, 2, make_tracker(Clock()).settings, Clock().system).saved_set()
    with raises(ConfigError, "2 layers of 8", "3 of 8"):
        saved.merge([first, other])


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def array(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def rewritten(content: bytes, **changes: Any) -> bytes:
    """A saved set with some arrays exchanged (None: left out), or keys of its meta."""
    files = members(content)
    meta = json.loads(np.load(io.BytesIO(files["meta.npy"])).tobytes())
    for name, value in changes.items():
        if name in meta:
            meta[name] = value
        elif value is None:
            del files[f"{name}.npy"]
        else:
            files[f"{name}.npy"] = value if isinstance(value, bytes) else array(value)
    if "meta" not in changes:
        files["meta.npy"] = array(np.frombuffer(json.dumps(meta).encode(), np.uint8))
    return zipped(files)


def npy(shape: str, descr: str = "'<i8'", data: bytes = b"") -> bytes:
    """A `.npy` file whose header claims `shape`."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + data


def in_directory(content: bytes, offset: int, value: bytes) -> bytes:
    """A zip file with a field of every entry of its directory exchanged."""
    data, place = bytearray(content), content.find(b"PK\x01\x02")
    while place >= 0:
        data[place + offset : place + offset + len(value)] = value
        place = content.find(b"PK\x01\x02", place + 4)
    return bytes(data)


def garbled(content: bytes) -> bytes:
    data = bytearray(content)
    for place in range(100, len(data) // 2, 37):
        data[place] ^= 0xFF
    return bytes(data)


class Canary:
    def __reduce__(self) -> Any:
        return (Path("/tmp/amalgam-canary-fired").touch, ())


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Canary()], object), allow_pickle=True)
    return buffer.getvalue()


def twice(content: bytes) -> bytes:
    buffer = io.BytesIO(content)
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("counts.npy", members(content)["gate_mass.npy"])
    return buffer.getvalue()


GRID = (2, 3, 8)
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "no counts": ({"counts": None}, "it has no counts"),
    "no requests of labels": ({"label_num_requests": None}, "it has no label_num_requests"),
    "counts of another shape": ({"counts": np.zeros((2, 3, 9), np.int64)}, r"counts has shape \(2, 3, 9\)"),
    "counts below zero": ({"counts": np.full(GRID, -1)}, "counts is below zero"),
    "counts that are no numbers": ({"counts": np.full(GRID, np.nan)}, "counts has .* type float64"),
    "counts near 2^63": ({"counts": np.full(GRID, 2**63 - 1)}, "absurdly large"),
    "counts near 2^64": ({"counts": np.full(GRID, 2**64 - 1, np.uint64)}, "absurdly large"),
    "counts that are not those of the tokens": ({"counts": np.full(GRID, 5)}, "not tokens × active experts"),
    "counts as text": ({"counts": np.full(GRID, "a")}, "counts is no plain array"),
    "infinite mass": ({"gate_mass": np.full(GRID, np.inf)}, "gate_mass is below zero, absurdly large"),
    "mass that is no number": ({"gate_mass": np.full(GRID, np.nan)}, "gate_mass is .* no number"),
    "mass of 1e308": ({"gate_mass": np.full(GRID, 1e308)}, "gate_mass is .* absurdly large"),
    "tokens below zero": ({"num_tokens": np.full(2, -5)}, "num_tokens is below zero"),
    "tokens that are no numbers": ({"num_tokens": np.full(2, np.nan)}, "num_tokens has .* float64"),
    "requests below zero": ({"num_requests": np.array(-1)}, "num_requests is below zero"),
    "infinite last activation": ({"last_activation": np.full(GRID[1:], np.inf)}, "impossible time"),
    "last activation of another shape": ({"last_activation": np.zeros((1, 1))}, "last_activation has shape"),
    "pairs below zero": ({"together": np.full((3, 8, 8), -1)}, "together has pairs below zero"),
    "more pairs than tokens": ({"onward": np.full((2, 8, 8), 99)}, "onward has .* more than sampled"),
    "more sampled tokens than tokens": ({"pair_tokens": np.array(11)}, "pair_tokens is 11, of 10"),
    "pairs without their number": ({"pair_tokens": None}, "it has no pair_tokens"),
    "ticks that run back": ({"bucket_ticks": np.array([[7, 7]])}, "bucket_ticks is no row"),
    "ticks below zero": ({"bucket_ticks": np.array([[-9, -8]])}, "bucket_ticks is no row"),
    "ticks without their tallies": ({"bucket_ticks": np.array([[1, 2], [2, 3]])}, "bucket_counts has shape"),
    "ticks that claim 10^17 rows": ({"bucket_ticks": npy(f"({10**17}, 2)")}, "bucket_ticks is cut off"),
    "ticks without rows": ({"bucket_ticks": np.array(5)}, "IndexError"),
    "a shape of 2^50": ({"counts": npy(f"({2**50},)")}, "counts has shape"),
    "a shape of 10^30": ({"counts": npy(f"({10**30},)")}, "counts is no plain array"),
    "a shape below zero": ({"counts": npy("(-5,)")}, "counts is no plain array"),
    "a shape that nests": ({"counts": npy("(" * 300 + "1" + ")" * 300)}, "counts is no plain array"),
    "a header that does not end": ({"counts": npy("(2, '''")}, "counts is no plain array"),
    "a type of a gigabyte": ({"counts": npy("(10,)", "'V1000000000'")}, "counts is no plain array"),
    "a type of objects": ({"counts": pickled()}, "counts is no plain array"),
    "a member that is no array": ({"counts": b"x" * 100}, "counts is no plain array"),
    "an empty member": ({"counts": b""}, "counts is no plain array"),
    "an array that is cut off": ({"counts": npy("(2, 3, 8)", data=b"\0" * 100)}, "counts is cut off"),
    "an array that goes on": ({"counts": npy("(2, 3, 8)", data=b"\0" * 999)}, "more or fewer bytes"),
    "no meta": ({"meta": None}, "it has no meta"),
    "a meta that is no JSON": ({"meta": np.frombuffer(b"{nope", np.uint8)}, "JSONDecodeError"),
    "a meta that is a list": ({"meta": np.frombuffer(b"[]", np.uint8)}, "version"),
    "a meta that nests": ({"meta": np.frombuffer(b"[" * 100_000, np.uint8)}, "nested too deeply"),
    "another version": ({"version": 99}, "its version is unknown"),
    "sizes below zero": ({"num_experts": -8}, "num_experts has -8"),
    "sizes of 2^40": ({"num_experts": 2**40}, "num_experts has 1099511627776"),
    "layers twice": ({"layer_ids": [1, 1, 2]}, "layer_ids is"),
    "layers that are none": ({"layer_ids": [1, True, 4]}, "layer_ids has True"),
    "a million layers": ({"layer_ids": list(range(1_000_000))}, "meta takes"),
    "more active experts than there are": ({"num_active_experts": 2**30}, "num_active_experts has"),
    "another model's active experts": ({"num_active_experts": 3}, "not tokens × active experts"),
    "a model that steers the terminal": ({"model": "\x1b]0;x\x07"}, "model is"),
    "a model that is none": ({"model": ["a"]}, "model is"),
    "labels that are none": ({"labels": [1, 2]}, "domain is 1"),
    "labels that steer the terminal": ({"labels": ["en", "\x1b[31m"]}, "domain is .*x1b"),
    "labels with half a character": ({"labels": ["en", "\ud800"]}, "ud800"),
    "labels of too many characters": ({"labels": ["en", "z" * 65]}, "domain is 'zzz"),
    "a label twice": ({"labels": ["en", "en"]}, "a label is there twice"),
    "too many labels": ({"labels": ["a", "b", "c"]}, "label_counts has shape"),
    "labels in no list": ({"labels": "en"}, "labels is 'en'"),
    "times that run back": ({"end": 0}, "before its start"),
    "no time": ({"start": float("nan")}, "NaN is not a JSON number"),
    "a time long before the universe": ({"start": -1e300}, r"start is -1e\+300"),
    "a time that no float holds": ({"start": 10**400}, "start is 1000"),
    "a time long after the sun": ({"end": 1e18}, r"end is 1e\+18"),
    "ticks without length": ({"tick_seconds": 0}, "tick_seconds is 0"),
    "ticks of no number": ({"tick_seconds": float("nan")}, "NaN is not a JSON number"),
    "a time as text": ({"start": "now"}, "start is 'now'"),
}
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "BadZipFile"),
    "cut off": (lambda content: content[: len(content) // 2], "BadZipFile"),
    "no zip": (lambda content: b"x" * 1000, "BadZipFile"),
    "a pickle": (lambda content: pickle.dumps({"a": Canary()}), "BadZipFile"),
    "garbled": (garbled, ""),
    "encrypted": (lambda content: in_directory(content, 8, b"\x01\x00"), "encrypted"),
    "compressed by an unknown method": (lambda content: in_directory(content, 10, b"\x63\x00"), "uncommon way"),
    "compressed as bzip2": (lambda content: zipped(members(content), zipfile.ZIP_BZIP2), "uncommon way"),
    "compressed as LZMA": (lambda content: garbled(zipped(members(content), zipfile.ZIP_LZMA)), "uncommon way"),
    "a member twice": (twice, "'counts.npy' twice"),
    "members that claim 2 GiB each": (
        lambda content: in_directory(content, 24, b"\xff\xff\xff\x7f"),
        "unpacks to more than",
    ),
    "a meta of 50 MB": (
        lambda content: rewritten(content, meta=npy("(50000000,)", "'|u1'", b"\0" * 50_000_000)),
        "meta takes 50000000 bytes",
    ),
    "counts of 50 MB": (
        lambda content: rewritten(content, counts=npy("(6250000,)", data=b"\0" * 50_000_000)),
        "counts has shape",
    ),
}


@pytest.mark.parametrize("case", [*CHANGES, *DAMAGE])
def test_a_malformed_set_is_refused_by_name_and_takes_no_memory(case: str) -> None:
    content = zipped(members(saved.to_bytes(busy_tracker(0).saved_set(with_history=True))))
    if case in CHANGES:
        changes, message = CHANGES[case]
        content = rewritten(content, **changes)
    else:
        damage, message = DAMAGE[case]
        content = damage(content)
    tracemalloc.start()
    try:
        with raises(CheckpointError, "the file") as caught:
            saved.from_bytes(content, "the file")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert re.search(message, str(caught.value))
    assert peak < 2**21
    assert not Path("/tmp/amalgam-canary-fired").exists()


def test_a_set_with_flipped_bytes_is_refused_or_still_a_set() -> None:
    rng = np.random.default_rng(0)
    content = saved.to_bytes(busy_tracker(0).saved_set())
    for _ in range(500):
        data = bytearray(content)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        with contextlib.suppress(CheckpointError):
            saved.to_bytes(saved.from_bytes(bytes(data), "it"))


def test_other_active_experts_are_another_model_s() -> None:
    settings = make_tracker(Clock()).settings
    first, other = (ExpertTracker(LAYER_IDS, 8, top_k, settings, Clock().system) for top_k in (TOP_K, 3))
    with raises(ConfigError, 3, 2):
        first.restore(other.saved_set(), "It")
    with raises(ConfigError, 3, 2):
        saved.merge([first.saved_set(), other.saved_set()])


def test_a_model_s_name_is_written_printable() -> None:
    settings = make_tracker(Clock()).settings
    tracker = ExpertTracker(LAYER_IDS, 8, TOP_K, settings, Clock().system, model="a\n\udcff明")
    assert saved.from_bytes(saved.to_bytes(tracker.saved_set()), "it").model == "a\ufffd\ufffd明"


@pytest.mark.parametrize(
    "name",
    ["../a", "/etc/passwd", "a/b", "", ".", "..", ".x", "a\n", "a\0", "<b>", "a" * 201, ".npz", "a.npz.npz", None],
)
def test_names_stay_in_their_folder(tmp_path: Path, name: Any) -> None:
    with raises(RequestError, "name"):
        saved.load_named(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a.b", "npz", "x.npz", "a" * 196, "a" * 197, "a" * 200])
def test_a_set_is_found_under_the_name_it_was_saved_by(tmp_path: Path, name: str) -> None:
    path = saved.named_path(tmp_path, name)
    saved.write_file(tmp_path, path.name, saved.to_bytes(busy_tracker(0).saved_set()))
    (tmp_path / "x.npz.npz").write_bytes(b"of somebody else")  # no name leads to it
    assert saved.list_names(tmp_path) == [name.removesuffix(".npz")]
    assert saved.load_named(tmp_path, saved.list_names(tmp_path)[0]).total.num_tokens.sum() == 10


def test_a_link_is_no_saved_set(tmp_path: Path) -> None:
    outside = tmp_path / "outside.npz"
    outside.write_bytes(saved.to_bytes(busy_tracker(0).saved_set()))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.npz").symlink_to(outside)
    assert saved.list_names(folder) == []
    with raises(RequestError, "a"):
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


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5, 5.0, 7.0, 10.0, 60.0, 3600.0])
def test_windows_survive_another_bucket_length(tmp_path: Path, seconds: float) -> None:
    path, clock = tmp_path / "statistics.npz", Clock()
    first = make_tracker(clock)
    first.keep_in(path)
    for _ in range(300):  # half an hour, a token every six seconds
        run_tokens(first, 1)
        clock.now += 6
    run_tokens(first, 1)
    first.close()
    second = make_tracker(clock, bucket_seconds=seconds)
    second.keep_in(path)
    assert second.snapshot(60).tally.num_tokens.sum() == 301
    run_tokens(second, 1)
    for minutes in (1, 5, 20):  # a window begins early by a bucket of either run, and by a twenty-fourth
        expected, slack = minutes * 10 + 2, (max(seconds, 5) + 5 + minutes * 60 / 24) / 6 + 1
        assert -1 <= second.snapshot(minutes).tally.num_tokens.sum() - expected <= slack
    second.close()
    third = make_tracker(clock)
    third.keep_in(path)
    assert third.snapshot(60).tally.num_tokens.sum() == 302
    assert third.snapshot(60).tally.counts.sum() == 302 * TOP_K * len(LAYER_IDS)
    third.close()


def test_a_restart_within_a_tick_loses_nothing(tmp_path: Path) -> None:
    path, clock = tmp_path / "statistics.npz", Clock()
    for total in (1, 2, 3):
        tracker = make_tracker(clock)
        tracker.keep_in(path)
        run_tokens(tracker, 1)
        assert tracker.snapshot(1).tally.num_tokens.sum() == total
        tracker.close()


def test_a_file_that_does_not_name_its_ticks_is_read_with_the_former_default(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    content = saved.to_bytes(busy_tracker(0, clock).saved_set(with_history=True))
    tracker = make_tracker(clock, bucket_seconds=10)
    tracker.restore(saved.from_bytes(rewritten(content, tick_seconds=None), "it"), "The file")
    assert tracker.snapshot(1).tally.num_tokens.sum() == 10
    assert "The file does not say its statistics.bucket_seconds" in caplog.text


def test_labels_that_find_no_room_are_named(caplog: pytest.LogCaptureFixture) -> None:
    tracker = make_tracker(Clock(), max_labels=1)
    tracker.restore(busy_tracker(0).saved_set(), "The file")
    assert list(tracker.snapshot().labels) == ["en"]
    assert "The file has 2 labels, and statistics.max_labels is 1: the last 1 of them are dropped" in caplog.text


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


def test_two_processes_do_not_keep_their_statistics_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    first, second = make_tracker(Clock()), make_tracker(Clock())
    first.keep_in(path)
    with pytest.raises(ConflictError) as error:
        second.keep_in(path)
    assert str(path) in str(error.value) and "statistics.file" in str(error.value)
    run_tokens(first, 3)
    first.close()
    first.close()
    second.keep_in(path)
    assert second.snapshot().tally.num_tokens.sum() == 3
    second.close()
    assert {item.name for item in tmp_path.iterdir()} == {"statistics.npz"}


def test_a_file_that_is_refused_stays_free_for_others(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    path.write_bytes(b"junk")
    with pytest.raises(AmalgamError):
        make_tracker(Clock()).keep_in(path)
    path.unlink()
    tracker = make_tracker(Clock())
    tracker.keep_in(path)
    tracker.close()
