"""Saved sets come back from files of both kinds as they were; damaged and hostile ones are refused by name."""

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
import safetensors.numpy

from amalgam.errors import CheckpointError
from amalgam.experts.saved.files import from_bytes, load, save, to_bytes, to_npz
from amalgam.experts.saved.sets import SavedSet
from amalgam.experts.tracker import ExpertTracker
from tests.errors import raises
from tests.experts.routing import LAYER_IDS, TOP_K, Clock, busy_tracker, make_tracker


def assert_same(first: SavedSet, second: SavedSet) -> None:
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


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ""])
@pytest.mark.parametrize("with_history", [True, False])
def test_a_set_comes_back_as_it_was(tmp_path: Path, ending: str, with_history: bool) -> None:
    original = busy_tracker(0).saved_set(with_history=with_history)
    path = tmp_path / f"a{ending}"
    save(original, path)
    assert path.read_bytes().startswith(b"PK") == (ending == ".npz")
    assert_same(load(path), original)
    renamed = path.rename(tmp_path / "renamed.npz")  # what it is, is told by its content
    assert_same(load(renamed), original)


def test_other_programs_read_both_kinds(tmp_path: Path) -> None:
    original = busy_tracker(0).saved_set()
    save(original, tmp_path / "a.npz")
    save(original, tmp_path / "a.safetensors")
    with np.load(tmp_path / "a.npz") as zipped_arrays:
        arrays = safetensors.numpy.load_file(tmp_path / "a.safetensors")
        assert {"meta", *arrays} == set(zipped_arrays)
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, zipped_arrays[name])
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["meta"])["labels"] == ["en", "zh"]


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


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def rewritten_tensors(content: bytes, **changes: Any) -> bytes:
    """As `rewritten`, a safetensors file."""
    arrays = safetensors.numpy.load(content)
    meta = json.loads(parts(content)[0]["__metadata__"]["meta"])
    for name, value in changes.items():
        if name in meta:
            meta[name] = value
        elif name == "meta":
            continue
        elif value is None:
            del arrays[name]
        else:
            arrays[name] = np.asarray(value)
    text = json.dumps(meta)
    if "meta" in changes:
        text = changes["meta"].tobytes().decode()
    return safetensors.numpy.save(arrays, {"meta": text})


def is_of_npz_only(value: Any) -> bool:
    """Whether no safetensors file can hold such a thing, or needs a case of its own for it."""
    return isinstance(value, bytes) or value is None or (isinstance(value, np.ndarray) and value.dtype.kind == "U")


