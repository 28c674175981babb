"""All replicas as one deployment, so that the server's own endpoints, metrics and dashboard serve a cluster.

In: what the server asks of a model (`server.interface.Deployment`). Out: what all replicas answer together. Must never
know: HTTP. Requests for tokens never come here: the gateway sends them to a replica as they are.

Everything that asks replicas blocks and belongs into a thread; what the event loop may ask at any time (`status`,
`version_id`, `rules`, …) is told from what was heard last.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from amalgam.cluster.coordinator import Coordinator
from amalgam.cluster.interface import Counted, Description
from amalgam.cluster.members import Members
from amalgam.cluster.merging import Ledger, added, highest, merge_statuses
from amalgam.cluster.routing import Routing
from amalgam.config.placement import PlacementLike, Rule
from amalgam.config.settings import Settings
from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.meter import Meter, Reading
from amalgam.engine.request import EngineStatus
from amalgam.errors import ConflictError, ReplicaLostError, UnavailableError, UnsupportedError
from amalgam.experts.snapshot import ResetResult
from amalgam.runtime.changes import ChangeRequest, RemapRecord, RemapResult
from amalgam.runtime.devices import DeviceFigures, together
from amalgam.runtime.jobs import Job, Jobs

STATISTICS_SECONDS = 2.0  # how old merged statistics may be
READING_SECONDS = 0.5
NUM_ATTEMPTS = 3  # where a replica goes, or others merge, in between


class ClusterDeployment:
    """See above.

    Args:
        description: of one replica, for what all have in common.
        close: ends what looks after the replicas.
    """

    autoplan = None

    def __init__(
        self,
        settings: Settings,
        description: Description,
        members: Members,
        routing: Routing,
        coordinator: Coordinator,
        close: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.model_name = description.model_name
        self.defaults: ModelDefaults = description.defaults
        self.engine = ClusterEngine(description, members, routing)
        self.statistics = ClusterStatistics(members, routing) if description.counts_experts else None
        self.versions = ClusterVersions(members, coordinator)
        self.trials = ClusterTrials(coordinator)
        self._members = members
        self._coordinator = coordinator
        self._close = close

    @property
    def tokenizer(self) -> Any:
        _not_here("The gateway has no tokenizer.")

    @property
    def version_id(self) -> int:
        return self._coordinator.version_id

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self._coordinator.rules

    def version_for(self, weights: str | int | None = None, key: str | None = None) -> NoReturn:
        _not_here("The gateway has no weights.")

    @property
    def configured_rules(self) -> tuple[Rule, ...]:
        return self.settings.model.mixed_precision.all_rules

    @property
    def num_undoable(self) -> int:
        return self._coordinator.num_undoable

    @property
    def jobs(self) -> Jobs:
        return self._coordinator.jobs

    @property
    def remaps(self) -> list[RemapRecord]:
        return self._coordinator.log.read()

    def model_info(self) -> dict[str, Any]:
        """That of one replica, and how many there are."""
        info: dict[str, Any] = self._members.any("model_info")
        return {**info, "replicas": len(self._members.ids())}

    def device_figures(self) -> dict[str, DeviceFigures]:
        """Of all replicas together."""
        return together(self._members.all(self._members.ids(), "device_figures").results.values())

    def expert_info(self, layer_id: int, expert_id: int) -> dict[str, Any]:
        info: dict[str, Any] = self._members.any("expert_info", layer_id, expert_id)
        return info if self.statistics is None else {**info, "use": self.statistics.use_of(layer_id, expert_id)}

    def manifest(self, *, sha256: bool = False) -> dict[str, Any]:
        if sha256:
            raise UnsupportedError(
                "Digests of files are computed on one machine, and replicas may be on several.",
                remedy="Ask `amalgam serve` with the same configuration.",
            )
        document: dict[str, Any] = self._members.any("manifest")
        return document

    def describe_weights(self) -> dict[str, Any]:
        """What one replica has in memory, with the requests of all replicas on each version."""
        found: dict[str, Any] = self._members.any("describe_weights")
        requests = self.engine.status().versions
        versions = [{**one, "requests": requests.get(one["version"], 0)} for one in found["versions"]]
        return {**found, "versions": versions}

    def describe_version(self, weights: str | int) -> dict[str, Any]:
        found: dict[str, Any] = self._members.any("describe_version", weights)
        return {**found, "requests": self.engine.status().versions.get(found["version"], 0)}

    def difference(self, before: str | int, after: str | int) -> Any:
        return self._members.any("difference", before, after)

    def plan_change(self, request: ChangeRequest) -> Any:
        """Of one replica; bytes and seconds are those of each."""
        return self._members.any("plan_change", request)

    def change(self, request: ChangeRequest) -> RemapResult:
        return self._coordinator.change(request)

    def rollback(self, version: str | int | None = None) -> RemapResult:
        return self._coordinator.rollback(version)

    def update_weight_mapping(self, mapping: Mapping[str, PlacementLike | None]) -> RemapResult:
        return self.change(ChangeRequest(mapping=dict(mapping)))

    def undo_weight_mapping(self, version_id: int) -> RemapResult:
        return self._coordinator.undo(version_id)

    def reload_weights(self) -> RemapResult:
        return self.change(ChangeRequest(is_reload=True))

    def start_change(self, request: ChangeRequest) -> Job:
        return self._coordinator.start(request)

    def start_rollback(self) -> Job:
        return self._coordinator.start_rollback()

    def close(self) -> None:
        """Replicas go on: they are not the gateway's to close."""
        self._coordinator.close()
        self._close()


