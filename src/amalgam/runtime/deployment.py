"""A running model: its engine, and live changes of its weights.

What the server, the command line and the Python interface use; `opening` makes it. Must never know: HTTP, terminals.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from amalgam.base.threads import StoppableThread
from amalgam.composition.loader import LoadedVersion, ModelLoader
from amalgam.composition.manifest import plan_manifest
from amalgam.composition.progress import Progress
from amalgam.config.placement import PlacementLike, Rule
from amalgam.config.settings import Settings
from amalgam.engine.core import Engine
from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.probation import FailedVersion
from amalgam.engine.request import Request, RequestOutput
from amalgam.errors import ConflictError, VersionNotFoundError
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion, manifest
from amalgam.planning.following import Proposer
from amalgam.runtime.autoplan import Autoplan
from amalgam.runtime.beside import KeptBeside
from amalgam.runtime.changes import Asked, ChangeRequest, RemapLog, RemapRecord, RemapResult
from amalgam.runtime.describe import describe_manifest, describe_model, describe_projections, describe_versions
from amalgam.runtime.devices import DeviceFigures, device_figures
from amalgam.runtime.history import HistoryFile, Kept
from amalgam.runtime.jobs import Job, Jobs, status_of_record
from amalgam.runtime.preview import ChangePlan, Difference
from amalgam.runtime.remapper import Remapper
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.speculation import Speculation
from amalgam.runtime.statistics import ExpertStatistics
from amalgam.runtime.trials.trials import Trials
from amalgam.runtime.versions import VersionBook
from amalgam.text.tokenizer import Tokenizer


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
        beside: Sequence[KeptBeside] = (),
    ) -> None:
        self.settings = settings
        self.defaults = defaults
        self.engine = engine
        self.tokenizer = tokenizer
        self.loaded_seconds = loaded.seconds
        self.versions = VersionBook(served, engine)
        self.jobs = Jobs(lambda: self.version_id, () if history is None else map(status_of_record, history.records))
        self._hashing = threading.Lock()
        self._history = history
        self._remaps = RemapLog() if history is None else RemapLog(history.records, history.add)
        self._tell_start(served, loaded)
        for kept in beside:
            self._keep(kept)
        self.versions.on_kept = self._note_kept
        self._note_kept()
        self._remapper = Remapper(settings, self.versions, engine, self.jobs, self._remaps, speculation, loaded)
        self._tracker = tracker
        self.statistics = (
            None
            if tracker is None
            else ExpertStatistics(tracker, lambda: self.version, self.version_in_memory, model=self.model_name)
        )
        self.autoplan: Autoplan | None = None
        if proposer is not None and tracker is not None:
            self.autoplan = Autoplan(self, tracker, proposer)
        self.trials = Trials(self)
        self._remapper.on_live = self.trials.current_changed
        engine.on_ended = self._note_ended
        self.versions.on_failed = self._note_failed
        if self.statistics is not None:
            self.versions.before_change = self.statistics.activations_by_format

    def _keep(self, kept: KeptBeside) -> None:
        """A version that the start has made beside the current one."""
        served = kept.served
        self.versions.restore(served, kept.names, is_pinned=kept.is_pinned)
        if kept.is_new:  # what made another one is told already
            self._tell_start(served, kept.loaded, ", ".join(kept.names))

    def _tell_start(self, served: ServedWeights, loaded: LoadedVersion, name: str | None = None) -> None:
        """The log begins with what a start has made.

        Args:
            name: what it is called; None: it is the current version.
        """
        self._remaps.start(
            RemapRecord(
                at=0.0,
                version=served.version_id,
                previous_version=self.version_id,
                num_changed=0,
                loaded_bytes=loaded.loaded_bytes,
                seconds=loaded.seconds,
                name=name,
                fingerprint="" if self._history is None else served.version.fingerprint,  # which takes a while
                rules=served.rules,
                asked=None if name is None else Asked("start", f"a start, called {name}"),
            )
        )

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
        return self._remapper.num_undoable

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

    def rules_of(self, version_id: int) -> tuple[Rule, ...] | None:
        """The rules of a version that there has been, as far as changes are remembered; None: nobody knows."""
        return self._remaps.rules_of(version_id)

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

    def version_in_memory(self, version_id: int) -> WeightVersion | None:
        """The version of a number while its weights are there, for requests in flight alone too; None: they are not."""
        served = self.versions.alive(version_id)
        return None if served is None else served.version

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
        return self._remapper.change(request, progress)

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

    def update_weight_mapping(self, mapping: Mapping[str, PlacementLike | None]) -> RemapResult:
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
        return self._remapper.adopt(loaded, rules, version_id)

    def undo_weight_mapping(self, version_id: int) -> RemapResult:
        """Go back to the rules before the latest `update_weight_mapping`. Blocking.

        Args:
            version_id: the version in use, as the caller knows it: a change by somebody else is not taken back.

        Raises:
            ConflictError: another version is in use, or there is nothing to take back.
            PlanError, CheckpointError: the earlier rules cannot be fulfilled any more; nothing has changed.
        """
        return self._remapper.undo(version_id)

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
        return self._remapper.rollback(version)

    def plan_change(self, request: ChangeRequest) -> ChangePlan:
        """What `change` would change and take now; reads headers. Blocking.

        Raises:
            VersionNotFoundError: nobody knows the version that is to come back.
            PlanError, CheckpointError: the change could not be made.
        """
        return self._remapper.plan(request)

    def difference(self, before: str | int, after: str | int) -> Difference:
        """In what two versions differ, by names or ids; reads headers for one that has left memory. Blocking.

        Raises:
            VersionNotFoundError: nobody knows one of them.
            PlanError, CheckpointError: what the rules of one ask for is not there any more.
        """
        return self._remapper.difference(before, after)

    def describe_weights(self) -> dict[str, Any]:
        """What `GET /weights` answers: the versions in memory. Blocking."""
        live = self.versions.live()
        weights = {id(weight): weight.nbytes for one in live for weight in one.version.weights}
        return {
            "current": self.version_id,
            "versions": describe_versions(live),
            "bytes": sum(weights.values()),
            "available_bytes": self._remapper.room(),
        }

    def describe_version(self, weights: str | int) -> dict[str, Any]:
        """What `GET /weights` tells of one version, by a name or id. Blocking.

        Raises:
            VersionNotFoundError: it is not in memory.
        """
        found = self._remapper.alive(weights)
        version_id = None if found is None else found.version_id
        for described in describe_versions(self.versions.live()):
            if described["version"] == version_id:
                return described
        raise VersionNotFoundError(f"Weight version {weights} is not in memory.", remedy="GET /weights lists those.")

    def model_info(self) -> dict[str, Any]:
        """What `GET /model_info` answers: architecture, sizes, sources, weights and bytes by precision, memory."""
        described = describe_model(
            self.model_name, self.settings, self._served, self.engine, self.defaults, self.loaded_seconds
        )
        return {
            **described,
            "has_chat_template": self.tokenizer.has_chat_template,
            "counts_experts": self.statistics is not None,
        }

    def device_figures(self) -> dict[str, DeviceFigures]:
        """What lies on each device, and what went to and fro."""
        return device_figures(self._served, self.engine)

    def expert_info(self, layer_id: int, expert_id: int) -> dict[str, Any]:
        """Where each projection of one expert comes from, and how much it is used; None if nothing is counted.

        Raises:
            RequestError: the model has no such expert.
        """
        projections = describe_projections(self.version, layer_id, expert_id, self.loader.devices.primary)
        return {
            "layer_id": layer_id,
            "expert_id": expert_id,
            "num_experts": self.spec.layers[layer_id].mlp.num_experts,
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
        if self._history is not None and self.engine.status().is_alive:
            self._history.note_sound(self.version_id)  # it may have been asked nothing, but has killed nobody
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
        if self._history is not None and output.error is None and output.usage is not None:
            self._note_sound(self._history, output.usage.version)  # last: a process may be out of threads

    def _note_sound(self, history: HistoryFile, version_id: int) -> None:
        """A version has answered. In the step thread: the file is written in another one, once for each version."""
        if not history.is_sound(version_id):
            threading.Thread(target=history.note_sound, args=(version_id,), name="amalgam-history", daemon=True).start()

    def _note_kept(self) -> None:
        """Other versions have names or pins. Written before whoever asked for that hears of it."""
        if self._history is not None:
            self._history.note_kept(lambda: Kept(*self.versions.kept))

    def _note_failed(self, failed: FailedVersion) -> None:
        """A version has been left. In the step thread: what takes time is done in another one."""
        self.trials.version_failed(failed)
        self.trials.current_changed(self.version_id)
        failed_id, reason = failed.version.version_id, failed.reason  # and not the version, which is to go
        follow = partial(self._remapper.follow_back, failed_id, reason)
        StoppableThread(follow, "amalgam-rollback", self.jobs.close).start()

    def _unless_closing(self, what: str, done: int, total: int) -> None:
        """A `Progress` that ends long work when nobody wants it any more."""
        self.jobs.check_open()
