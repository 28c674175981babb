"""A share of the requests runs on the candidate; what became of them is compared with what became of the others.

In: requests as they end. Out: which of them run on the candidate, and figures of both. Must never know: HTTP.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

from amalgam.base.threads import StoppableThread
from amalgam.engine.request import Request, RequestOutput
from amalgam.errors import RequestError, UnavailableError
from amalgam.planning.trial_plans import CanaryPlan, Kind, Which
from amalgam.planning.trials import Arm, Check, Verdict, canary_checks, slowdown
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.trials.trial import CHECK_SECONDS, Trial

MAX_TIMES = 1000  # of requests that are remembered, for each of the weights
_NOT_THEIR_FAULT = (RequestError, UnavailableError)


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