class ClusterEngine:
    """The engines of all replicas, as far as the gateway asks for them."""

    def __init__(self, description: Description, members: Members, routing: Routing) -> None:
        self.max_prompt_tokens = description.max_prompt_tokens
        self.meter = ClusterMeter(members)
        self._routing = routing

    def status(self) -> EngineStatus:
        """Of all replicas together, as they were heard last."""
        return merge_statuses([seen.state.status for seen in list(self._routing.replicas.values())])

    def stop(self) -> None:
        """Nothing runs here."""

    def check_prompt_length(self, num_tokens: int, num_new_tokens: int = 1) -> NoReturn:
        _not_here("The gateway computes nothing.")

    def checked_prompt(self, prompt_ids: Sequence[int], num_new_tokens: int = 1) -> NoReturn:
        _not_here("The gateway computes nothing.")

    def stream(self, *arguments: Any, **named: Any) -> NoReturn:
        _not_here("The gateway computes nothing.")

    def embed(self, *arguments: Any, **named: Any) -> NoReturn:
        _not_here("The gateway computes nothing.")

    def between_steps(self) -> NoReturn:
        _not_here("The gateway computes nothing.")


class ClusterMeter(Meter):
    """The meters of all replicas. `read` blocks."""

    def __init__(self, members: Members) -> None:
        super().__init__()
        self._members = members
        self._ledger = Ledger()
        self._reading_lock = threading.Lock()
        self._read_at = 0.0
        self._asked: set[str] = set()

    def read(self) -> Reading:
        """What all replicas have counted, those that have gone too."""
        with self._reading_lock:
            if time.monotonic() - self._read_at > READING_SECONDS:
                self._refresh()
            total = self._ledger.total()
        return super().read() if total is None else total

    def _refresh(self) -> None:
        ids = set(self._members.ids())
        for replica_id in self._asked - ids:
            self._ledger.retire(replica_id)
        for replica_id, reading in self._members.all(sorted(ids), "reading").results.items():
            self._ledger.note(replica_id, reading)
        self._asked = ids
        self._read_at = time.monotonic()


