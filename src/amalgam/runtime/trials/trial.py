"""What every trial of a candidate is: its state, its report, and what is done of its own accord.

In: a plan, the weights in use and the candidate. Out: a report with a verdict. Must never know: how requests get to the
candidate.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from typing import Any, Generic, TypeVar

from amalgam.engine.request import Request, RequestOutput
from amalgam.planning.trial_plans import CanaryPlan, Kind, ShadowPlan
from amalgam.planning.trials import Check, Verdict, decide
from amalgam.runtime.served import ServedWeights

logger = logging.getLogger("amalgam.trial")

CHECK_SECONDS = 1.0  # how often an automatic one looks at its figures


class TrialState(StrEnum):
    RUNNING = "running"
    PROMOTED = "promoted"
    ABORTED = "aborted"
    FAILED = "failed"  # the candidate has
    OVERTAKEN = "overtaken"  # other weights are in use than it was compared with


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
