"""Changes as jobs: one at a time, told step by step, cancelled, waited for, remembered."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from amalgam.composition.progress import LOADING
from amalgam.errors import CancelledError, ConflictError, NotFoundError, PlanError, UnavailableError
from amalgam.runtime.changes import RemapResult
from amalgam.runtime.jobs import MAX_JOBS, Job, Jobs, JobState, JobStatus
from amalgam.runtime.yielding import Turns
from tests.errors import raises

MAX_NICENESS = 19
RESULT = RemapResult(2, 1, "f", [], 3, 30, 70, 0.5)


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs(lambda: 1)
    yield jobs
    jobs.close()


def load(job: Job, num_weights: int = 3) -> None:
    job.begin_stage(LOADING, num_weights)
    for done in range(1, num_weights + 1):
        job.report(LOADING, 10 * done, 10 * num_weights)


def test_a_change_tells_how_far_it_is_and_what_came_of_it(jobs: Jobs) -> None:
    with jobs.begin("mapping", "2 rules") as job:
        planning = job.status()
        assert (planning.state, planning.version, planning.num_weights) == (JobState.RUNNING, None, 0)
        job.begin_stage(LOADING, 3)
        job.report(LOADING, 10, 30)
        loading = job.status()
        assert (loading.stage, loading.done_bytes, loading.total_bytes) == (LOADING, 10, 30)
        assert (loading.num_done, loading.num_weights) == (1, 3)
        assert loading.seconds_left is not None
        assert jobs.running is job
        job.go_live()
        job.report(LOADING, 5, 10)  # a draft's weights are no weights of the change
        job.result = RESULT
    status = jobs.find(job.id)
    assert (status.state, status.previous_version, status.version, status.num_done) == (JobState.DONE, 1, 2, 1)
    assert (status.loaded_bytes, status.error, status.can_be_cancelled, status.seconds_left) == (30, None, False, None)
    assert job.wait() is RESULT
    assert jobs.running is None


def test_a_second_change_is_told_of_the_first(jobs: Jobs) -> None:
    with jobs.begin("mapping", "2 rules") as job:
        load(job, 4)
        with raises(ConflictError, job.id, "100%", "4 of 4") as caught:
            jobs.begin("reload", "files")
        assert caught.value.details["change"]["id"] == job.id  # type: ignore[attr-defined]
        job.result = RESULT
    with jobs.begin("reload", "files") as other:
        other.result = RESULT
    assert [status.kind for status in jobs.read()] == ["mapping", "reload"]


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (PlanError("Pattern 'x' matches nothing."), JobState.FAILED, "invalid_plan"),
        (CancelledError("Enough."), JobState.CANCELLED, "conflict"),
        (ValueError("broken"), JobState.FAILED, "internal_error"),
    ],
)
def test_a_change_that_fails_says_why_and_makes_room(jobs: Jobs, error: Exception, state: JobState, code: str) -> None:
    job = jobs.begin("mapping", "1 rule")
    with pytest.raises(type(error)), job:
        raise error
    status = job.status()
    assert (status.state, status.version, status.error_type) == (state, 1, code)
    assert status.error == str(error)
    with pytest.raises(type(error)):
        job.wait()
    jobs.begin("mapping", "1 rule").end(None)


def test_cancelling_ends_it_at_the_next_weight_and_not_once_it_goes_live(jobs: Jobs) -> None:
    with pytest.raises(CancelledError), jobs.begin("mapping", "1 rule") as job:
        job.begin_stage(LOADING, 9)
        assert not jobs.cancel(job.id).can_be_cancelled
        jobs.cancel(job.id)
        job.report(LOADING, 1, 9)
    assert job.status().state is JobState.CANCELLED
    with raises(ConflictError, job.id):
        jobs.cancel(job.id)
    with jobs.begin("mapping", "1 rule") as other:
        other.go_live()
        with raises(ConflictError, other.id):
            jobs.cancel(other.id)
        other.report(LOADING, 1, 1)
        other.result = RESULT
    with raises(NotFoundError, "nobody"):
        jobs.cancel("nobody")


def test_work_in_the_background_takes_the_place_at_once(jobs: Jobs) -> None:
    may_go_on = threading.Event()

    def work() -> None:
        with jobs.begin("mapping", "ignored: the job is there") as job:
            assert may_go_on.wait(60)
            load(job)
            job.result = RESULT

    job = jobs.start("mapping", "1 rule", work)
    with raises(ConflictError, job.id):
        jobs.start("mapping", "1 rule", work)
    with raises(ConflictError, job.id):
        jobs.begin("reload", "files")
    may_go_on.set()
    assert job.wait() is RESULT
    assert [status.what for status in jobs.read()] == ["1 rule"]


def test_who_has_seen_the_end_of_a_change_can_begin_the_next(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the thread is that ends it."""
    job, tell, is_told = jobs.begin("mapping", "1 rule"), Job.status, threading.Event()

    def late_status(told: Job) -> JobStatus:
        status = tell(told)
        if status.has_ended and not is_told.is_set():
            is_told.set()
            time.sleep(0.2)
        return status

    monkeypatch.setattr(Job, "status", late_status)
    ending = threading.Thread(target=job.end, args=[None])
    ending.start()
    assert is_told.wait(60) and job.has_ended
    assert jobs.running is None
    jobs.begin("mapping", "1 rule").end(None)
    ending.join()


