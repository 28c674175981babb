"""One replica's side: the application answers what the gateway forwards, and the deployment does what it is told.

In: forwarded requests, calls by name. Out: parts of answers, plain values. Must never know: what carries them, other
replicas.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amalgam.base.machine import this_process
from amalgam.cluster.interface import (
    Counted,
    Description,
    Figures,
    Forwarded,
    Head,
    Noted,
    ReplicaState,
    Take,
    Weights,
)
from amalgam.cluster.merging import merge_saved_sets
from amalgam.config.settings import Settings
from amalgam.config.statistics import StatisticsSettings
from amalgam.engine.meter import Reading
from amalgam.errors import ConflictError, UnsupportedError, VersionNotFoundError
from amalgam.experts.saved.files import from_bytes, to_bytes
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.weights import WeightVersion
from amalgam.runtime.changes import ChangeRequest, RemapResult
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.statistics import ExpertStatistics
from amalgam.runtime.versions import VersionState
from amalgam.server.http.record import RequestRecord
from amalgam.server.in_process import InProcessServer, scope_of
from amalgam.server.service import in_own_thread

# Of the section `server`, beside what all answers need. Keys, origins, rates and addresses are the gateway's business.
_KEPT = ("export_dir", "log_prompts", "request_seconds", "stream_comment_seconds")
# What the gateway may call of the deployment as it is.
DEPLOYMENT_CALLS = frozenset({
    "describe_version", "describe_weights", "device_figures", "difference", "expert_info", "manifest", "model_info",
    "plan_change",
})  # fmt: skip
STATISTICS_CALLS = frozenset({
    "by_layer", "coactivation", "compare", "concentration", "describe", "export", "export_to", "grid", "hints",
    "labels", "overview", "precision_map", "save_set", "transitions", "use_of",
})  # fmt: skip
_STATE = "forwarded"

logger = logging.getLogger("amalgam.cluster")


class Member(InProcessServer):
    """A deployment that is one of several."""

    def __init__(self, deployment: Deployment, settings: Settings) -> None:
        super().__init__(deployment, settings, _KEPT)
        self._app.user_middleware.append(Middleware(_CallerOfGateway))  # the innermost: behind what makes a record
        self._deployment = deployment
        self._prepared: dict[int, str] = {}  # version → the name that it is kept by until it goes live
        self._before_id: int | None = None  # the version that is pinned for all to go back to
        self._merged: tuple[str, ExpertStatistics] | None = None

    @property
    def num_requests(self) -> int:
        """Running and waiting."""
        status = self._deployment.engine.status()
        return status.num_running + status.num_waiting

    def close(self) -> None:
        """Release the model. Blocking."""
        self._service.close()

    async def answer(self, request: Forwarded, take: Take) -> None:
        """Give the parts of the answer to `take`, the last of them a `Noted`. To be cancelled if nobody wants it.

        Raises:
            UnavailableError: the answer has ended before its last part.
        """
        headers = (*request.headers, (b"x-request-id", request.request_id.encode()))
        scope = {**scope_of(request.method, request.path, headers, request.query), "state": {_STATE: request}}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                await take(Head(message["status"], tuple(map(tuple, message.get("headers", ())))))
            elif body := message.get("body", b""):
                await take(body)

        await self._ask(scope, request.body, send)
        await take(_noted(scope))

    async def call(self, method: str, *args: Any) -> Any:
        """What the gateway asks for by name: a method below, or one of the deployment's. It runs in a thread.

        Raises:
            AmalgamError: as the method does.
            UnsupportedError: there is no such method to call.
        """
        if method in DEPLOYMENT_CALLS:
            return await in_own_thread(lambda: getattr(self._deployment, method)(*args))
        if method not in CALLS:
            raise UnsupportedError(f"A replica has no {method!r} to call.")
        return await in_own_thread(lambda: getattr(self, method)(*args))

    # What follows blocks, and is called by name.

    def state(self) -> ReplicaState:
        """What the router and the coordinator look at all the time."""
        deployment, versions = self._deployment, self._deployment.versions
        # Before the version's number: a version that fails in between is still told as on probation.
        live = [one for one in versions.live() if any(state != "draining" for state in one.states)]
        hidden = set(self._prepared.values())
        return ReplicaState(
            version_id=deployment.version_id,
            names={name: one.version.version_id for one in live for name in one.names if name not in hidden},
            kept_ids=frozenset(one.version.version_id for one in live),
            coming_id=versions.coming_id,
            is_on_probation=any(VersionState.FALLBACK in one.states for one in live),
            before_id=self._before_id,
            status=deployment.engine.status(),
            statistics_revision=None if deployment.statistics is None else deployment.statistics.revision,
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def describe(self) -> Description:
        """What the gateway asks once."""
        deployment, hidden = self._deployment, set(self._prepared.values())
        named = {
            name: weights_of(one.served)
            for one in deployment.versions.live()
            for name in one.names
            if name not in hidden
        }
        return Description(
            current=weights_of(deployment.versions.current),
            named=named,
            model_name=deployment.model_name,
            defaults=deployment.defaults,
            max_prompt_tokens=deployment.engine.max_prompt_tokens,
            counts_experts=deployment.statistics is not None,
            before=self._before(),
        )

    def _before(self) -> Weights | None:
        found = None if self._before_id is None else self._deployment.versions.alive(self._before_id)
        return None if found is None else weights_of(found)

    def reading(self) -> Reading:
        """Of the engine's meter."""
        return self._deployment.engine.meter.read()

    def figures(self) -> Figures:
        """Of the process and its filters."""
        return Figures(socket.gethostname(), this_process(), dict(self._service.filter_counts()))

    def rules_of(self, version_id: int) -> Any:
        """The rules of a version that there has been; None: nobody here knows."""
        found = self._deployment.versions.alive(version_id)
        return found.rules if found is not None else self._deployment.rules_of(version_id)

    def prepare(self, request: ChangeRequest, keep_as: str) -> tuple[RemapResult, str]:
        """Build what a change asks for and keep it; new requests start on the version in use as before.

        Args:
            keep_as: a name that keeps it until `go_live` or `discard`.

        Returns:
            what was made, and the digest of what it is made of.

        Raises: see `Deployment.change`.
        """
        versions, wanted = self._deployment.versions, request.version_id
        if wanted is not None:  # the cluster's number: a version that has failed here, or was left, may come back
            if (alive := versions.alive(wanted)) is not None and alive.rules == request.rules:
                request = ChangeRequest(version=wanted)
            elif alive is None:
                versions.release_id(wanted)
        result = self._deployment.change(replace(request, name=keep_as))
        self._prepared[result.version] = keep_as
        return result, digest_of(self._deployment.versions.find(keep_as).version)

    def go_live(self, version_id: int, name: str | None = None, keeps_before: bool = False) -> RemapResult:
        """Let new requests start on a version that is in memory, or give it the name that a change asked for.

        Args:
            keeps_before: whether the version in use is kept until `release`, so that all can go back to it; unless one
                is kept already: those after it have yet to show that they answer.

        Raises:
            VersionNotFoundError: it is not in memory.
        """
        before_id = self._deployment.version_id
        if self._deployment.versions.alive(version_id) is None:
            raise VersionNotFoundError(f"Weight version {version_id} is not in memory.")
        if keeps_before and self._before_id is None and version_id != before_id:
            self._keep(before_id)
        result = self._deployment.change(ChangeRequest(version=version_id, name=name))
        if name is None and (not keeps_before or version_id == self._before_id):
            self.release()
        return result

    def release(self) -> None:
        """Nobody goes back any more. Harmless when repeated."""
        before_id, self._before_id = self._before_id, None
        if before_id is not None:
            self._deployment.versions.unpin(before_id)

    def _keep(self, version_id: int) -> None:
        try:
            self._deployment.versions.pin(version_id)
        except ConflictError as error:  # as many are kept as may be; to go back it would be built again
            logger.warning("version %d is not kept to go back to: %s", version_id, error)
            return
        self._before_id = version_id

    def discard(self, version_id: int | None = None) -> None:
        """Keep what was prepared no longer, unless it is in use; None: all of it. Harmless when repeated."""
        for prepared in list(self._prepared) if version_id is None else [version_id]:
            name = self._prepared.pop(prepared, None)
            if name is not None:
                self._deployment.versions.remove_name(name)

    def cancel(self) -> None:
        """Have the change under way give up, if there is one."""
        job = self._deployment.jobs.running
        if job is not None:
            job.stop()

    def remove_name(self, name: str) -> int:
        """Take a name away; the id of its version."""
        return self._deployment.versions.remove_name(name).version_id

    def counted(self) -> Counted:
        """All that has been counted since the last reset."""
        return Counted(to_bytes(self._tracker.saved_set(with_history=True)), self._tracker.snapshot().decaying_rate)

    def activations_by_format(self) -> dict[tuple[str, str], int]:
        """See `ExpertStatistics.activations_by_format`."""
        return self._statistics.activations_by_format()

    def reset_statistics(self) -> Any:
        """Forget all counts here; what they were."""
        return self._statistics.reset()

    def merge(self, key: str, others: Sequence[Counted]) -> None:
        """Make one of the statistics here and those of others, to be asked for by `key` until the next one is made.

        What was activated last, one by one, is not merged: there is no such list.
        """
        sets = [self._tracker.saved_set(with_history=True)]
        sets += [from_bytes(other.content, "a replica's statistics") for other in others]
        rates = self._tracker.snapshot().decaying_rate + sum(other.rates for other in others)
        settings = StatisticsSettings(**{**self._tracker.settings.model_dump(), "file": "", "save_seconds": 60.0})
        whole = ExpertTracker(
            sets[0].layer_ids, sets[0].expert_counts, sets[0].num_active_experts, settings, model=sets[0].model
        )
        whole.restore(merge_saved_sets(sets), "the replicas' statistics")
        whole.restore_rates(rates)
        deployment = self._deployment
        self._merged = (
            key,
            ExpertStatistics(whole, lambda: deployment.version, deployment.version_in_memory, deployment.model_name),
        )

    def statistics(self, key: str, method: str, *args: Any) -> Any:
        """What the statistics that were merged under `key` answer.

        Raises:
            ConflictError: others have been merged since.
        """
        if method not in STATISTICS_CALLS:
            raise UnsupportedError(f"The statistics have no {method!r} to call.")
        if self._merged is None or self._merged[0] != key:
            raise ConflictError("These statistics have been merged anew.")
        return getattr(self._merged[1], method)(*args)

    @property
    def _statistics(self) -> ExpertStatistics:
        statistics = self._deployment.statistics
        if statistics is None:
            raise UnsupportedError("Expert statistics are not kept here.", remedy="Set statistics.enabled.")
        return statistics

    @property
    def _tracker(self) -> ExpertTracker:
        return self._statistics.tracker