class ClusterStatistics:
    """The expert statistics of all replicas, merged in one of them and asked there.

    That replica has everything that answers are made of, and whoever merges needs the memory for it once.
    """

    def __init__(self, members: Members, routing: Routing) -> None:
        self._members = members
        self._routing = routing
        self._lock = threading.Lock()
        self._merged: tuple[str, str] | None = None  # the replica, and the key to ask it by
        self._merged_at = 0.0
        self._latest: dict[str, Counted] = {}  # of each replica, those that have gone too
        self._by_format: dict[str, dict[tuple[str, str], int]] = {}  # the same

    @property
    def revision(self) -> int:
        """Changes whenever the statistics of a replica do. The event loop may ask."""
        seen = list(self._routing.replicas.values())
        return sum(one.state.statistics_revision or 0 for one in seen) + len(self._latest)

    def reset(self) -> ResetResult:
        """Forget all counts in all replicas."""
        with self._lock:
            self._latest.clear()
            self._merged = None
            results: list[ResetResult] = list(
                self._members.all(self._members.ids(), "reset_statistics").results.values()
            )
        if not results:
            raise UnavailableError("No replica is ready.", remedy="GET /ready tells when requests are taken.")
        return ResetResult(
            num_activations=sum(result.num_activations for result in results),
            num_tokens=sum(result.num_tokens for result in results),
            num_requests=sum(result.num_requests for result in results),
            seconds=max(result.seconds for result in results),
        )

    def describe(self) -> Any:
        return self._ask("describe")

    def overview(self, minutes: float | None = None, top_k: int | None = None) -> Any:
        return self._ask("overview", minutes, top_k)

    def by_layer(self) -> Any:
        return self._ask("by_layer")

    def activations_by_format(self) -> dict[tuple[str, str], int]:
        """(projection, format) → activations in all replicas, each since its start."""
        latest = self._members.all(self._members.ids(), "activations_by_format").results
        with self._lock:
            for replica_id, told in latest.items():  # another caller may have heard of more meanwhile
                self._by_format[replica_id] = highest(self._by_format.get(replica_id, {}), told)
            return added(self._by_format.values())

    def grid(
        self, minutes: float | None = None, label: str | None = None, phase: str = "all", measure: str = "count"
    ) -> Any:
        return self._ask("grid", minutes, label, phase, measure)

    def labels(self) -> Any:
        return self._ask("labels")

    def compare(self, first: str, second: str, folder: str, phase: str = "all", measure: str = "count") -> Any:
        return self._ask("compare", first, second, folder, phase, measure)

    def coactivation(self, layer_id: int) -> Any:
        return self._ask("coactivation", layer_id)

    def transitions(self, layer_id: int) -> Any:
        return self._ask("transitions", layer_id)

    def concentration(self, minutes: float | None = None) -> Any:
        return self._ask("concentration", minutes)

    def hints(self, minutes: float | None = None) -> Any:
        return self._ask("hints", minutes)

    def precision_map(self, weight_version: int | None = None) -> Any:
        return self._ask("precision_map", weight_version)

    def use_of(self, layer_id: int, expert_id: int) -> Any:
        return self._ask("use_of", layer_id, expert_id)

    def export(self, format: str, minutes: float | None = None) -> Any:
        return self._ask("export", format, minutes)

    def export_to(self, folder: str, format: str, minutes: float | None = None) -> Any:
        return self._ask("export_to", folder, format, minutes)

    def save_set(self, folder: str, name: str, of: Sequence[str] | None = None) -> Any:
        return self._ask("save_set", folder, name, of)

    def _ask(self, method: str, *args: Any) -> Any:
        for attempt in range(NUM_ATTEMPTS):
            replica_id, key = self._merge(anew=attempt > 0)
            try:
                return self._members.call(replica_id, "statistics", key, method, *args)
            except (ReplicaLostError, ConflictError):  # it has gone, or another gateway has others merged
                continue
        raise UnavailableError("The replicas' statistics cannot be merged.", remedy="Try again.")

    def _merge(self, *, anew: bool) -> tuple[str, str]:
        """Have the statistics merged unless that was done just now."""
        with self._lock:
            if self._merged is not None and not anew and time.monotonic() - self._merged_at < STATISTICS_SECONDS:
                return self._merged
            ids = self._members.ids()
            for leader in ids:
                self._latest |= self._members.all(ids, "counted").results
                key = secrets.token_hex(8)
                counted = [one for replica_id, one in self._latest.items() if replica_id != leader]
                try:
                    self._members.call(leader, "merge", key, counted)
                except ReplicaLostError:
                    continue
                self._merged, self._merged_at = (leader, key), time.monotonic()
                return self._merged
        raise UnavailableError("No replica is ready.", remedy="GET /ready tells when requests are taken.")


class ClusterVersions:
    """What the endpoints ask of the book of versions."""

    def __init__(self, members: Members, coordinator: Coordinator) -> None:
        self._members = members
        self._coordinator = coordinator

    def pin(self, version_id: int) -> None:
        """Versions are kept by name in a cluster: replicas that come later would not have a pinned one."""
        raise UnsupportedError(
            f"Weight version {version_id} cannot be pinned in a cluster.",
            remedy="Give it a name: PUT /weights/named/NAME. Replicas that come later have it, too.",
        )

    unpin = pin

    def remove_name(self, name: str) -> RemovedName:
        return RemovedName(self._coordinator.remove_name(name))


class RemovedName:
    """The version that has lost a name."""

    def __init__(self, version_id: int) -> None:
        self.version_id = version_id


class ClusterTrials:
    """No candidate is tried on a cluster; versions that could not answer are counted."""

    canary = None
    shadow = None

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    @property
    def num_failed_versions(self) -> int:
        return self._coordinator.num_failed_versions

    def _refuse(self, *arguments: Any, **named: Any) -> NoReturn:
        raise UnsupportedError(
            "Candidates are not tried on several replicas.",
            remedy="Try them with `amalgam serve`, or name a version and send requests to it.",
        )

    start_canary = start_shadow = promote = abort = _refuse

    def report(self, kind: str) -> dict[str, Any]:
        """As of a server on which none was tried."""
        return {"state": "none"}


def _not_here(what: str) -> NoReturn:
    raise UnsupportedError(what, remedy="Requests for tokens go to a replica.")