def test_what_is_told_of_a_change_is_one_line(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        raise PlanError("There are no such weights.")

    job = jobs.start("version", "back to version a\x1b[31m\nINFO forged", work)
    with pytest.raises(PlanError):
        job.wait()
    assert job.status().what.isprintable()
    assert [line.isprintable() for line in caplog.messages] == [True]


def test_nothing_that_a_change_has_worked_on_is_kept(jobs: Jobs) -> None:
    class Weights:
        pass

    alive: list[weakref.ref[Weights]] = []

    def work() -> None:
        with jobs.begin("mapping", "1 rule"):
            weights = Weights()
            alive.append(weakref.ref(weights))
            try:
                raise OSError("full")
            except OSError as error:
                raise PlanError("It cannot be made.") from error

    job = jobs.start("mapping", "1 rule", work)
    with pytest.raises(PlanError):
        job.wait()
    job.thread.join()
    gc.collect()
    assert alive[0]() is None
    with pytest.raises(PlanError):
        work()
    gc.collect()
    assert alive[1]() is None


def test_work_that_does_not_come_to_its_change_ends_it(jobs: Jobs) -> None:
    def work() -> None:
        raise PlanError("weight_mapping is empty.")

    job = jobs.start("mapping", "no rule", work)
    with pytest.raises(PlanError):
        job.wait()
    assert job.status().state is JobState.FAILED
    assert jobs.running is None


def test_a_thread_that_cannot_begin_gives_the_place_back(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(threading.Thread, "start", start)
        jobs.start("mapping", "1 rule", lambda: None)
    assert jobs.running is None and jobs.read()[-1].state is JobState.FAILED


def test_closing_ends_what_is_under_way_and_lets_nothing_begin(jobs: Jobs) -> None:
    with pytest.raises(UnavailableError), jobs.begin("mapping", "1 rule") as job:
        jobs.close()
        job.report(LOADING, 1, 9)
    with pytest.raises(UnavailableError):
        jobs.begin("mapping", "1 rule")


def test_the_latest_are_remembered_and_those_of_an_earlier_process_are_told() -> None:
    first = Jobs(lambda: 1)
    for _ in range(MAX_JOBS + 1):
        with first.begin("reload", "files") as job:
            job.result = RESULT
    assert len(first.read()) == MAX_JOBS
    kept = first.read()[-2:]
    later = Jobs(lambda: 2, earlier=kept)
    assert later.read() == kept
    assert later.follow(kept[0].id)[1] == kept[0]
    with raises(ConflictError, kept[0].id):
        later.cancel(kept[0].id)
    later.add(kept[0])
    assert later.read() == [*kept, kept[0]]


def test_building_threads_take_turns_only_while_requests_run() -> None:
    is_serving = False
    turns = Turns(lambda: is_serving, lambda: None)
    both, alone, found_alone, niceness = threading.Barrier(2, timeout=60), threading.Lock(), [], []

    def build_beside_another() -> None:
        with turns():
            both.wait()  # for two at a time, or it breaks

    def build_alone() -> None:
        with turns():
            found_alone.append(alone.acquire(blocking=False))
            niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            alone.release()

    run_together([build_beside_another] * 2)
    assert not both.broken
    is_serving = True
    run_together([build_alone] * 4)
    assert found_alone == [True] * 4
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert all(each > own for each in niceness) or own == MAX_NICENESS


def run_together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
