"""Memory of files is watched as long as it is mapped, and no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amalgam.base import mapping
from amalgam.base.mapping import MappedFile
from amalgam.checkpoint.shards import PickleShard

extension = pytest.importorskip("amalgam._mapping", reason="built without it")


class Spy:
    """The extension, counting what it watches over."""

    def __init__(self) -> None:
        self.watched: set[int] = set()

    def watch(self, pages: object) -> int:
        found: int = extension.watch(pages)
        self.watched.add(found)
        return found

    def forget(self, watched: int) -> None:
        self.watched.remove(watched)
        extension.forget(watched)

    def has_lost(self, watched: int) -> bool:
        found: bool = extension.has_lost(watched)
        return found


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found = Spy()
    monkeypatch.setattr(mapping, "_mapping", found)
    return found


def open_file(path: Path) -> MappedFile:
    with path.open("rb") as stream:
        return MappedFile(stream.fileno(), path.stat().st_size, is_writable=False)


def test_pages_that_are_gone_are_zeros_and_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 2**16)
    mapped = open_file(file)
    before = mapping.num_lost()
    os.truncate(file, 2**12)
    assert mapped.pages[0] == ord("x") and not mapped.has_lost
    assert mapped.pages[2**15] == 0 and mapped.has_lost and mapping.num_lost() == before + 1
    assert mapped.pages[-1] == 0 and mapping.num_lost() == before + 1


def test_a_signal_that_somebody_sends_does_what_it_did() -> None:
    """The first one: the process ends by it, or goes on where it is ignored, still watching."""
    program = """
import mmap, os, signal, sys, tempfile
from amalgam import _mapping
signal.signal(signal.SIGBUS, getattr(signal, sys.argv[1]))
with tempfile.TemporaryFile() as file:
    file.truncate(2**16)
    pages = mmap.mmap(file.fileno(), 2**16)
    _mapping.watch(pages)
    os.kill(os.getpid(), signal.SIGBUS)
    print("on", flush=True)
    file.truncate(0)
    raise SystemExit(pages[2**15])
"""
    command = [sys.executable, "-c", program]
    ends = [subprocess.run([*command, action], stdout=subprocess.PIPE) for action in ("SIG_DFL", "SIG_IGN")]
    assert [(end.returncode, end.stdout) for end in ends] == [(-signal.SIGBUS, b""), (0, b"on\n")]


def test_a_mapping_is_watched_until_its_last_view_is_gone(spy: Spy, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 2**16)
    mapped = open_file(file)
    view = torch.frombuffer(mapped.pages, dtype=torch.uint8)[5:]
    del mapped
    assert spy.watched
    del view
    assert not spy.watched


def test_one_that_is_closed_is_watched_no_more(spy: Spy, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 2**16)
    with open_file(file) as mapped:
        os.truncate(file, 2**12)
        assert mapped.pages[-1] == 0
    assert not spy.watched and mapped.has_lost


def test_what_torch_has_mapped_is_watched_until_its_last_view_is_gone(spy: Spy, tmp_path: Path) -> None:
    """Other memory may be where it was: taken for the file's, it would be overwritten with zeros."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2**16), "b": torch.ones(2**16)}, file)
    shard = PickleShard(file)
    tensors = [shard.read(entry)[1:] for entry in shard.entries]
    shard.close()
    assert len(spy.watched) == 2
    os.truncate(file, 2**12)
    assert tensors.pop().sum() == 0  # read, and gone before anybody asks
    assert len(spy.watched) == 1 and shard.has_lost
    tensors.clear()
    assert not spy.watched
