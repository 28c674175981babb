"""Locks hold between processes, and what a killed one has left is told from what a living one is writing."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amalgam.base import locks
from amalgam.base.files import replace_file
from amalgam.base.locks import FileLock, create_locked, remove_abandoned
from tests.errors import raises

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from amalgam.base.locks import FileLock, create_locked

target, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "file":
    create_locked(target.parent, f".{target.name}.", ".partial")
else:
    lock = FileLock(target)
    assert lock.try_acquire()
print("held", flush=True)
sys.stdin.read()
"""
Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that holds what it is told to until it is killed."""
    processes = []

    def start(target: Path, kind: str = "lock") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(target), kind],
            cwd=ROOT / "src",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_lock_is_of_one_process_and_names_it(tmp_path: Path, hold: Hold) -> None:
    target = tmp_path / "model"
    process = hold(target)
    with FileLock(target) as lock:
        assert not lock.try_acquire()
        assert f"process {process.pid} on " in lock.holder
        kill(process)
        assert lock.try_acquire() and lock.is_held
    assert names(tmp_path) == set()


def test_a_lock_is_of_one_thread(tmp_path: Path) -> None:
    with FileLock(tmp_path / "model") as first, FileLock(tmp_path / "model") as second:
        assert first.try_acquire() and not second.try_acquire()
        first.release()
        first.release()
        assert second.try_acquire()


def test_links_to_a_target_share_its_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with FileLock(tmp_path / "real" / "file") as first, FileLock(tmp_path / "link" / "file") as second:
        assert first.try_acquire() and not second.try_acquire()


def test_who_waits_takes_over_from_a_process_that_is_killed(tmp_path: Path, hold: Hold) -> None:
    process, num_waits = hold(tmp_path / "model"), 0

    def wait() -> None:
        nonlocal num_waits
        num_waits += 1
        if num_waits == 2:
            kill(process)

    with FileLock(tmp_path / "model") as lock:
        lock.acquire(wait)
        assert lock.is_held and num_waits >= 2


def test_a_wait_can_be_ended(tmp_path: Path, hold: Hold) -> None:
    hold(tmp_path / "model")

    def wait() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), FileLock(tmp_path / "model") as lock:
        lock.acquire(wait)


def test_many_take_turns_and_never_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each release removes the lock's file, so that those who have opened it must look again."""
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.0)
    num_inside, worst, turns = 0, 0, []

    def work(number: int) -> None:
        nonlocal num_inside, worst
        for _ in range(50):
            with FileLock(tmp_path / "model") as lock:
                lock.acquire(lambda: None)
                num_inside += 1
                worst = max(worst, num_inside)
                turns.append(number)
                num_inside -= 1

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1 and len(turns) == 200
    assert names(tmp_path) == set()


@contextmanager
def no_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, "not here")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        yield


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning_and_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    (tmp_path / ".model.0123456789abcdef.partial").touch()
    with no_locks(monkeypatch, number):
        with FileLock(tmp_path / "model") as lock:
            assert lock.try_acquire() and not lock.is_held
        remove_abandoned(tmp_path, ".model.", ".partial")
        replace_file(tmp_path / "model", "content")
    assert str(tmp_path) in caplog.text and "no locks" in caplog.text
    assert (tmp_path / "model").read_text() == "content"
    assert ".model.0123456789abcdef.partial" in names(tmp_path)


def test_a_lock_where_no_file_can_be_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises(OSError, tmp_path / "file"), FileLock(tmp_path / "file" / "model") as lock:
        lock.try_acquire()


def test_files_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path: Path, hold: Hold) -> None:
    target = tmp_path / "statistics.npz"
    living, dead = hold(target, "file"), hold(target, "file")
    kill(dead)
    assert len(names(tmp_path)) == 2
    replace_file(target, b"new")
    assert len(names(tmp_path)) == 2 and target.read_bytes() == b"new"
    kill(living)
    replace_file(target, b"newer")
    assert names(tmp_path) == {"statistics.npz"} and target.read_bytes() == b"newer"


def test_temporary_files_are_new_each_time(tmp_path: Path) -> None:
    made = [create_locked(tmp_path, ".a.", ".tmp") for _ in range(3)]
    assert len({path for path, _ in made}) == 3
    remove_abandoned(tmp_path, ".a.", ".tmp")
    assert len(names(tmp_path)) == 3
