"""A running model: its engine, and live changes of its weights.

What the server, the command line and the Python interface use; `opening` makes it. Must never know: HTTP, terminals.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from amalgam.composition.loader import LoadedVersion, ModelLoader
from amalgam.composition.manifest import plan_manifest
from amalgam.config.settings import Rule, Settings, build_rules
from amalgam.engine.core import Engine
from amalgam.engine.generation_config import ModelDefaults
from amalgam.errors import ConflictError, PlanError, UnavailableError
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion, manifest
from amalgam.planning.following import Proposer
from amalgam.runtime.autoplan import Autoplan
from amalgam.runtime.changes import RemapLog, RemapRecord, RemapResult, changed_weights
from amalgam.runtime.describe import describe_manifest, describe_model, describe_projections
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.speculation import Speculation
from amalgam.runtime.statistics import ExpertStatistics
from amalgam.text.tokenizer import Tokenizer

MAX_UNDOS = 64


class Deployment:
    """A loaded model, its engine, and the weights that new requests start on.

    Attributes:
        statistics: which experts the traffic uses; None where nothing is counted.
        autoplan: gives it other weights when the traffic changes, once it is started; None where that is not wanted.
        defaults: how the model is sampled where a request says nothing.
        loaded_seconds: what reading its first weights took.
    """

    def __init__(
        self,
        settings: Settings,
        loader: ModelLoader,
        loaded: LoadedVersion,
        engine: Engine,
        tokenizer: Tokenizer,
        tracker: ExpertTracker | None,
        defaults: ModelDefaults,
        proposer: Proposer | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.settings = settings
        self.defaults = defaults
        self.engine = engine
        self.tokenizer = tokenizer
        self.loaded_seconds = loaded.seconds
        self._served = ServedWeights(loader, loaded.version, self.configured_rules)
        self._changing, self._hashing = threading.Lock(), threading.Lock()
        self._remaps = RemapLog()
        self._is_closing = threading.Event()
        self._earlier_rules: deque[tuple[Rule, ...]] = deque(maxlen=MAX_UNDOS)  # the latest last
        self._tracker = tracker
        self._speculation = speculation
        self.statistics = (
            None if tracker is None else ExpertStatistics(tracker, lambda: self.version, model=self.model_name)
        )
        self._alive: WeakSet[WeightVersion] = WeakSet([loaded.version])
        self._alive_lock = threading.Lock()  # a set that grows while it is read raises
        self.autoplan: Autoplan | None = None
        if proposer is not None and tracker is not None:
            self.autoplan = Autoplan(self, tracker, proposer)
            engine.on_ended = self.autoplan.ring.add

    @property
    def spec(self) -> ModelSpec:
        return self._served.spec

    @property
    def version(self) -> WeightVersion:
        """The newest weight version, which new requests start on."""
        return self._served.version

    @property
    def version_id(self) -> int:
        return self._served.version.version_id

    @property
    def live_versions(self) -> list[WeightVersion]:
        """The newest weight version, and those that requests in flight have begun with."""
        with self._alive_lock:
            return list(self._alive)

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
        """The latest attempts to change the weights, oldest first."""
        return self._remaps.read()

    @property
    def model_name(self) -> str:
        return self.settings.model.name or self._served.loader.base_folder.name

    def update_weight_mapping(self, mapping: Mapping[str, str]) -> RemapResult:
        """Add rules (name or pattern → source), build a new version and let new requests start on it.

        Requests in flight finish on their version. A rule for a pattern that has one already replaces it. Blocking.

        Raises:
            ConflictError: another change is under way.
            PlanError, CheckpointError: the mapping cannot be fulfilled; nothing has changed.
        """
        if not mapping:
            raise PlanError("weight_mapping is empty.", remedy="Give at least one name or pattern and its source.")
        added = build_rules(mapping)
        with self._change() as served:
            kept = (rule for rule in served.rules if rule.pattern not in mapping)
            result = self._go_live(served.loader, (*kept, *added))
            self._earlier_rules.append(served.rules)
            return result

    def adopt(self, loaded: LoadedVersion, rules: tuple[Rule, ...], version_id: int) -> RemapResult:
        """Let new requests start on a version that was built beside the one in use.

        Args:
            rules: that it follows.
            version_id: the version in use when it was built.

        Raises:
            ConflictError: another version is in use now, or another change is under way.
        """
        with self._change() as served:
            if version_id != served.version.version_id:
                raise ConflictError(
                    f"Weight version {version_id} is not in use any more: {served.version.version_id} is.",
                    remedy="The change is given up.",
                )
            result = self._go_live(served.loader, rules, loaded)
            self._earlier_rules.append(served.rules)
            return result

    def undo_weight_mapping(self, version_id: int) -> RemapResult:
        """Go back to the rules before the latest `update_weight_mapping`. Blocking.

        Args:
            version_id: the version in use, as the caller knows it: a change by somebody else is not taken back.

        Raises:
            ConflictError: another version is in use, or there is nothing to take back.
            PlanError, CheckpointError: the earlier rules cannot be fulfilled any more; nothing has changed.
        """
        with self._change() as served:
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
            result = self._go_live(served.loader, self._earlier_rules[-1])
            self._earlier_rules.pop()
            return result

    def reload_weights(self) -> RemapResult:
        """Build a new version under the same rules from the files as they are now; unchanged weights are shared.

        Raises:
            ConflictError: another change is under way.
            PlanError, CheckpointError: the files do not fit any more; nothing has changed.
        """
        with self._change() as served:
            return self._go_live(served.loader.reopen(), served.rules)

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
        self._is_closing.set()
        if self.autoplan is not None:
            self.autoplan.close()
        self.engine.stop()
        if self._tracker is not None:
            self._tracker.close()

    def _unless_closing(self, what: str, done: int, total: int) -> None:
        """A `Progress` that ends long work when nobody wants it any more."""
        if self._is_closing.is_set():
            raise UnavailableError("The model has been closed.", remedy="Open it again.")

    @contextmanager
    def _change(self) -> Iterator[ServedWeights]:
        """Refuses instead of waiting: the second of two re-maps must not silently follow the first."""
        if not self._changing.acquire(blocking=False):
            raise ConflictError("Another change of the weights is under way.", remedy="Try again when it is done.")
        started, served = time.monotonic(), self._served
        try:
            yield served
        except Exception as error:
            self._remaps.add_failure(served.version.version_id, time.monotonic() - started, error)
            raise
        finally:
            self._changing.release()

    def _go_live(
        self, loader: ModelLoader, rules: tuple[Rule, ...], loaded: LoadedVersion | None = None
    ) -> RemapResult:
        started, before = time.monotonic(), self.version
        if loaded is None:
            loaded = loader.build(loader.plan(rules), before.version_id + 1, before, self._unless_closing)
        after = loaded.version
        changed = changed_weights(before, after)
        self.engine.set_version(after)
        self._served = ServedWeights(loader, after, rules)
        with self._alive_lock:
            self._alive.add(after)
        if self._speculation is not None:
            self._speculation.follow(loader, rules, after, self._unless_closing)
        result = RemapResult(
            version=after.version_id,
            previous_version=before.version_id,
            fingerprint=after.fingerprint,
            changed=changed,
            num_loaded=loaded.num_loaded,
            loaded_bytes=loaded.loaded_bytes,
            shared_bytes=loaded.shared_bytes,
            seconds=time.monotonic() - started,
        )
        self._remaps.add(result)
        return result
