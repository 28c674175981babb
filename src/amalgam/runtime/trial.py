"""A candidate beside the weights in use: a share of the requests runs on it (canary), or both compute some requests and
are compared (shadow).

In: a deployment, a version that it keeps, requests as they end. Out: which weights a request runs on, a report with a
verdict, and a change of the weights where that is asked for. Must never know: HTTP. What the figures say is decided in
`planning.trials`.

Token ids of shadowed requests are in memory until they have been compared; nothing of them is written anywhere.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Generic, Protocol, TypeVar

import torch

from amalgam.base.threads import EXIT_SECONDS, StoppableThread
from amalgam.config.settings import Settings
from amalgam.engine.probation import FailedVersion
from amalgam.engine.request import FinishReason, Request, RequestOutput
from amalgam.errors import AmalgamError, CheckpointError, ConflictError, RequestError, UnavailableError, describe
from amalgam.kernels.quiet import be_quiet
from amalgam.planning.shadow import Compared, Comparison, Throttle
from amalgam.planning.trial_plans import CanaryPlan, Kind, ShadowPlan, Which
from amalgam.planning.trials import Arm, Check, Verdict, canary_checks, decide, shadow_checks, slowdown
from amalgam.runtime.changes import ChangeRequest, RemapResult
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.versions import VersionBook

logger = logging.getLogger("amalgam.trial")

MAX_TIMES = 1000  # of requests that are remembered, for each of the weights
MAX_PENDING = 16  # requests that wait to be compared
CHECK_SECONDS = 1.0  # how often an automatic canary looks at its figures
_NOT_THEIR_FAULT = (RequestError, UnavailableError)


class TrialState(StrEnum):
    RUNNING = "running"
    PROMOTED = "promoted"
    ABORTED = "aborted"
    FAILED = "failed"  # the candidate has
    OVERTAKEN = "overtaken"  # other weights are in use than it was compared with


class Served(Protocol):
    """What is asked of the deployment; see `Deployment`."""

    @property
    def settings(self) -> Settings: ...
    @property
    def versions(self) -> VersionBook: ...
    def change(self, request: ChangeRequest) -> RemapResult: ...


P = TypeVar("P", CanaryPlan, ShadowPlan)


class Trial(ABC, Generic[P]):
    """What a canary and a shadow have in common.

    Args:
        act: called with an outcome to carry out, in the trial's own thread.
    """

    kind: Kind

    def __init__(
        self, plan: P, now: ServedWeights, candidate: ServedWeights, act: Callable[[Kind, Verdict], None]
    ) -> None:
        self.plan: P = plan
        self.now_id, self.candidate_id = now.version_id, candidate.version_id
        self.state = TrialState.RUNNING
        self.reason = ""
        self.started_at, self.ended_at = time.time(), 0.0
        self._act = act
        self._is_ending = threading.Event()

    @property
    def is_running(self) -> bool:
        return self.state is TrialState.RUNNING

    @property
    @abstractmethod
    def num_requests(self) -> int:
        """That the candidate has had."""

    @abstractmethod
    def checks(self) -> list[Check]:
        """Its figures beside their limits."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """What is told beside the checks."""

    @abstractmethod
    def note(self, request: Request, output: RequestOutput) -> None:
        """A request has ended. In the step thread, so it must be quick."""

    def verdict(self, checks: list[Check] | None = None) -> Verdict:
        if self.state is TrialState.FAILED:
            return Verdict("reject", self.reason)
        checks = self.checks() if checks is None else checks
        return decide(checks, self.num_requests, self.plan.limits.min_requests)

    def end(self, state: TrialState, reason: str) -> None:
        """Harmless when repeated: the first state stays."""
        if not self.is_running:
            return
        self.state, self.reason, self.ended_at = state, reason, time.time()
        self._is_ending.set()
        logger.info("%s of version %d beside %d: %s. %s", self.kind, self.candidate_id, self.now_id, state, reason)

    def report(self) -> dict[str, Any]:
        """What `GET /weights/canary` and `/weights/shadow` answer."""
        checks = self.checks()
        verdict = self.verdict(checks)
        return {
            "state": self.state.value,
            "reason": self.reason,
            "current": self.now_id,
            "candidate": self.candidate_id,
            "weights": self.plan.weights,
            "share": self.plan.share,
            "automatic": self.plan.is_automatic,
            "started": self.started_at,
            "ended": self.ended_at or None,
            "limits": asdict(self.plan.limits),
            **self.figures(),
            "checks": [check.as_json() for check in checks],
            "verdict": {"outcome": verdict.outcome, "reason": verdict.reason},
        }

    def _act_on_verdict(self) -> None:
        if self.plan.is_automatic and self.is_running and (verdict := self.verdict()).outcome != "undecided":
            self._act(self.kind, verdict)


class _Tally:
    """What is known of the requests on some weights. Written by the step thread."""

    def __init__(self) -> None:
        self.num_requests = self.num_errors = self.num_tokens = 0
        self._first: deque[float] = deque(maxlen=MAX_TIMES)
        self._token: deque[float] = deque(maxlen=MAX_TIMES)
        self._lock = threading.Lock()

    def add(self, request: Request, output: RequestOutput) -> None:
        with self._lock:
            self.num_requests += 1
            self.num_errors += output.error is not None
            self.num_tokens += request.num_new_tokens
            if output.error is not None or request.first_token_at is None or request.last_token_at is None:
                return
            self._first.append(request.first_token_at - request.arrived_at)
            if request.num_new_tokens > 1:
                self._token.append((request.last_token_at - request.first_token_at) / (request.num_new_tokens - 1))

    def read(self) -> Arm:
        with self._lock:
            return Arm(self.num_requests, self.num_errors, self.num_tokens, tuple(self._first), tuple(self._token))


class Canary(Trial[CanaryPlan]):
    """A share of the requests runs on the candidate."""

    kind = "canary"

    def __init__(
        self, plan: CanaryPlan, now: ServedWeights, candidate: ServedWeights, act: Callable[[Kind, Verdict], None]
    ) -> None:
        super().__init__(plan, now, candidate, act)
        self._arms = {self.now_id: _Tally(), self.candidate_id: _Tally()}
        self._random = random.Random()
        self._salt = f"{candidate.version.fingerprint}\n".encode()
        self._thread: StoppableThread | None = None

    def start(self) -> None:
        """An automatic one looks at its figures now and then."""
        if self.plan.is_automatic and self._thread is None:
            self._thread = StoppableThread(self._watch, "amalgam-canary", self._is_ending.set)
            self._thread.start()

    def takes(self, key: str | None) -> bool:
        """Whether a request runs on the candidate.

        Args:
            key: requests with one key stay together, on the candidate too as the share grows; None: by chance.
        """
        if key is None:
            return self._random.random() < self.plan.share
        digest = blake2b(self._salt + key.encode(errors="surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64 < self.plan.share

    def with_share(self, plan: CanaryPlan) -> None:
        """Go on with another share and other limits; what has been counted stays."""
        self.plan = plan
        self.start()

    @property
    def num_requests(self) -> int:
        return self._arms[self.candidate_id].num_requests

    def note(self, request: Request, output: RequestOutput) -> None:
        """See `Trial`. Requests that have asked for their weights say nothing of a share of them."""
        assert output.usage is not None and output.finish_reason is not None
        arm = self._arms.get(output.usage.version)
        if arm is None or request.keeps_version or output.finish_reason.is_cut:
            return
        if self.is_running and not isinstance(output.error, _NOT_THEIR_FAULT):
            arm.add(request, output)

    def checks(self) -> list[Check]:
        now, candidate = self._read()
        return canary_checks(now, candidate, self.plan.limits)

    def figures(self) -> dict[str, Any]:
        now, candidate = self._read()
        return {
            "arms": {"current": now.as_json(), "candidate": candidate.as_json()},
            "slowdown": asdict(slowdown(now, candidate)),
        }

    def arm(self, which: Which) -> Arm:
        return self._read()[which == "candidate"]

    def _read(self) -> tuple[Arm, Arm]:
        return self._arms[self.now_id].read(), self._arms[self.candidate_id].read()

    def _watch(self) -> None:
        while not self._is_ending.wait(CHECK_SECONDS):
            self._act_on_verdict()


class Shadow(Trial[ShadowPlan]):
    """Some requests, once they have been answered by the current weights, are computed with both."""

    kind = "shadow"

    def __init__(
        self,
        plan: ShadowPlan,
        now: ServedWeights,
        candidate: ServedWeights,
        act: Callable[[Kind, Verdict], None],
        dtype: torch.dtype,
        fail: Callable[[Kind, str], None],
        has_freed: Callable[[], None],
    ) -> None:
        super().__init__(plan, now, candidate, act)
        throttle = Throttle(plan.max_share, self._check, self._is_ending.wait)
        self._comparison = Comparison(now.loader, dtype, now.version, candidate.version, plan.max_tokens, throttle)
        self._fail, self._has_freed = fail, has_freed
        self._random = random.Random()
        self._pending: deque[tuple[tuple[int, ...], int]] = deque()
        self._wake = threading.Event()
        self._num_taken = self._num_dropped = 0  # of the step thread
        self._num_incomparable = 0  # of the thread that compares
        self._thread = StoppableThread(self._run, "amalgam-shadow", self._stop)

    def start(self) -> None:
        """Compare, in a thread of its own."""
        self._thread.start()

    def end(self, state: TrialState, reason: str) -> None:
        """See `Trial`; the weights are let go after the piece of work under way."""
        super().end(state, reason)
        self._stop()

    def close(self) -> None:
        """Wait for that."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(EXIT_SECONDS)

    @property
    def num_requests(self) -> int:
        return self._comparison.num_requests

    def note(self, request: Request, output: RequestOutput) -> None:
        """See `Trial`."""
        assert output.usage is not None
        wanted = self.plan
        if (
            output.usage.version != self.now_id
            or output.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH)
            or not request.num_new_tokens
            or self._random.random() >= wanted.share
        ):
            return
        is_full = len(self._pending) >= MAX_PENDING or request.num_prompt_tokens >= wanted.max_tokens
        if is_full or self._num_taken - self._num_incomparable >= wanted.max_requests:
            self._num_dropped += is_full
            return
        self._num_taken += 1
        self._pending.append((tuple(request.token_ids[: wanted.max_tokens]), request.num_prompt_tokens))
        self._wake.set()

    def compared(self) -> Compared | None:
        """What is known so far; None: nothing."""
        return self._comparison.read()

    def checks(self) -> list[Check]:
        compared = self.compared()
        return [] if compared is None else shadow_checks(compared, self.plan.limits)

    def figures(self) -> dict[str, Any]:
        compared = self.compared()
        figures = None if compared is None else asdict(compared)
        num_left_out = self._num_dropped + self._num_incomparable
        return {"requests": self.num_requests, "left_out": num_left_out, "figures": figures}

    def _check(self) -> None:
        if self._is_ending.is_set():
            raise UnavailableError("The comparison has been ended.", remedy="Start it again.")

    def _stop(self) -> None:
        self._is_ending.set()
        self._wake.set()

    def _run(self) -> None:
        be_quiet()
        while True:
            self._wake.wait(CHECK_SECONDS if self.plan.is_automatic else None)
            self._wake.clear()
            self._act_on_verdict()  # again, where another change was under way
            while self._pending and not self._is_ending.is_set():
                token_ids, num_prompt_tokens = self._pending.popleft()
                try:
                    self._num_incomparable += not self._comparison.add(token_ids, num_prompt_tokens)
                except UnavailableError:
                    break
                except CheckpointError as error:
                    self._fail(self.kind, str(error.what))
                except Exception as error:
                    logger.exception("a request could not be compared")
                    self._fail(self.kind, f"{type(error).__name__}: {describe(str(error), 400)}")
                self._act_on_verdict()
            if self._is_ending.is_set():
                break
        self._pending.clear()
        self._comparison.close()
        self._has_freed()


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
            self._deployment.versions.add_candidate(candidate)
            self._canary = canary
            canary.start()
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
            book.add_candidate(candidate)
            self._shadow = shadow
            shadow.start()
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
