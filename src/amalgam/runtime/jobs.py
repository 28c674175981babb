"""Changes of the weights as jobs: one at a time, each with an id, progress, an end, and a way to cancel it.

In: work that reports how far it is. Out: what can be told of it, and its result. Must never know: how a weight version
is built, HTTP.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from amalgam.base.clock import Clock
from amalgam.base.escaping import one_line
from amalgam.base.threads import EXIT_SECONDS, StoppableThread
from amalgam.composition.progress import LOADING
from amalgam.errors import AmalgamError, CancelledError, ConflictError, NotFoundError, UnavailableError, describe
from amalgam.runtime.changes import Asked, RemapRecord, RemapResult, code_of, reason_of

MAX_JOBS = 256  # that are remembered
WAIT_SECONDS = 0.5  # an interrupt is noticed between two waits

logger = logging.getLogger("amalgam.models")


class JobState(enum.StrEnum):
    """What has become of a change."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class JobStatus:
    """One change at one moment, for people and programs.

    Attributes:
        kind: `mapping`, `rules`, `reload`, `undo`, … : what was asked for.
        what: the same in a few words.
        stage: what is being done now, or was done last.
        done_bytes, total_bytes: of the stage, as they are stored; 0 of 0: it counts none.
        num_done, num_weights: weights that were read, and that had to be; known once the change is planned.
        started_at, ended_at: Unix seconds.
        seconds: since it began, or that it took.
        seconds_left: of the stage, if it goes on as it did; None: unknown.
        can_be_cancelled: until it goes live.
        version: that was made, or that requests go on with; None until it has ended.
        name: that the version was given; None: new requests start on it.
        num_changed, loaded_bytes: weights that differ from the version before, and bytes that were read for them.
        error, error_type: why it changed nothing; the type as answers over HTTP have it.
    """

    id: str
    kind: str
    what: str
    state: JobState
    stage: str
    done_bytes: int
    total_bytes: int
    num_done: int
    num_weights: int
    started_at: float
    ended_at: float | None
    seconds: float
    seconds_left: float | None
    can_be_cancelled: bool
    previous_version: int
    version: int | None = None
    name: str | None = None
    num_changed: int = 0
    loaded_bytes: int = 0
    error: str | None = None
    error_type: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.state is not JobState.RUNNING

    def as_json(self) -> dict[str, Any]:
        """A JSON object of all attributes."""
        return asdict(self)


