"""Files of the cache: those that do not fit are never believed, and no other is touched."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.base.locks import FileLock
from amalgam.checkpoint import packed_file
from amalgam.checkpoint.packed_file import ALIGNMENT, PackedFile, new_packed_file
from amalgam.composition import packed_cache
from amalgam.errors import CheckpointError
from amalgam.kernels.backends.cpu import extension
from amalgam.models.weights import WeightVersion
from tests.composition.packed_cache.building import assert_same, build, loader
from tests.errors import raises

pytestmark = pytest.mark.skipif(not extension.is_available(), reason="the native kernels are not built")


def truncate(data: bytes) -> bytes:
    return data[:-1]


def lengthen(data: bytes) -> bytes:
    return data + b"\0"


def empty(data: bytes) -> bytes:
    return b""


def only_the_head(data: bytes) -> bytes:
    return data[:20]


def damage_the_index(data: bytes) -> bytes:
    return data[:-10] + b"x" + data[-9:]


def huge_index(data: bytes) -> bytes:
    return data[:16] + (2**63).to_bytes(8, "little") + data[24:]


def with_index(change_index: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Somebody who makes the digest fit too."""

    def rewrite(data: bytes) -> bytes:
        start = int.from_bytes(data[8:16], "little")
        index = json.loads(data[start:])
        change_index(index)
        raw = json.dumps(index).encode()
        digest = hashlib.sha256(raw).digest()
        return data[:16] + len(raw).to_bytes(8, "little") + digest + data[56:start] + raw

    return rewrite


def each_weight(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def apply(index: dict[str, Any]) -> None:
        for entry in index["weights"].values():
            entry.update(changes)

    return apply


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": truncate,
    "longer": lengthen,
    "empty": empty,
    "only the head": only_the_head,
    "damaged index": damage_the_index,
    "huge index": huge_index,
    "another version": with_index(lambda index: index["made_by"].update(panels=-1)),
    "another byte order": with_index(lambda index: index["made_by"].update(byteorder="middle")),
    "no version": with_index(lambda index: index.pop("made_by")),
    "no weights": with_index(lambda index: index.pop("weights")),
    "weights as a list": with_index(lambda index: index.update(weights=[1])),
    "sources as numbers": with_index(lambda index: index.update(sources=[[1, 2, 3, 4]])),
    "outside": with_index(each_weight(offset=2**40)),
    "negative": with_index(each_weight(offset=-64)),
    "unaligned": with_index(each_weight(offset=65)),
    "in the head": with_index(each_weight(offset=0)),
    "long runs": with_index(each_weight(runs=[2**62])),
    "no runs": with_index(each_weight(runs=None)),
    "other shapes": with_index(each_weight(shape=[16, 8])),
    "other keys": with_index(lambda index: index.update(weights={f"{k}x": v for k, v in index["weights"].items()})),
}


@pytest.fixture(scope="module")
def filled(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[WeightVersion, Path]:
    """What the originals hold, and a cache of it."""
    cache = tmp_path_factory.mktemp("filled")
    build(originals, cache)
    return build(originals, None), cache


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_do_not_fit_are_ignored_and_written_again(
    originals: Path, filled: tuple[WeightVersion, Path], cache: Path, loads: list[str], damage: str
) -> None:
    expected, good = filled
    cache.mkdir()
    for path in good.iterdir():
        (cache / path.name).write_bytes(DAMAGES[damage](path.read_bytes()))
    assert_same(build(originals, cache), expected)
    assert len(loads) == len(expected.origins)
    loads.clear()
    assert_same(build(originals, cache), expected)
    assert loads == []


def test_what_others_keep_in_the_folder_stays(originals: Path, cache: Path) -> None:
    cache.mkdir()
    for name in ("notes.txt", "model.packed", ".packed-mine.tmp"):
        (cache / name).write_text("mine")
    build(originals, cache)
    assert {"notes.txt", "model.packed", ".packed-mine.tmp"} <= {path.name for path in cache.iterdir()}


def test_locks_of_processes_that_were_killed_go(cache: Path) -> None:
    cache.mkdir()
    killed, held = cache / f".{'0' * 16}.lock", FileLock(cache / ("f" * 16))
    killed.write_text("process 1 on somewhere\n")
    with held:
        assert held.try_acquire()
        packed_cache.PackedCache(cache)
        assert [path.name for path in cache.iterdir()] == [f".{'f' * 16}.lock"]


def test_a_folder_that_cannot_be_written_to(
    originals: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, loads: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        version = build(originals, tmp_path / "file" / "cache")
    assert "cannot be written" in caplog.text and version.mapped_bytes == 0
    assert len(loads) == len(version.origins), "nothing is read twice"
    assert_same(version, build(originals, None))


def test_a_disk_that_gets_full(
    originals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, left = os.pwrite, [20]

    def full(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(packed_file.os, "pwrite", full)
    with caplog.at_level(logging.WARNING):
        version = build(originals, cache)
    assert "No space left" in caplog.text
    assert_same(version, build(originals, None))
    assert list(cache.iterdir()) == []


def test_a_disk_that_is_too_small(
    originals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, loads: list[str]
) -> None:
    usage = shutil.disk_usage(originals)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with caplog.at_level(logging.WARNING):
        version = build(originals, cache)
    assert "1000 are free" in caplog.text and len(loads) == len(version.origins)


def test_a_failed_load_leaves_nothing_behind(folders: Path, cache: Path) -> None:
    opened = loader(folders, cache)

    def change(*_: object) -> None:
        os.utime(folders / "int4" / "model.safetensors", ns=(1, 1))

    with raises(CheckpointError, folders / "int4" / "model.safetensors"):
        opened.build(opened.plan(), 1, progress=change)
    assert list(cache.iterdir()) == []


def test_files_of_writers_that_died_are_removed(cache: Path) -> None:
    with new_packed_file(cache):
        if (child := os.fork()) == 0:
            try:
                writing = new_packed_file(cache)
                writing.__enter__()
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        assert len(list(cache.iterdir())) == 2
        packed_cache.PackedCache(cache)
        assert len(list(cache.iterdir())) == 1, "the one that is being written stays"


def test_runs_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = [torch.arange(size, dtype=torch.uint8) for size in (1, 64, 100)]
    with new_packed_file(tmp_path) as writer:
        offset = writer.append(written)
        writer.commit(tmp_path / "file", {"offset": offset})
    file = PackedFile(tmp_path / "file")
    found = file.runs(file.index["offset"], [1, 64, 100])
    assert all(torch.equal(one, other) for one, other in zip(found, written, strict=True))
    assert all(run.data_ptr() % ALIGNMENT == 0 for run in found)
    (tmp_path / "file").unlink()
    del file
    assert torch.equal(found[2], written[2]), "a run keeps the file mapped"