CALLS = frozenset({
    "activations_by_format", "cancel", "counted", "describe", "discard", "figures", "go_live", "merge", "prepare",
    "reading", "release", "remove_name", "reset_statistics", "rules_of", "state", "statistics",
})  # fmt: skip


def weights_of(served: ServedWeights) -> Weights:
    return Weights(served.version_id, served.rules, digest_of(served.version))


def digest_of(version: WeightVersion) -> str:
    """16 hexadecimal digits over every weight's name, source, format and shape; not over the files' state."""
    digest = hashlib.sha256()
    for slot, origin in sorted(version.origins.items()):
        digest.update(repr((slot, origin.name, origin.source, origin.format, origin.shape)).encode() + b"\n")
    return digest.hexdigest()[:16]


class _CallerOfGateway:
    """Notes of a forwarded request what the gateway has found out about its caller."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (request := scope.get("state", {}).get(_STATE)) is not None:
            record: RequestRecord = scope["state"]["record"]
            record.priority, record.may_overtake = request.priority, request.may_overtake
        await self.app(scope, receive, send)


def _noted(scope: Scope) -> Noted:
    record: RequestRecord = scope["state"]["record"]
    names = set(Noted.__dataclass_fields__) - {"finish_reasons", "prompts", "refusal"}
    known = {name: getattr(record, name) for name in names}
    refusal = scope["state"].get("refusal")
    return Noted(**known, finish_reasons=tuple(record.finish_reasons), prompts=tuple(record.prompts), refusal=refusal)
