"""A running model: its engine, and live changes of its weights.

What the server, the command line and the Python interface use; `opening` makes it. Must never know: HTTP, terminals.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from amalgam.base.threads import StoppableThread
from amalgam.composition.loader import LoadedVersion, ModelLoader
from amalgam.composition.manifest import plan_manifest
from amalgam.composition.progress import LOADING, Progress
from amalgam.config.settings import Rule, Settings
from amalgam.engine.core import Engine
from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.memory import available_bytes
from amalgam.engine.probation import FailedVersion
from amalgam.engine.request import Request, RequestOutput
from amalgam.errors import ConflictError, VersionNotFoundError
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion, manifest
from amalgam.planning.following import Proposer
from amalgam.runtime.autoplan import Autoplan
from amalgam.runtime.changes import ChangeRequest, RemapLog, RemapRecord, RemapResult
from amalgam.runtime.describe import describe_manifest, describe_model, describe_projections, describe_versions
from amalgam.runtime.history import HistoryFile
from amalgam.runtime.jobs import Job, Jobs, status_of_record
from amalgam.runtime.preview import ChangePlan, Contents, Difference, Load, Prepared, changed_weights
from amalgam.runtime.served import ServedWeights, shared_weights
from amalgam.runtime.speculation import Speculation
from amalgam.runtime.statistics import ExpertStatistics
from amalgam.runtime.trial import Trials
from amalgam.runtime.versions import VersionBook, as_id
from amalgam.runtime.yielding import Turns
from amalgam.text.tokenizer import Tokenizer

MAX_UNDOS = 64


class Deployment:
    """A loaded model, its engine, and the weights that new requests start on.

    Attributes:
        statistics: which experts the traffic uses; None where nothing is counted.
        autoplan: gives it other weights when the traffic changes, once it is started; None where that is not wanted.
        jobs: the change of the weights that is under way, and those before it.
        versions: the weight versions that requests can run on.
        trials: of a candidate for the weights, on live requests.
        defaults: how the model is sampled where a request says nothing.
        loaded_seconds: what reading its first weights took.
    """

    def __init__(
        self,
        settings: Settings,
        served: ServedWeights,
        loaded: LoadedVersion,
        engine: Engine,
        tokenizer: Tokenizer,
        tracker: ExpertTracker | None,
        defaults: ModelDefaults,
        proposer: Proposer | None = None,
        speculation: Speculation | None = None,
        history: HistoryFile | None = None,
    ) -> None:
        self.settings = settings
        self.defaults = defaults
        self.engine = engine
        self.tokenizer = tokenizer
        self.loaded_seconds = loaded.seconds
        self.versions = VersionBook(served, engine)
        self.jobs = Jobs(lambda: self.version_id, () if history is None else map(status_of_record, history.records))
        self._hashing = threading.Lock()
        self._following = threading.Lock()  # what follows the weights in use does so for one version after the other
        self._history = history
        self._remaps = RemapLog() if history is None else RemapLog(history.records, history.add)
        self._remaps.start(
            RemapRecord(
                at=0.0,
                version=served.version_id,
                previous_version=served.version_id,
                num_changed=0,
                loaded_bytes=loaded.loaded_bytes,
                seconds=loaded.seconds,
                fingerprint="" if history is None else served.version.fingerprint,  # which takes a while
                rules=served.rules,
            )
        )
        self._seconds_per_byte = loaded.seconds / max(1, loaded.read_bytes)
        self._earlier_rules: list[tuple[Rule, ...]] = []  # those that were in use, the latest last
        # Those that new requests started on, the latest last.
        self._earlier_versions = self._remaps.earlier_versions(served.rules)[-MAX_UNDOS:]
        self._tracker = tracker
        self._speculation = speculation
        self.statistics = (
            None if tracker is None else ExpertStatistics(tracker, lambda: self.version, model=self.model_name)
        )
        self.autoplan: Autoplan | None = None
        if proposer is not None and tracker is not None:
            self.autoplan = Autoplan(self, tracker, proposer)
        self.trials = Trials(self)
        engine.on_ended = self._note_ended
        self.versions.on_failed = self._note_failed

    @property
    def _served(self) -> ServedWeights:
        return self.versions.current

    @property
    def spec(self) -> ModelSpec:
        return self._served.spec

    @property
    def version(self) -> WeightVersion:
        """The weight version that new requests start on."""
        return self._served.version

    @property
    def version_id(self) -> int:
        return self._served.version.version_id

    @property
    def live_versions(self) -> list[WeightVersion]:
        """The weight versions in memory: what new requests start on, what is kept, what requests have begun with."""
        return self.versions.versions

    @property
    def loader(self) -> ModelLoader:
        """Of the files that the newest version is made of."""
        return self._served.loader

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self._served.rules

    @property
    def configured_rules(self) -> tuple[Rule, ...]:
        """The rules that a restart would begin with."""
        return self.settings.model.mixed_precision.all_rules

    @property
    def num_undoable(self) -> int:
        """How many changes of the rules `undo_weight_mapping` can take back, one after the other."""
        return len(self._earlier_rules)

    @property
    def remaps(self) -> list[RemapRecord]:
        """The latest attempts of this process to change the weights, oldest first."""
        return self._remaps.read()

    @property
    def history(self) -> list[RemapRecord]:
        """Those of former processes too, and what each began with, where `weights.history` keeps them."""
        return self._remaps.history()

    @property
    def model_name(self) -> str:
        return self.settings.model.name or self._served.loader.base_folder.name

    def version_for(self, weights: str | int | None = None, key: str | None = None) -> WeightVersion:
        """The weight version that a request runs on.

        Args:
            weights: a name or an id that it asks for; None: what new requests start on, or what is being tried.
            key: requests with the same one stay together while something is tried.

        Raises:
            VersionNotFoundError: there is none, or it takes no new requests.
        """
        if weights is not None:
            return self.versions.find(weights).version
        candidate = self.trials.choose(key)
        return self.version if candidate is None else candidate.version

    def change(self, request: ChangeRequest, progress: Progress | None = None) -> RemapResult:
        """Make another version and let new requests start on it, or give it a name. Blocking.

        Requests in flight finish on their version.

        Args:
            progress: called while weights are read; what it raises ends the change, and nothing has changed.

        Raises:
            ConflictError: another change is under way.
            VersionNotFoundError: nobody knows the version that is to come back.
            PlanError, CheckpointError: the change cannot be made; nothing has changed.
        """
        with self._change(request.kind, request.what) as served:
            return self._make(request, served, progress)

    def start_change(self, request: ChangeRequest) -> Job:
        """Begin what `change` does, and let a thread of its own go on with it. Returns at once.

        Raises:
            RequestError: a version cannot have the name.
            ConflictError: another change is under way, and `details` tells how far it is; or too many are kept.
        """
        if request.name is not None:
            self.versions.check_new(request.name)
        return self.jobs.start(request.kind, request.what, lambda: self.change(request))

    def start_rollback(self) -> Job:
        """`rollback` to the version before, in a thread of its own. Returns at once.

        Raises: see `start_change`.
        """
        return self.jobs.start("rollback", "back to the version before", self.rollback)

    def update_weight_mapping(self, mapping: Mapping[str, str | None]) -> RemapResult:
        """Add rules (name or pattern → source), build a new version and let new requests start on it.

        A rule for a pattern that has one already replaces it; None removes it. Otherwise as `change`.
        """
        return self.change(ChangeRequest(mapping=mapping))

    def adopt(self, loaded: LoadedVersion, rules: tuple[Rule, ...], version_id: int) -> RemapResult:
        """Let new requests start on a version that was built beside the one in use.

        Args:
            rules: that it follows.
            version_id: the version in use when it was built.

        Raises:
            ConflictError: another version is in use now, or another change is under way.
        """
        with self._change("adopt", "a version that was built beside the one in use") as served:
            if version_id != served.version.version_id:
                raise ConflictError(
                    f"Weight version {version_id} is not in use any more: {served.version.version_id} is.",
                    remedy="The change is given up.",
                )
            return self._go_live(ServedWeights(served.loader, loaded.version, rules), loaded, time.monotonic())

    def undo_weight_mapping(self, version_id: int) -> RemapResult:
        """Go back to the rules before the latest `update_weight_mapping`. Blocking.

        Args:
            version_id: the version in use, as the caller knows it: a change by somebody else is not taken back.

        Raises:
            ConflictError: another version is in use, or there is nothing to take back.
            PlanError, CheckpointError: the earlier rules cannot be fulfilled any more; nothing has changed.
        """
        with self._change("undo", f"back from version {version_id}") as served:
            if version_id != served.version.version_id:
                raise ConflictError(
                    f"Weight version {version_id} is not in use any more: {served.version.version_id} is.",
                    remedy="Look at what has changed since, then undo that version.",
                )
            if not self._earlier_rules:
                raise ConflictError(
                    "No change of the weight mapping is left to undo.",
                    remedy=f"The last {MAX_UNDOS} changes since the start can be taken back, one after the other.",
                )
            result = self._make(ChangeRequest(rules=self._earlier_rules[-1]), served)
            del self._earlier_rules[-2:]  # the ones that have come back, and the ones that are left
            return result

    def reload_weights(self) -> RemapResult:
        """Build a new version under the same rules from the files as they are now; unchanged weights are shared.

        Otherwise as `change`.
        """
        return self.change(ChangeRequest(is_reload=True))

    def rollback(self, version: str | int | None = None) -> RemapResult:
        """Let new requests start on an earlier version again: itself if it is still in memory, otherwise its rules.

        Args:
            version: None: the one before the current one. Otherwise as `change`.

        Raises:
            ConflictError: there is none before.
        """
        what = "the version before" if version is None else f"version {version}"
        with self._change("rollback", f"back to {what}") as served:
            if version is None:
                if not self._earlier_versions:
                    raise ConflictError("There is no earlier version to go back to.", remedy="Name one that is kept.")
                result = self._make(ChangeRequest(version=self._earlier_versions[-1]), served)
                del self._earlier_versions[-2:]  # the one that has come back, and the one that is left
                return result
            return self._make(ChangeRequest(version=version), served)

    def plan_change(self, request: ChangeRequest) -> ChangePlan:
        """What `change` would change and take now; reads headers. Blocking.

        Raises:
            VersionNotFoundError: nobody knows the version that is to come back.
            PlanError, CheckpointError: the change could not be made.
        """
        started, served = time.monotonic(), self._served
        return self._plan_of(self._prepare(request, served), served, started)

    def difference(self, before: str | int, after: str | int) -> Difference:
        """In what two versions differ, by names or ids; reads headers for one that has left memory. Blocking.

        Raises:
            VersionNotFoundError: nobody knows one of them.
            PlanError, CheckpointError: what the rules of one ask for is not there any more.
        """
        (first_id, first), (second_id, second) = self._contents(before), self._contents(after)
        return Difference(first_id, second_id, changed_weights(first, second))

    def _contents(self, version: str | int) -> tuple[int, Contents]:
        found = self._alive(version)
        if found is not None:
            return found.version_id, Contents.of(found.version)
        return as_id(version) or 0, Contents.planned(self._served.loader.plan(self._rules_of(version)))

    def describe_weights(self) -> dict[str, Any]:
        """What `GET /weights` answers: the versions in memory. Blocking."""
        live = self.versions.live()
        weights = {id(weight): weight.nbytes for one in live for weight in one.version.weights}
        return {
            "current": self.version_id,
            "versions": describe_versions(live),
            "bytes": sum(weights.values()),
            "available_bytes": self._room(),
        }

    def describe_version(self, weights: str | int) -> dict[str, Any]:
        """What `GET /weights` tells of one version, by a name or id. Blocking.

        Raises:
            VersionNotFoundError: it is not in memory.
        """
        found = self._alive(weights)
        version_id = None if found is None else found.version_id
        for described in describe_versions(self.versions.live()):
            if described["version"] == version_id:
                return described
        raise VersionNotFoundError(f"Weight version {weights} is not in memory.", remedy="GET /weights lists those.")

    def planned_bytes(self, mapping: Mapping[str, str]) -> tuple[int, int]:
        """What the named weights take now, and what they would take from the given sources. Reads headers.

        Args:
            mapping: logical names, no patterns → sources.

        Raises:
            PlanError, CheckpointError: see `ModelLoader.planned_bytes`.
        """
        served = self._served
        after = served.loader.planned_bytes(mapping)
        sizes = {origin.name: served.version[slot].nbytes for slot, origin in served.version.origins.items()}
        return sum(sizes[name] for name in mapping), after

    def model_info(self) -> dict[str, Any]:
        """What `GET /model_info` answers: architecture, sizes, sources, weights and bytes by precision, memory."""
        described = describe_model(
            self.model_name, self.settings, self._served, self.engine, self.defaults, self.loaded_seconds
        )
        return {**described, "has_chat_template": self.tokenizer.has_chat_template}

    def expert_info(self, layer_id: int, expert_id: int) -> dict[str, Any]:
        """Where each projection of one expert comes from, and how much it is used; None if nothing is counted.

        Raises:
            RequestError: the model has no such expert.
        """
        projections = describe_projections(self.version, layer_id, expert_id)
        return {
            "layer_id": layer_id,
            "expert_id": expert_id,
            "num_experts": self.spec.num_experts,
            "use": None if self.statistics is None else self.statistics.use_of(layer_id, expert_id),
            "projections": projections,
        }

    def manifest(self, *, sha256: bool = False) -> dict[str, Any]:
        """Where every weight of the newest version came from, and the layout that it has in memory.

        Args:
            sha256: with digests of the files' bytes, all of which are read. Blocking.

        Raises:
            CheckpointError: a file has changed since the version was built from it.
            ConflictError: digests are being computed already.
        """
        served = self._served
        version = served.version
        document = self._digested(served) if sha256 else manifest(version.fingerprint, version.origins)
        return describe_manifest(version, document)

    def _digested(self, served: ServedWeights) -> dict[str, Any]:
        if not self._hashing.acquire(blocking=False):
            raise ConflictError("Digests are being computed already.", remedy="Try again when they are done.")
        try:
            planned = served.loader.plan(served.rules)
            return plan_manifest(planned, self.settings.engine.num_load_threads, self._unless_closing)
        finally:
            self._hashing.release()

    def close(self) -> None:
        """Stop the engine; requests that still run end with an error, and a change of the weights under way too.

        Statistics that are to be kept are saved.
        """
        self.jobs.close()
        if self.autoplan is not None:
            self.autoplan.close()
        self.trials.close()
        self.engine.stop()
        if self._tracker is not None:
            self._tracker.close()
        self.versions.close()
        if self._history is not None:
            self._history.close()

    def _note_ended(self, request: Request, output: RequestOutput) -> None:
        """In the step thread."""
        if self.autoplan is not None:
            self.autoplan.note(request, output)
        self.trials.note(request, output)

    def _note_failed(self, failed: FailedVersion) -> None:
        """A version has been left. In the step thread: what takes time is done in another one."""
        self.trials.version_failed(failed)
        self.trials.current_changed(self.version_id)
        failed_id, reason = failed.version.version_id, failed.reason  # and not the version, which is to go
        StoppableThread(lambda: self._follow_back(failed_id, reason), "amalgam-rollback", self.jobs.close).start()

    def _follow_back(self, failed_id: int, reason: str) -> None:
        """What followed a version that has been left goes back with the others."""
        with self._following:  # its change may still be at it
            served = self._served
            record = self._remaps.add_failed_version(served.version_id, served.rules, failed_id, reason)
            what = f"version {failed_id} could not answer"
            self.jobs.add(replace(status_of_record(record), kind="failed_version", what=what))
            if self._earlier_versions[-1:] == [served.version_id]:
                self._earlier_versions = self._earlier_versions[:-1]
            if self._earlier_rules[-1:] == [served.rules]:
                self._earlier_rules = self._earlier_rules[:-1]
            if self._speculation is not None:
                self._speculation.follow(served.loader, served.rules, served.version, self._unless_closing)
        self.versions.has_freed()

    def _unless_closing(self, what: str, done: int, total: int) -> None:
        """A `Progress` that ends long work when nobody wants it any more."""
        self.jobs.check_open()

    @contextmanager
    def _change(self, kind: str, what: str) -> Iterator[ServedWeights]:
        """Refuses instead of waiting: the second of two re-maps must not silently follow the first."""
        with self.jobs.begin(kind, what) as job:
            served = self._served
            try:
                yield served
            except Exception as error:
                self._remaps.add_failure(served.version.version_id, job.status().seconds, error)
                raise

    @property
    def _job(self) -> Job:
        """The change under way, of which the caller is a part."""
        job = self.jobs.running
        assert job is not None
        return job

    def _make(self, request: ChangeRequest, served: ServedWeights, progress: Progress | None = None) -> RemapResult:
        """Fulfil a request, beside nothing else that changes the weights."""
        started = time.monotonic()
        prepared = self._prepare(request, served)
        if isinstance(prepared, ServedWeights):
            return self._go_live(prepared, None, started, request.name)
        self._load_of(prepared).check_room(self._room())

        job, shared = self._job, prepared.shared
        job.begin_stage(LOADING, sum(shared.keys.get(weight.slot.name) != weight.key for weight in prepared.planned))

        def step(what: str, done: int, total: int) -> None:
            job.report(what, done, total)
            if progress is not None:
                progress(what, done, total)

        turns = Turns(lambda: self.engine.status().num_running > 0, job.check)
        loaded = prepared.loader.build(prepared.planned, self.versions.next_id(), prepared.shared, step, turns)
        if loaded.read_bytes:
            self._seconds_per_byte = loaded.seconds / loaded.read_bytes
        made = ServedWeights(prepared.loader, loaded.version, prepared.rules)
        return self._go_live(made, loaded, started, request.name)

    def _prepare(self, request: ChangeRequest, served: ServedWeights) -> ServedWeights | Prepared:
        """The version that a request asks for, if it is in memory, or what it is made of."""
        loader, rules = served.loader, request.rules_after(served.rules)
        if request.version is not None:
            found = self._alive(request.version)
            if found is not None:
                return found
            rules = self._rules_of(request.version)
        if request.name is not None:
            self.versions.check_new(request.name)
        if request.is_reload:
            loader = loader.reopen()
        planned = loader.plan(rules)
        others = [version for version in self.versions.versions if version is not served.version]
        return Prepared(loader, rules, planned, shared_weights(planned, served.version, *others))

    def _room(self) -> int:
        """Bytes of memory for more weights: what is available but for what the KV cache will take of it."""
        return max(0, available_bytes(self.loader.device) - self.engine.untouched_bytes)

    def _load_of(self, prepared: Prepared) -> Load:
        return Load.of(prepared, self.settings.engine.num_load_threads)

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
            available_bytes=self._room(),
            seconds=time.monotonic() - started + load.read_bytes * self._seconds_per_byte,
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
        self.engine.prepare(after)
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
            self.versions.name(name, served)
            self._remaps.add(result, served.rules)
        else:
            with self._following:
                self.versions.make_current(served)
                self._remaps.add(result, served.rules)  # before what takes longer: a process may be killed in it
                self.trials.current_changed(self.version_id)  # it may have failed already
                if after is not before.version:
                    self._earlier_versions = [*self._earlier_versions, before.version_id][-MAX_UNDOS:]
                if served.rules != before.rules:
                    self._earlier_rules = [*self._earlier_rules, before.rules][-MAX_UNDOS:]
                if self._speculation is not None:
                    self._speculation.follow(served.loader, served.rules, after, job.report)
                    self.versions.has_freed()
        job.result = result
        return result

    def _alive(self, version: str | int) -> ServedWeights | None:
        version_id = as_id(version)
        return self.versions.find(version) if version_id is None else self.versions.alive(version_id)

    def _rules_of(self, version: str | int) -> tuple[Rule, ...]:
        rules = self._remaps.rules_of(as_id(version) or 0)
        if rules is None:
            raise VersionNotFoundError(
                f"Nobody knows weight version {version}.", remedy="GET /weights/changes tells of earlier ones."
            )
        return rules