class Job:
    """One change that is under way, or was. Any thread.

    A context manager for the thread that does the work: what leaves the block, a result or an error, is what became of
    it, and the next change may begin then.
    """

    def __init__(self, jobs: Jobs, kind: str, what: str, previous_version: int) -> None:
        self.asked = Asked(kind, one_line(what))  # it goes to logs and terminals, and bears names from clients
        self.result: RemapResult | None = None  # set in the block
        self.error: BaseException | None = None
        self.revision = 0  # changes with all that is told
        self._jobs = jobs
        self._previous_version = previous_version
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._is_cancelled = self._is_going_live = False
        self.is_detached = False  # nobody waits for it
        self._stage, self._done, self._total = "Planning", 0, 0
        self._num_done = self._num_weights = 0
        self._started_at, self._started = jobs.clock.now(), time.monotonic()
        self._stage_started = self._started
        self._seconds: float | None = None
        self.thread = threading.current_thread()  # that does the work

    @property
    def id(self) -> str:
        return self.asked.id

    @property
    def what(self) -> str:
        """What was asked for, in a few words."""
        return self.asked.what

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Its work is over, and `error` what ended it, if any; `result` is there if none did."""

        def note() -> None:
            with self._lock:
                self.error = error
                self._seconds = time.monotonic() - self._started
                self.revision += 1

        self._jobs.end(self, note)
        self._ended.set()

    def report(self, what: str, done: int, total: int) -> None:
        """A `Progress`: how far the stage is; of the weights' stage, once for each weight.

        Raises:
            CancelledError: somebody has cancelled the change.
            UnavailableError: the model is being closed.
        """
        self._note_stage(what, done, total, is_weight=what == LOADING)

    def begin_stage(self, what: str, num_weights: int | None = None) -> None:
        """Another stage, of which no bytes are counted.

        Args:
            num_weights: that are to be read.

        Raises: see `report`.
        """
        self._note_stage(what, 0, 0, is_weight=False)
        if num_weights is not None:
            self._num_weights = num_weights

    def _note_stage(self, what: str, done: int, total: int, *, is_weight: bool) -> None:
        self.check()
        with self._lock:
            if what != self._stage:
                self._stage, self._stage_started = what, time.monotonic()
            self._done, self._total = done, total
            self._num_done += is_weight and not self._is_going_live  # a draft's come later
            self.revision += 1

    def check(self) -> None:
        """
        Raises:
            CancelledError: somebody has cancelled the change.
            UnavailableError: the model is being closed.
        """
        if self._is_cancelled:
            raise CancelledError(f"The change {self.id} was cancelled.", remedy="Nothing has changed.")
        if self._jobs.is_draining and self.is_detached:
            raise CancelledError(
                f"The change {self.id} was given up: the server ends.",
                remedy="Nothing has changed. Ask for it again after the restart.",
            )
        self._jobs.check_open()

    def go_live(self) -> None:
        """From now on it cannot be cancelled.

        Raises: see `check`.
        """
        with self._lock:
            self.check()
            self._is_going_live = True
            self._stage, self._done, self._total = "Going live", 0, 0
            self.revision += 1

    def cancel(self) -> None:
        """Have it give up at the next weight. Harmless when repeated.

        Raises:
            ConflictError: it has ended, or goes live at this moment.
        """
        with self._lock:
            if self._seconds is not None or self._is_going_live:
                raise _ended(self.id, "goes live already" if self._seconds is None else f"has ended: {self._state()}")
            self._is_cancelled = True
            self.revision += 1

    def stop(self) -> None:
        """Cancel it if that is still possible."""
        with self._lock:
            self._is_cancelled = self._is_cancelled or not self._is_going_live

    def wait(self) -> RemapResult:
        """Its result, once it is there. An interrupt of the thread that waits cancels it.

        Raises:
            BaseException: what ended the work.
        """
        try:
            while not self._ended.wait(WAIT_SECONDS):
                pass
        except BaseException:
            self.stop()
            self._ended.wait()
            raise
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def wait_for_end(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        return self._ended.wait(seconds)

    @property
    def has_ended(self) -> bool:
        return self._seconds is not None

    def status(self) -> JobStatus:
        """What can be told of it now; times as the wall clock is set now."""
        with self._lock:
            now, result, error = time.monotonic(), self.result, self.error
            seconds = now - self._started if self._seconds is None else self._seconds
            started_at = self._started_at + self._jobs.clock.shift()
            left = None
            if self._seconds is None and 0 < self._done <= self._total:
                left = (now - self._stage_started) * (self._total - self._done) / self._done
            version = None
            if self._seconds is not None:
                version = self._previous_version if result is None else result.version
            return JobStatus(
                id=self.id,
                kind=self.asked.kind,
                what=self.what,
                state=self._state(),
                stage=self._stage,
                done_bytes=self._done,
                total_bytes=self._total,
                num_done=self._num_done,
                num_weights=self._num_weights,
                started_at=started_at,
                ended_at=None if self._seconds is None else started_at + self._seconds,
                seconds=seconds,
                seconds_left=left,
                can_be_cancelled=self._seconds is None and not self._is_going_live and not self._is_cancelled,
                previous_version=self._previous_version,
                version=version,
                name=None if result is None else result.name,
                num_changed=0 if result is None else len(result.changed),
                loaded_bytes=0 if result is None else result.loaded_bytes,
                error=None if error is None else reason_of(error),
                error_type=None if error is None else code_of(error),
            )

    def _state(self) -> JobState:
        if self._seconds is None:
            return JobState.RUNNING
        if self.error is None:
            return JobState.DONE
        return JobState.CANCELLED if isinstance(self.error, CancelledError) else JobState.FAILED


class Jobs:
    """All changes: the one under way, the latest ones since the start, and what was kept of earlier ones. Any thread.

    Args:
        version_id: the weight version in use.
        earlier: changes of an earlier process, oldest first.
    """

    def __init__(
        self,
        version_id: Callable[[], int],
        earlier: Iterable[JobStatus] = (),
    ) -> None:
        self.clock = Clock()
        self._version_id = version_id
        self._lock = threading.Lock()
        self._running: Job | None = None
        self._jobs: deque[Job | JobStatus] = deque(earlier, maxlen=MAX_JOBS)
        self.is_draining = False  # changes that nobody waits for give up
        self._is_closing = threading.Event()
        self._reserved = threading.local()  # `job`: which a thread was started for

    @property
    def running(self) -> Job | None:
        """The change under way."""
        with self._lock:
            return self._running

    def begin(self, kind: str, what: str) -> Job:
        """Take the only place there is; leaving the job's block gives it back.

        In a thread of `start`, the job that it was started for: work that begins a job by itself runs there, too.

        Raises:
            ConflictError: another change is under way; `details` tells how far it is.
            UnavailableError: the model is being closed.
        """
        reserved: Job | None = getattr(self._reserved, "job", None)
        if reserved is not None:
            self._reserved.job = None
            reserved.thread = threading.current_thread()
            return reserved
        with self._lock:
            self.check_open()
            if self._running is not None:
                raise conflict_with(self._running.status())
            job = self._running = Job(self, kind, what, self._version_id())
            self._jobs.append(job)
            return job

    def start(self, kind: str, what: str, work: Callable[[], object]) -> Job:
        """Begin a change, and do its work in a thread of its own.

        Args:
            work: calls `begin` and does the rest in the job's block. What it raises is logged.

        Raises: see `begin`.
        """
        job = self.begin(kind, what)
        job.is_detached = True

        def run() -> None:
            self._reserved.job = job
            failure: BaseException | None = None
            try:
                work()
            except AmalgamError as error:
                failure = error
                logger.warning("change %s (%s): %s", job.id, job.what, error)
            except BaseException as error:
                failure = error
                logger.exception("change %s (%s) failed", job.id, job.what)
            if not job.has_ended:  # it did not come to its block
                job.end(failure or AssertionError("the work has no block"))
            if failure is not None:  # its frames hold weights
                failure.__traceback__ = failure.__cause__ = failure.__context__ = None

        try:
            StoppableThread(run, "amalgam-change", job.stop).start()
        except BaseException as error:  # no more threads
            job.end(error)
            raise
        return job

    def add(self, status: JobStatus) -> None:
        """Remember a change that nobody has begun: a version that failed was left."""
        with self._lock:
            self._jobs.append(status)

    def read(self) -> list[JobStatus]:
        """All that are remembered, oldest first."""
        with self._lock:
            jobs = list(self._jobs)
        return [job if isinstance(job, JobStatus) else job.status() for job in jobs]

    def find(self, job_id: str) -> JobStatus:
        """
        Raises:
            NotFoundError: no such change is remembered.
        """
        found = self._find(job_id)
        return found if isinstance(found, JobStatus) else found.status()

    def follow(self, job_id: str) -> tuple[int, JobStatus]:
        """The same, with a number that changes when there is something new.

        Raises: see `find`.
        """
        found = self._find(job_id)
        return (0, found) if isinstance(found, JobStatus) else (found.revision, found.status())

    def cancel(self, job_id: str) -> JobStatus:
        """Have a change give up; it ends a little later.

        Raises:
            NotFoundError: see `find`.
            ConflictError: it has ended, or goes live at this moment.
        """
        found = self._find(job_id)
        if isinstance(found, JobStatus):
            raise _ended(found.id, f"has ended: {found.state}")
        found.cancel()
        return found.status()

    def end(self, job: Job, note: Callable[[], None]) -> None:
        """The place is free again. Called by the job, of which no more is kept than what can be told.

        Args:
            note: from then on the job tells that it has ended; who has seen that finds the place free.
        """
        with self._lock:
            note()
            status = job.status()
            self._running = None
            if job in self._jobs:
                self._jobs[self._jobs.index(job)] = status

    def drain(self) -> None:
        """The process ends when what clients wait for is done: the change under way gives up unless one waits for it.

        Takes no lock: it may be called where a signal has interrupted whoever has it.
        """
        self.is_draining = True

    def close(self) -> None:
        """The change under way gives up, and none begins any more. A weight that takes long is not waited for."""
        self._is_closing.set()
        job = self._running
        if job is not None and job.thread is not threading.current_thread():
            job.wait_for_end(EXIT_SECONDS)

    def check_open(self) -> None:
        """
        Raises:
            UnavailableError: the model is being closed.
        """
        if self._is_closing.is_set():
            raise UnavailableError("The model has been closed.", remedy="Open it again.")

    def _find(self, job_id: str) -> Job | JobStatus:
        with self._lock:
            for job in self._jobs:
                if job.id == job_id:
                    return job
        raise NotFoundError(
            f"There is no change {describe(job_id)}.", remedy=f"The latest {MAX_JOBS} are in GET /weights/changes."
        )


def _ended(job_id: str, how: str) -> ConflictError:
    return ConflictError(f"The change {job_id} {how}.", remedy="To go back to the version before, start another one.")


def conflict_with(status: JobStatus) -> ConflictError:
    """What a second change is told of the first."""
    how_far = status.stage.lower()
    if status.total_bytes:
        how_far += f", {status.done_bytes / status.total_bytes:.0%}"
    if status.num_weights:
        how_far += f", {status.num_done} of {status.num_weights} weights"
    return ConflictError(
        f"Another change of the weights is under way: {status.id} ({status.what}; {how_far}).",
        remedy=f"Wait for it, or cancel it with DELETE /weights/changes/{status.id}.",
        details={"change": status.as_json()},
    )


def status_of_record(record: RemapRecord) -> JobStatus:
    """What is known of a change of a former process."""
    ended = JobState.CANCELLED if record.is_cancelled else JobState.FAILED
    asked = record.asked
    if asked is None:
        kind, what = ("start", "a start") if record.is_start else ("earlier", "before the latest start")
        asked = Asked(kind, what, id=f"{int(record.at * 1000):012x}")
    return JobStatus(
        id=asked.id,
        kind=asked.kind,
        what=asked.what,
        state=JobState.DONE if record.error is None else ended,
        stage="",
        done_bytes=0,
        total_bytes=0,
        num_done=0,
        num_weights=0,
        started_at=record.at - record.seconds,
        ended_at=record.at,
        seconds=record.seconds,
        seconds_left=None,
        can_be_cancelled=False,
        previous_version=record.previous_version,
        version=record.version,
        name=record.name,
        num_changed=record.num_changed,
        loaded_bytes=record.loaded_bytes,
        error=record.error,
        error_type=record.error_type,
    )
