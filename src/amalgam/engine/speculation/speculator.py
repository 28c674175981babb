"""Speculation of one engine: asks a proposer, says how many of its guesses a step takes, counts what comes of them.

In: step plans, and how much of each came true. Out: guesses for a plan; `SpeculationCounts`, to any thread. Must never
know: how guesses are made, tensors, HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence

from amalgam.engine.meter import SpeculationCounts
from amalgam.engine.request import StepPlan
from amalgam.engine.speculation.costs import Candidate, CostModel
from amalgam.engine.speculation.proposer import Proposer, Wanted

logger = logging.getLogger("amalgam.engine")

_COUNTED_STEPS = 5  # of so many one has its experts counted; no divisor of the cost model's periods


class Speculator:
    """Guesses for the requests of steps. In the step thread, but for `counts`.

    Args:
        kind: what the proposer is called.
        num_tokens: most guesses for a request in a step.
        vocab_size: of the model: a guess ends before what is no token of it.
        costs: says how many guesses pay; None: all that there is room for.

    Attributes:
        counts: since the start; replaced as a whole.
    """

    def __init__(
        self, kind: str, proposer: Proposer, num_tokens: int, vocab_size: int, costs: CostModel | None = None
    ) -> None:
        self.kind = kind
        self.num_tokens = num_tokens
        self.proposer = proposer
        self.counts = SpeculationCounts(accepted_at=(0,) * num_tokens)
        self.costs = costs
        self._vocab_size = vocab_size
        self._has_failed = False
        self._num_steps = 0  # that the cost model was told of
        self._looked_at: float | None = None  # when guesses for this step were looked for; None: they were not

    def propose(self, plan: StepPlan, rooms: Mapping[int, int]) -> dict[int, Sequence[int]]:
        """Request id → tokens that may follow its own. Takes its time where the proposer does.

        Args:
            rooms: request id → how many the step can take for it; of those that are left out, none.
        """
        self._looked_at = None
        if self.costs is not None and self.costs.rests():  # before anything else: a step may take no millisecond
            num = sum(item.request.params.speculate and item.request.request_id in rooms for item in plan.scheduled)
            self.counts = self.counts._replace(num_declined=self.counts.num_declined + num)
            return {}
        wanted = [
            Wanted(item.request, min(self.num_tokens, room))
            for item in plan.scheduled
            if item.request.params.speculate and (room := rooms.get(item.request.request_id, 0)) > 0
        ]
        if not wanted:
            return {}
        self._looked_at = started = time.monotonic()
        try:
            known = self._guess(plan, wanted)
        except Exception as error:
            if not self._has_failed:
                logger.warning("Tokens cannot be guessed; answers stay as they are.", exc_info=error)
            self._has_failed = True
            known = {}
        seconds = self.counts.proposing_seconds + time.monotonic() - started
        self.counts = self.counts._replace(proposing_seconds=seconds)
        return known

    def commit(
        self,
        plan: StepPlan,
        rejected: Mapping[int, int],
        ended: Container[int],
        seconds: float,
        count_experts: Callable[[], float | None] = lambda: None,
    ) -> None:
        """The step has been computed.

        Args:
            rejected: request id → how many of its guesses it did not take.
            ended: ids of requests that have ended: what of their guesses would have come true is not known. Nor is it
                of those that have been cancelled.
            seconds: that it took, guessing left out.
            count_experts: says how many experts of a layer it needed, the mean over layers; None: nobody knows.
        """
        num_drafts = num_proposed = num_accepted = 0
        accepted_at = list(self.counts.accepted_at)
        for item in plan.scheduled:
            if not item.proposed_ids:
                continue
            request_id = item.request.request_id
            count = len(item.proposed_ids) - rejected.get(request_id, 0)
            num_drafts += 1
            num_proposed += len(item.proposed_ids)
            num_accepted += count
            for place in range(count):
                accepted_at[place] += 1
            if self.costs is not None and request_id not in ended and not item.request.is_cancelled:
                self.costs.add_outcome(request_id, len(item.proposed_ids), count)
        if num_drafts:
            self.counts = self.counts._replace(
                num_drafts=self.counts.num_drafts + num_drafts,
                num_proposed=self.counts.num_proposed + num_proposed,
                num_accepted=self.counts.num_accepted + num_accepted,
                accepted_at=tuple(accepted_at),
            )
        looked_at, self._looked_at = self._looked_at, None  # a step without room for guesses is not asked for any
        if self.costs is not None and all(item.is_stream for item in plan.scheduled):
            self._teach(self.costs, plan, num_proposed, num_accepted, seconds, looked_at, count_experts)

    def _teach(
        self,
        costs: CostModel,
        plan: StepPlan,
        num_proposed: int,
        num_accepted: int,
        seconds: float,
        looked_at: float | None,
        count_experts: Callable[[], float | None],
    ) -> None:
        """Tell the cost model of a step of streams alone."""
        num_streams = len(plan.scheduled)
        if not num_proposed:
            costs.add_plain(num_streams, seconds)
        if looked_at is None:  # the less is done now, the better
            return
        is_counted = self._num_steps % _COUNTED_STEPS == 0  # counting takes a while where there are many layers
        costs.add_step(plan.num_tokens, seconds, count_experts() if is_counted else None)
        self._num_steps += 1
        costs.add_trial(num_streams, plan.num_tokens, num_streams + num_accepted, time.monotonic() - looked_at)

    def forget(self, request_id: int) -> None:
        """A request has ended."""
        self.proposer.forget(request_id)
        if self.costs is not None:
            self.costs.forget(request_id)

    def _guess(self, plan: StepPlan, wanted: Sequence[Wanted]) -> dict[int, Sequence[int]]:
        proposer = self.proposer
        if proposer.is_free:
            known = self._known(wanted)
            lengths = {request_id: len(token_ids) for request_id, token_ids in known.items()}
            chosen = self._choose(plan, [wish for wish in wanted if wish.request.request_id in known], lengths)
            return {request_id: known[request_id][:count] for request_id, count in chosen.items()}
        chosen = self._choose(plan, wanted, {request.request_id: num_tokens for request, num_tokens in wanted})
        wanted = [wish._replace(num_tokens=count) for wish in wanted if (count := chosen.get(wish.request.request_id))]
        if not wanted:
            return {}
        started, num_computed = time.monotonic(), proposer.num_computed
        known = self._known(wanted)
        if self.costs is not None:
            num_steps = max((wish.num_tokens for wish in wanted), default=0)
            self.costs.add_guess(num_steps, proposer.num_computed - num_computed, time.monotonic() - started)
        return known

    def _choose(self, plan: StepPlan, wanted: Sequence[Wanted], limits: Mapping[int, int]) -> Mapping[int, int]:
        """Request id → how many tokens to guess for it, at most its limit."""
        if self.costs is None or not wanted:
            return limits
        candidates = [
            Candidate(
                request.request_id,
                limits[request.request_id],
                self.proposer.num_missing(request),
                request.max_new_tokens - request.num_new_tokens,
            )
            for request, _ in wanted
        ]
        num_streams = sum(item.num_logits > 0 for item in plan.scheduled)
        chosen = self.costs.choose(plan.num_tokens, num_streams, candidates)
        num_declined = self.counts.num_declined + len(candidates) - len(chosen)
        self.counts = self.counts._replace(num_declined=num_declined)
        return chosen

    def _known(self, wanted: Sequence[Wanted]) -> dict[int, Sequence[int]]:
        """Request id → its guess, up to what is no token of the model or what the request's grammar forbids."""
        proposed = self.proposer.propose(wanted)
        known: dict[int, Sequence[int]] = {}
        for request, _ in wanted:
            guessed = proposed.get(request.request_id, ())[: self.num_tokens]
            is_known = [0 <= token_id < self._vocab_size for token_id in guessed]
            token_ids = list(guessed[: [*is_known, False].index(False)])
            if request.constraint is not None:
                token_ids = token_ids[: request.constraint.num_valid(token_ids)]
            if token_ids:
                known[request.request_id] = token_ids
        return known
