"""The trials of a deployment: at most one canary and one shadow are under way.

In: plans, requests as they end, versions that fail or go live. Out: trials, and changes of the weights.
Must never know: HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch

from amalgam.config.settings import Settings
from amalgam.engine.probation import FailedVersion
from amalgam.engine.request import Request, RequestOutput
from amalgam.errors import AmalgamError, ConflictError
from amalgam.planning.trial_plans import CanaryPlan, Kind, ShadowPlan
from amalgam.planning.trials import Verdict
from amalgam.runtime.changes import ChangeRequest, RemapResult
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.trials.canary import Canary
from amalgam.runtime.trials.shadow import Shadow
from amalgam.runtime.trials.trial import TrialState
from amalgam.runtime.versions import VersionBook

logger = logging.getLogger("amalgam.trial")


class Served(Protocol):
    """What is asked of the deployment; see `Deployment`."""

    @property
    def settings(self) -> Settings: ...
    @property
    def versions(self) -> VersionBook: ...
    def change(self, request: ChangeRequest) -> RemapResult: ...


class Trials:
    """The canary and the shadow of a deployment: one of each at a time. Any thread.

    Attributes:
        num_failed_versions: that have been left since the start, whether they were tried or in use.
    """

    def __init__(self, deployment: Served) -> None:
        self._deployment = deployment
        self._lock = threading.Lock()
        self._canary: Canary | None = None
        self._shadow: Shadow | None = None
        self.num_failed_versions = 0

    @property
    def canary(self) -> Canary | None:
        """The latest; it may have ended."""
        return self._canary

    @property
    def shadow(self) -> Shadow | None:
        """The latest; it may have ended."""
        return self._shadow

    def start_canary(self, plan: CanaryPlan) -> Canary:
        """Let a share of new requests run on the candidate. One that runs already goes on with the new share.

        Raises:
            VersionNotFoundError: the deployment has no such weights.
            ConflictError: they are the ones in use, or another candidate is being tried.
        """
        with self._lock:
            now, candidate = self._weights(plan.weights)
            running = self._canary
            if running is not None and running.is_running:
                if running.candidate_id != candidate.version_id:
                    raise _taken(running)
                running.with_share(plan)
                return running
            canary = Canary(plan, now, candidate, self._act)
            before, self._canary = self._canary, canary  # its version may fail as soon as it is a candidate
            try:
                self._deployment.versions.add_candidate(candidate)
                canary.start()
            except BaseException:
                self._canary = before
                self._let_go(candidate.version_id)
                raise
            self.current_changed(self._deployment.versions.current.version_id)  # it may have, in the meantime
            return canary

    def start_shadow(self, plan: ShadowPlan) -> Shadow:
        """Compare the candidate with the weights in use on a share of the requests.

        Raises:
            VersionNotFoundError: the deployment has no such weights.
            ConflictError: they are the ones in use, or another comparison is under way.
        """
        with self._lock:
            now, candidate = self._weights(plan.weights)
            if self._shadow is not None and self._shadow.is_running:
                raise _taken(self._shadow)
            inference = self._deployment.settings.inference
            dtype: torch.dtype = getattr(torch, inference.dtype)
            plan = replace(plan, max_tokens=min(plan.max_tokens, inference.max_seq_length))
            book = self._deployment.versions
            shadow = Shadow(plan, now, candidate, self._act, dtype, self._fail, book.has_freed)
            before, self._shadow = self._shadow, shadow  # see `start_canary`
            try:
                book.add_candidate(candidate)
                shadow.start()
            except BaseException:
                self._shadow = before
                self._let_go(candidate.version_id)
                raise
            self.current_changed(book.current.version_id)  # it may have, in the meantime
            return shadow

    def choose(self, key: str | None) -> ServedWeights | None:
        """The candidate, if a request that asks for no weights runs on it."""
        canary = self._canary
        if canary is None or not canary.is_running or not canary.takes(key):
            return None
        return self._deployment.versions.alive(canary.candidate_id)

    def promote(self, kind: Kind) -> RemapResult:
        """Let new requests run on the candidate.

        Raises:
            ConflictError: none is being tried, or the weights are being changed.
        """
        trial = self._running(kind)
        return self._deployment.change(ChangeRequest(version=trial.candidate_id))

    def abort(self, kind: Kind) -> dict[str, Any]:
        """Try the candidate no more; returns the report.

        Raises:
            ConflictError: none is being tried.
        """
        trial = self._running(kind)
        trial.end(TrialState.ABORTED, "It was asked for.")
        self._let_go(trial.candidate_id)
        return trial.report()

    def report(self, kind: Kind) -> dict[str, Any]:
        """Of the latest; what it is if there was none, too."""
        trial = self._trials()[kind]
        return {"state": "none"} if trial is None else trial.report()

    def note(self, request: Request, output: RequestOutput) -> None:
        """A request has ended. In the step thread."""
        if output.usage is None or not request.observation.is_counted or request.max_new_tokens == 0:
            return
        for trial in (self._canary, self._shadow):
            if trial is not None and trial.is_running:
                trial.note(request, output)

    def version_failed(self, failed: FailedVersion) -> None:
        """A version has been left. In the step thread."""
        self.num_failed_versions += 1
        for kind, trial in self._trials().items():
            if trial is not None and trial.candidate_id == failed.version.version_id:
                self._fail(kind, failed.reason)

    def current_changed(self, version_id: int) -> None:
        """Other weights are in use: a trial of them has succeeded, another one compares with what is gone."""
        for trial in self._trials().values():
            if trial is None or not trial.is_running or version_id == trial.now_id:
                continue
            if version_id == trial.candidate_id:
                trial.end(TrialState.PROMOTED, trial.verdict().reason)
            else:
                trial.end(TrialState.OVERTAKEN, f"New requests run on version {version_id}.")
            self._let_go(trial.candidate_id)

    def close(self) -> None:
        """End both; what is being computed is waited for."""
        for trial in self._trials().values():
            if trial is not None:
                trial.end(TrialState.ABORTED, "The model has been closed.")
        if self._shadow is not None:
            self._shadow.close()

    def _weights(self, weights: str | int) -> tuple[ServedWeights, ServedWeights]:
        book = self._deployment.versions
        now, candidate = book.current, book.find(weights)
        if candidate.version_id == now.version_id:
            raise ConflictError(
                f"Weight version {now.version_id} is in use: it is no candidate.",
                remedy="Make other weights first, as a named plan: POST /weights/changes with a name.",
            )
        return now, candidate

    def _trials(self) -> Mapping[Kind, Canary | Shadow | None]:
        return {"canary": self._canary, "shadow": self._shadow}

    def _running(self, kind: Kind) -> Canary | Shadow:
        trial = self._trials()[kind]
        if trial is None or not trial.is_running:
            raise ConflictError(f"There is no {kind}.", remedy=f"PUT /weights/{kind} starts one.")
        return trial

    def _let_go(self, version_id: int) -> None:
        if not any(
            trial is not None and trial.is_running and trial.candidate_id == version_id
            for trial in self._trials().values()
        ):
            self._deployment.versions.remove_candidate(version_id)

    def _fail(self, kind: Kind, reason: str) -> None:
        trial = self._trials()[kind]
        if trial is not None and trial.is_running:
            trial.end(TrialState.FAILED, reason)
            self._let_go(trial.candidate_id)

    def _act(self, kind: Kind, verdict: Verdict) -> None:
        try:
            if verdict.outcome == "promote":
                self.promote(kind)
            else:
                self._fail(kind, verdict.reason)
        except ConflictError:  # another change is under way, or somebody was faster: the next look tells
            return
        except AmalgamError as error:
            logger.warning("the candidate could not be promoted: %s", error)
        except Exception:
            logger.exception("the candidate could not be promoted")


def _taken(trial: Canary | Shadow) -> ConflictError:
    return ConflictError(
        f"A {trial.kind} of version {trial.candidate_id} is under way.",
        remedy=f"Promote or abort it first: DELETE /weights/{trial.kind}.",
    )
