"""Other weights for a model that runs: planned, built beside its requests, in use between two steps, and taken back.

In: what is asked for. Out: versions in the book, a record of each attempt, what a change would take. One change at a
time. Must never know: HTTP, trials.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import clear_frames

from amalgam.composition.loader import LoadedVersion
from amalgam.composition.progress import LOADING, Progress
from amalgam.config.placement import Rule
from amalgam.config.settings import Settings
from amalgam.engine.core import Engine
from amalgam.engine.memory import available_bytes
from amalgam.errors import OutOfMemoryError, VersionNotFoundError
from amalgam.runtime.changes import (
    MAX_UNDOS,
    ChangeRequest,
    RemapLog,
    RemapResult,
    check_in_use,
    check_rollback,
    check_undo,
)
from amalgam.runtime.jobs import Job, Jobs, status_of_record
from amalgam.runtime.preview import (
    ChangePlan,
    Contents,
    Difference,
    Load,
    Prepared,
    changed_weights,
    device_plans,
)
from amalgam.runtime.served import ServedWeights, shared_weights
from amalgam.runtime.speculation import Speculation
from amalgam.runtime.versions import VersionBook, as_id
from amalgam.runtime.yielding import Turns

logger = logging.getLogger("amalgam.runtime")

FREEING_SECONDS = 5.0  # that a change waits for the memory of versions that drain
_LOOK_SECONDS = 0.2  # a change that waits is given up after at most that


class Remapper:
    """See above. Any thread; what it is asked for is described at `Deployment`.

    Args:
        log: takes each attempt.
        speculation: follows the weights in use; None: nothing is guessed.
        loaded: the first version.

    Attributes:
        on_live: is told the version that new requests start on when it has become another one.
    """

    def __init__(
        self,
        settings: Settings,
        versions: VersionBook,
        engine: Engine,
        jobs: Jobs,
        log: RemapLog,
        speculation: Speculation | None,
        loaded: LoadedVersion,
    ) -> None:
        self._settings = settings
        self._versions = versions
        self._engine = engine
        self._jobs = jobs
        self._log = log
        self._speculation = speculation
        self._seconds_per_byte = loaded.seconds / max(1, loaded.read_bytes)
        self._following = threading.Lock()  # what follows the weights in use does so for one version after the other
        self._earlier_rules: list[tuple[Rule, ...]] = []  # those that were in use, the latest last
        # Those that new requests started on, the latest last.
        self._earlier_versions = log.earlier_versions(self._served.rules)[-MAX_UNDOS:]
        self.on_live: Callable[[int], None] = lambda version_id: None

    @property
    def _served(self) -> ServedWeights:
        return self._versions.current

    @property
    def num_undoable(self) -> int:
        """How many changes of the rules `undo` can take back, one after the other."""
        return len(self._earlier_rules)

    def change(self, request: ChangeRequest, progress: Progress | None = None) -> RemapResult:
        """See `Deployment.change`."""
        with self._change(request.kind, request.what) as served:
            return self._make(request, served, progress)

    def adopt(self, loaded: LoadedVersion, rules: tuple[Rule, ...], version_id: int) -> RemapResult:
        """See `Deployment.adopt`."""
        with self._change("adopt", "a version that was built beside the one in use") as served:
            check_in_use(version_id, served.version.version_id, "The change is given up.")
            return self._go_live(ServedWeights(served.loader, loaded.version, rules), loaded, time.monotonic())

    def undo(self, version_id: int) -> RemapResult:
        """See `Deployment.undo_weight_mapping`."""
        with self._change("undo", f"back from version {version_id}") as served:
            check_undo(version_id, served.version.version_id, self._earlier_rules)
            result = self._make(ChangeRequest(rules=self._earlier_rules[-1]), served)
            with self._following:
                if self._served.version_id == result.version:  # it has not failed at once
                    del self._earlier_rules[-2:]  # the ones that have come back, and the ones that are left
            return result

    def rollback(self, version: str | int | None = None) -> RemapResult:
        """See `Deployment.rollback`."""
        what = "the version before" if version is None else f"version {version}"
        with self._change("rollback", f"back to {what}") as served:
            if version is None:
                check_rollback(self._earlier_versions)
                result = self._make(ChangeRequest(version=self._earlier_versions[-1]), served)
                with self._following:
                    if self._served.version_id == result.version:  # it has not failed at once
                        del self._earlier_versions[-2:]  # the one that has come back, and the one that is left
                return result
            return self._make(ChangeRequest(version=version), served)

    def plan(self, request: ChangeRequest) -> ChangePlan:
        """See `Deployment.plan_change`."""
        started, served = time.monotonic(), self._served
        return self._plan_of(self._prepare(request, served), served, started)

    def difference(self, before: str | int, after: str | int) -> Difference:
        """See `Deployment.difference`."""
        (first_id, first), (second_id, second) = self._contents(before), self._contents(after)
        return Difference(first_id, second_id, changed_weights(first, second))

    def room(self) -> int:
        """Bytes of memory for more weights: what is available but for what the KV cache will take of it."""
        return max(0, available_bytes(self._served.loader.device) - self._engine.untouched_bytes)

    def follow_back(self, failed_id: int, reason: str) -> None:
        """What followed a version that has been left goes back with the others."""
        with self._following:  # its change may still be at it
            served = self._served
            with _logged("the log of changes"):
                record = self._log.add_failed_version(served.version_id, served.rules, failed_id, reason)
                self._jobs.add(status_of_record(record))
            if self._earlier_versions[-1:] == [served.version_id]:
                self._earlier_versions = self._earlier_versions[:-1]
            if self._earlier_rules[-1:] == [served.rules]:
                self._earlier_rules = self._earlier_rules[:-1]
            self._follow(served, self._unless_closing)
        self._versions.has_freed()

    def _unless_closing(self, what: str, done: int, total: int) -> None:
        """A `Progress` that ends long work when nobody wants it any more."""
        self._jobs.check_open()

    @contextmanager
    def _change(self, kind: str, what: str) -> Iterator[ServedWeights]:
        """Refuses instead of waiting: the second of two re-maps must not silently follow the first."""
        with self._jobs.begin(kind, what) as job:
            served = self._served
            self._log.begin(served.version_id, job.asked)
            try:
                yield served
            except Exception as error:
                with _logged("the log of changes"):
                    self._log.add_failure(served.version.version_id, job.status().seconds, error, job.asked)
                clear_frames(error.__traceback__)  # which hold the weights that have been built
                self._versions.has_freed()
                raise

    @property
    def _job(self) -> Job:
        """The change under way, of which the caller is a part."""
        job = self._jobs.running
        assert job is not None
        return job

    def _make(self, request: ChangeRequest, served: ServedWeights, progress: Progress | None = None) -> RemapResult:
        """Fulfil a request, beside nothing else that changes the weights."""
        started = time.monotonic()
        prepared = self._prepare(request, served)
        if isinstance(prepared, ServedWeights):
            return self._go_live(prepared, None, started, request.name)
        load = self._load_of(prepared)
        self._wait_for_room(prepared, load)

        job = self._job
        job.begin_stage(LOADING, load.num_weights)

        def step(what: str, done: int, total: int) -> None:
            job.report(what, done, total)
            if progress is not None:
                progress(what, done, total)

        turns = Turns(lambda: self._engine.status().num_running > 0, job.check)
        wanted = request.version_id
        version_id = self._versions.next_id() if wanted is None else self._versions.claim_id(wanted)
        try:
            loaded = prepared.loader.build(prepared.planned, version_id, prepared.shared, step, turns)
        except BaseException:
            self._versions.release_id(version_id)
            raise
        if loaded.read_bytes:
            self._seconds_per_byte = loaded.seconds / loaded.read_bytes
        made = ServedWeights(prepared.loader, loaded.version, prepared.rules)
        return self._go_live(made, loaded, started, request.name)

    def _wait_for_room(self, prepared: Prepared, load: Load) -> None:
        """The memory of a version goes back a moment after its last request has ended: a change that needs it waits.

        Raises:
            OutOfMemoryError: there is too little memory even so, or requests of such a version take longer.
        """
        deadline = time.monotonic() + FREEING_SECONDS
        while True:
            num_freed = self._versions.num_freed
            try:
                load.check_room(self.room())
                prepared.loader.devices.check_room(load.new_by_device, prepared.shared.weights)
                return
            except OutOfMemoryError:
                while not self._versions.wait_freed(num_freed, _LOOK_SECONDS):
                    self._job.check()
                    is_over = not self._versions.is_freeing or time.monotonic() >= deadline
                    if is_over and self._versions.num_freed == num_freed:
                        raise

    def _prepare(self, request: ChangeRequest, served: ServedWeights) -> ServedWeights | Prepared:
        """The version that a request asks for, if it is in memory, or what it is made of."""
        loader, rules = served.loader, request.rules_after(served.rules)
        if request.version is not None:
            found = self.alive(request.version)
            if found is not None:
                return found
            rules = self._rules_of(request.version)
        if request.name is not None:
            self._versions.check_new(request.name)
        if request.is_reload:
            loader = loader.reopen()
        planned = loader.plan(rules)
        loader.devices.check_there(planned)
        others = [version for version in self._versions.versions if version is not served.version]
        return Prepared(loader, rules, planned, shared_weights(planned, served.version, *others))

    def _contents(self, version: str | int) -> tuple[int, Contents]:
        found = self.alive(version)
        if found is not None:
            return found.version_id, Contents.of(found.version)
        return as_id(version) or 0, Contents.planned(self._served.loader.plan(self._rules_of(version)))

    def _load_of(self, prepared: Prepared) -> Load:
        return Load.of(prepared.missing, prepared.loader, self._settings.engine.num_load_threads)

    def _plan_of(self, prepared: ServedWeights | Prepared, served: ServedWeights, started: float) -> ChangePlan:
        if isinstance(prepared, ServedWeights):
            contents, load = Contents.of(prepared.version), Load()
            version: int | None = prepared.version_id
        else:
            contents = Contents.planned(prepared.planned)
            load = self._load_of(prepared)
            version = None
        return ChangePlan(
            rules=prepared.rules,
            version=version,
            previous_version=served.version_id,
            contents=contents,
            changed=changed_weights(Contents.of(served.version), contents),
            load=load,
            shared_bytes=sum(contents.sizes.values()) - load.memory_bytes,
            available_bytes=self.room(),
            seconds=time.monotonic() - started + load.read_bytes * self._seconds_per_byte,
            devices=device_plans(contents, load, prepared.loader.devices),
        )

    def _go_live(
        self, served: ServedWeights, loaded: LoadedVersion | None, started: float, name: str | None = None
    ) -> RemapResult:
        """
        Args:
            loaded: what making it took; None: it was there.
            name: what it is called from now on; None: new requests start on it.
        """
        before, after = self._served, served.version
        changed = changed_weights(Contents.of(before.version), Contents.of(after))
        job = self._job
        job.begin_stage("Compiling")
        self._engine.prepare(after)
        job.go_live()
        result = RemapResult(
            version=after.version_id,
            previous_version=before.version_id,
            fingerprint=after.fingerprint,
            changed=changed,
            num_loaded=0 if loaded is None else loaded.num_loaded,
            loaded_bytes=0 if loaded is None else loaded.loaded_bytes,
            shared_bytes=after.nbytes if loaded is None else loaded.shared_bytes,
            seconds=time.monotonic() - started,
            name=name,
        )
        if name is not None:
            self._versions.name(name, served)
            job.result = result
            with _logged("the log of changes"):
                self._log.add(result, served.rules, job.asked)
            return result
        with self._following:
            self._versions.make_current(served)
            job.result = result
            if after is not before.version:
                self._earlier_versions = [*self._earlier_versions, before.version_id][-MAX_UNDOS:]
            if served.rules != before.rules:
                self._earlier_rules = [*self._earlier_rules, before.rules][-MAX_UNDOS:]
            # Before what takes longer: a process may be killed in it.
            with _logged("the log of changes"):
                self._log.add(result, served.rules, job.asked)
            with _logged("the trials"):
                self.on_live(self._versions.current.version_id)  # it may have failed already
            self._follow(served, job.report)
        return result

    def _follow(self, served: ServedWeights, progress: Progress) -> None:
        """What guesses tokens follows the weights in use."""
        if self._speculation is not None:
            with _logged("the draft"):
                self._speculation.follow(served.loader, served.rules, served.version, progress)
            self._versions.has_freed()

    def alive(self, version: str | int) -> ServedWeights | None:
        """The version of a name or id, if it is in memory.

        Raises:
            VersionNotFoundError: nobody knows the name.
        """
        version_id = as_id(version)
        return self._versions.find(version, param=None) if version_id is None else self._versions.alive(version_id)

    def _rules_of(self, version: str | int) -> tuple[Rule, ...]:
        rules = self._log.rules_of(as_id(version) or 0)
        if rules is None:
            raise VersionNotFoundError(
                f"There is no weight version {version}.", remedy="GET /weights/changes tells of earlier ones."
            )
        return rules


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """What follows a change. If it fails, the change stays what it is, so that is logged."""
    try:
        yield
    except Exception:
        logger.exception("%s could not follow a change of the weights", what)