def with_header(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    """A safetensors file with another header."""

    def damage(content: bytes) -> bytes:
        start = 8 + int.from_bytes(content[:8], "little")
        header = change(content[8:start].decode()).encode()
        assert header != content[8:start]
        return len(header).to_bytes(8, "little") + header + content[start:]

    return damage


def overlapping(header: str) -> str:
    tensors = json.loads(header)
    tensors["label_gate_mass"]["data_offsets"] = [8, 8 + 2 * 2 * 3 * 8 * 8]
    return json.dumps(tensors)


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
    "sizes below zero": ({"num_experts": -8}, "num_experts = -8"),
    "sizes of 2^40": ({"num_experts": 2**40}, "num_experts = 1099511627776"),
    "layers twice": ({"layer_ids": [1, 1, 2]}, "layer_ids ="),
    "layers that are none": ({"layer_ids": [1, True, 4]}, "layer_ids = .*True"),
    "a million layers": ({"layer_ids": list(range(1_000_000))}, "meta takes|header of more than"),
    "more active experts than there are": ({"num_active_experts": 2**30}, "num_active_experts ="),
    "another model's active experts": ({"num_active_experts": 3}, "not tokens × active experts"),
    "a model that steers the terminal": ({"model": "\x1b]0;x\x07"}, "model ="),
    "a model that is none": ({"model": ["a"]}, "model ="),
    "labels that are none": ({"labels": [1, 2]}, "labels = \\[1, 2\\]"),
    "labels that steer the terminal": ({"labels": ["en", "\x1b[31m"]}, "domain is .*x1b"),
    "labels with half a character": ({"labels": ["en", "\ud800"]}, "ud800"),
    "labels of too many characters": ({"labels": ["en", "z" * 65]}, "domain is 'zzz"),
    "a label twice": ({"labels": ["en", "en"]}, r"labels = \[.en., .en.\]"),
    "too many labels": ({"labels": ["a", "b", "c"]}, "label_counts has shape"),
    "labels in no list": ({"labels": "en"}, "labels = 'en'"),
    "times that run back": ({"end": 0}, "before its start"),
    "no time": ({"start": float("nan")}, "NaN is not a JSON number"),
    "a time long before the universe": ({"start": -1e300}, r"start = -1e\+300"),
    "a time that no float holds": ({"start": 10**400}, "start = 1000"),
    "a time long after the sun": ({"end": 1e18}, r"end = 1e\+18"),
    "ticks without length": ({"tick_seconds": 0}, "tick_seconds = 0"),
    "ticks of no number": ({"tick_seconds": float("nan")}, "NaN is not a JSON number"),
    "a time as text": ({"start": "now"}, "start = 'now'"),
}
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda content: content[: len(content) // 2], "BadZipFile"),
    "a zip without members": (lambda content: b"PK\x05\x06" + b"\0" * 18, "it has no meta"),
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


TENSORS_ALIKE = [name for name, (changes, _) in CHANGES.items() if not any(map(is_of_npz_only, changes.values()))]
TENSORS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "has 0 bytes"),
    "cut off": (lambda content: content[: len(content) // 2], "truncated"),
    "no safetensors": (lambda content: b"x" * 1000, "announces a header of more than"),
    "a pickle": (lambda content: pickle.dumps({"a": Canary()}), "announces a header of more than"),
    "a header of 5 MB": (lambda content: (5_000_000).to_bytes(8, "little") + b" " * 5_000_000, "more than"),
    "a header that is no JSON": (lambda content: content[:8] + b"{,,," + content[12:], "invalid JSON"),
    "a tensor twice": (with_header(lambda text: text.replace('"gate_mass"', '"counts"')), "twice"),
    "a tensor beyond the end": (with_header(lambda text: re.sub(r"\[0,", "[9999999,", text)), "data_offsets"),
    "tensors that overlap": (with_header(overlapping), "overlaps"),
    "a shape of 10^30": (with_header(lambda text: text.replace("[2,3,8]", f"[{10**30}]")), "at most"),
    "counts in bfloat16": (with_header(lambda text: text.replace('"U8"', '"F8_E4M3"')), "is torch.float8_e4m3fn"),
    "no meta": (with_header(lambda text: text.replace('"meta"', '"mota"')), "it has no meta"),
}


@pytest.mark.parametrize("case", [*CHANGES, *DAMAGE])
def test_a_malformed_npz_is_refused_by_name_and_takes_no_memory(case: str) -> None:
    content = zipped(members(to_npz(busy_tracker(0).saved_set(with_history=True))))
    if case in CHANGES:
        changes, message = CHANGES[case]
        content = rewritten(content, **changes)
    else:
        damage, message = DAMAGE[case]
        content = damage(content)
    check_refused(content, message)


@pytest.mark.parametrize("case", [*TENSORS_ALIKE, *TENSORS])
def test_malformed_safetensors_are_refused_by_name_and_take_no_memory(case: str) -> None:
    content = to_bytes(busy_tracker(0).saved_set(with_history=True))
    if case in TENSORS_ALIKE:
        changes, message = CHANGES[case]
        content = rewritten_tensors(content, **changes)
    else:
        damage, message = TENSORS[case]
        content = damage(content)
    check_refused(content, message)


def check_refused(content: bytes, message: str) -> None:
    tracemalloc.start()
    try:
        with raises(CheckpointError, "the file") as caught:
            from_bytes(content, "the file")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert re.search(message, str(caught.value))
    assert peak < 2**21
    assert not Path("/tmp/amalgam-canary-fired").exists()


@pytest.mark.parametrize("write", [to_bytes, to_npz])
def test_a_set_with_flipped_bytes_is_refused_or_still_a_set(write: Callable[[SavedSet], bytes]) -> None:
    rng = np.random.default_rng(0)
    content = write(busy_tracker(0).saved_set())
    for _ in range(500):
        data = bytearray(content)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        with contextlib.suppress(CheckpointError):
            write(from_bytes(bytes(data), "it"))


def test_a_model_s_name_is_written_printable() -> None:
    settings = make_tracker(Clock()).settings
    tracker = ExpertTracker(LAYER_IDS, 8, TOP_K, settings, Clock().system, model="a\n\udcff明")
    assert from_bytes(to_bytes(tracker.saved_set()), "it").model == "a\ufffd\ufffd明"
