"""Some requests, once they have been answered, are computed with the weights in use and with the candidate.

In: requests as they end. Out: how far apart the two are. Must never know: HTTP.

Token ids of such requests are in memory until they have been compared; nothing of them is written anywhere.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from amalgam.base.threads import EXIT_SECONDS, StoppableThread
from amalgam.engine.request import FinishReason, Request, RequestOutput
from amalgam.errors import CheckpointError, UnavailableError, describe
from amalgam.kernels.quiet import be_quiet
from amalgam.planning.shadow import Compared, Comparison, Throttle
from amalgam.planning.trial_plans import Kind, ShadowPlan
from amalgam.planning.trials import Check, Verdict, shadow_checks
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.trials.trial import CHECK_SECONDS, Trial, TrialState

logger = logging.getLogger("amalgam.trial")

MAX_PENDING = 16  # requests that wait to be compared


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
