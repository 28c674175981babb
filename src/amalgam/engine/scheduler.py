"""Requests → StepPlan, under a budget of tokens, sequences and KV blocks.

In: requests and how much of a step counts. Out: the next `StepPlan`. Must never know: tensors, text, threads.

The catch-up rule: each request has `len(token_ids) - num_computed` tokens to catch up with, be they prompt, the token
sampled last, or everything again after a preemption. A step takes the running requests in the order of their
admission, then admits waiting ones while there is room. A request is admitted with blocks for all tokens that it has,
so that only growth by generated tokens can run out of blocks; then the request admitted last gives its blocks back
and waits at the front of the queue. The oldest is therefore never interrupted, and everyone gets to the end.

Whatever tokens and blocks a step then leaves may go to proposals: tokens that may come next, computed behind a
request's own. Those that do not come true are not committed, and their places are computed again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from amalgam.engine.blocks import BlockPool
from amalgam.engine.request import Request, RequestStatus, ScheduledRequest, StepPlan
from amalgam.errors import OverloadedError, PromptTooLongError

if TYPE_CHECKING:
    from amalgam.models.weights import WeightVersion


class Scheduler:
    """The waiting queue, the running list and the rule that makes steps of them. Not thread-safe.

    Args:
        version: weight version of new requests; `version` may be set to a newer one at any time.
        max_batch_size: most running requests.
        max_step_tokens: most tokens in one step; longer prompts are computed in chunks.
        max_sequence_tokens: most tokens of one request, prompt and answer; limited by the pool's capacity as well.
        max_queue: most waiting requests.
    """

    def __init__(
        self,
        version: WeightVersion,
        pool: BlockPool,
        *,
        block_size: int,
        max_batch_size: int,
        max_step_tokens: int,
        max_sequence_tokens: int,
        max_queue: int,
    ) -> None:
        self.version = version
        self.pool = pool
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.max_sequence_tokens = min(max_sequence_tokens, pool.num_blocks * block_size)
        self._block_size = block_size
        self._max_batch_size = max_batch_size
        self._max_step_tokens = max_step_tokens
        self._max_queue = max_queue
        self._last_version_id = 0

    @property
    def has_requests(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Put a new request at the end of the queue, its `max_new_tokens` lowered to what fits.

        Raises:
            PromptTooLongError: the prompt leaves no room for a new token.
            OverloadedError: the queue is full.
        """
        self.check_prompt_length(request.num_prompt_tokens)
        self.check_room()
        request.max_new_tokens = min(request.max_new_tokens, self.max_sequence_tokens - request.num_prompt_tokens)
        self.waiting.append(request)

    def check_room(self) -> None:
        """
        Raises:
            OverloadedError: the queue is full.
        """
        if len(self.waiting) >= self._max_queue:
            raise OverloadedError(
                f"{len(self.waiting)} requests are waiting already, and max_queue is {self._max_queue}.",
                remedy="Try again later.",
            )

    def check_prompt_length(self, num_tokens: int) -> None:
        """
        Raises:
            PromptTooLongError: a prompt of so many tokens leaves no room for a new one.
        """
        if num_tokens + 1 > self.max_sequence_tokens:
            raise PromptTooLongError(
                f"The prompt has {num_tokens} tokens, and with one new token at most {self.max_sequence_tokens} fit.",
                remedy="Shorten it, or raise inference.max_seq_length or engine.kv_cache_bytes.",
            )

    def schedule(self) -> StepPlan | None:
        """The next step; None if there are no requests."""
        while (version := self._next_version()) is not None:
            scheduled = self._catch_up(version)
            self._admit(version, scheduled)
            self._last_version_id = version.version_id
            if scheduled:  # empty if the version's only request has just been preempted
                return StepPlan(version, tuple(scheduled))
        return None

    def add_proposals(self, plan: StepPlan, proposals: Mapping[int, Sequence[int]]) -> StepPlan:
        """A step that has just been scheduled, with as many of the proposed tokens as it leaves room for.

        Args:
            proposals: request id → tokens that may follow its own.
        """
        scheduled = list(plan.scheduled)
        budget = self._max_step_tokens - sum(item.num_tokens for item in scheduled)
        for index, item in enumerate(scheduled):
            request = item.request
            proposed_ids = proposals.get(request.request_id, ())
            if budget <= 0 or not item.needs_sample or not proposed_ids:
                continue
            # One spare block for each running request stays, so that no guess makes anyone go.
            num_free = max(0, self.pool.num_free - len(self.running))
            num_slots = (len(request.block_ids) + num_free) * self._block_size - len(request.token_ids)
            room = min(budget, num_slots, request.max_new_tokens - request.num_new_tokens - 1)
            if room <= 0:
                continue
            proposed_ids = tuple(proposed_ids[:room])
            self._reserve(request, item.end + len(proposed_ids))
            scheduled[index] = self._share_of(request, item.num_tokens, proposed_ids)
            budget -= len(proposed_ids)
        return StepPlan(plan.version, tuple(scheduled))

    def commit(self, plan: StepPlan, rejected: Mapping[int, int]) -> None:
        """The step has been computed: its tokens' keys and values are in their blocks.

        Args:
            rejected: request id → how many of its proposed tokens it did not take.
        """
        for item in plan.scheduled:
            request = item.request
            request.num_computed = item.end - rejected.get(request.request_id, 0)
            request.num_recorded = max(request.num_recorded, request.num_computed)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is, and free its blocks; must not happen between `schedule` and `commit`."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self._release_blocks(request)
        request.status = RequestStatus.FINISHED
        request.version = None

    def clear(self) -> None:
        """Forget all requests, whatever state an error has left them in."""
        self.pool = BlockPool(self.pool.num_blocks)
        self.waiting.clear()
        self.running.clear()

    def count_by_version(self) -> dict[int, int]:
        """Weight version id → requests that are bound to it; the newest version is always there."""
        bound = [request.version for request in (*self.running, *self.waiting) if request.version is not None]
        return {self.version.version_id: 0} | Counter(version.version_id for version in bound)

    def _next_version(self) -> WeightVersion | None:
        """Versions with something to do take turns."""
        versions = [request.version for request in self.running if request.version is not None]
        if self.waiting and self._can_admit(self.waiting[0]):
            versions.append(self.waiting[0].version or self.version)
        by_id = {version.version_id: version for version in versions}
        if not by_id:
            return None
        later = [version_id for version_id in by_id if version_id > self._last_version_id]
        return by_id[min(later or by_id)]

    def _catch_up(self, version: WeightVersion) -> list[ScheduledRequest]:
        budget = self._max_step_tokens
        scheduled = []
        for request in list(self.running):
            if budget == 0:
                break
            if request.version is not version or request.status is not RequestStatus.RUNNING:
                continue
            num_tokens = min(len(request.token_ids) - request.num_computed, budget)
            if self._reserve(request, request.num_computed + num_tokens):
                scheduled.append(self._share_of(request, num_tokens))
                budget -= num_tokens
        return scheduled

    def _admit(self, version: WeightVersion, scheduled: list[ScheduledRequest]) -> None:
        budget = self._max_step_tokens - sum(item.num_tokens for item in scheduled)
        while budget > 0 and self.waiting and self._can_admit(self.waiting[0]):
            request = self.waiting[0]
            if (request.version or self.version) is not version:
                break
            self.waiting.popleft()
            self.running.append(request)
            request.status = RequestStatus.RUNNING
            request.version = version
            if request.started_at is None:
                request.started_at = time.monotonic()
            request.block_ids = self.pool.allocate(self._num_blocks_for(len(request.token_ids)))
            num_tokens = min(len(request.token_ids), budget)
            scheduled.append(self._share_of(request, num_tokens))
            budget -= num_tokens

    def _can_admit(self, request: Request) -> bool:
        if len(self.running) >= self._max_batch_size:
            return False
        # One spare block for each running request, or its growth would at once preempt the newcomer.
        return self._num_blocks_for(len(request.token_ids)) + len(self.running) <= self.pool.num_free

    def _reserve(self, request: Request, num_tokens: int) -> bool:
        """Get blocks for `num_tokens` tokens, if need be from later requests; False if the request itself had to go."""
        num_missing = self._num_blocks_for(num_tokens) - len(request.block_ids)
        if num_missing <= 0:
            return True
        while num_missing > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        request.block_ids += self.pool.allocate(num_missing)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release_blocks(request)
        request.num_computed = 0
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def _release_blocks(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []

    def _share_of(self, request: Request, num_tokens: int, proposed_ids: tuple[int, ...] = ()) -> ScheduledRequest:
        """A share of `num_tokens` that the request has, and of proposals."""
        needs_sample = request.num_computed + num_tokens == len(request.token_ids)
        num_tokens += len(proposed_ids)
        end = request.num_computed + num_tokens
        return ScheduledRequest(
            request,
            start=request.num_computed,
            num_tokens=num_tokens,
            block_ids=tuple(request.block_ids),
            num_unrecorded=min(num_tokens, max(0, end - request.num_recorded)),
            needs_sample=needs_sample,
            proposed_ids=proposed_ids,
        )

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
