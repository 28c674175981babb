"""Requests → StepPlan, under a budget of tokens, sequences and KV blocks.

In: requests and how much of a step counts. Out: the next `StepPlan`. Must never know: tensors, text, threads, time.

The catch-up rule: each request has `len(token_ids) - num_computed` tokens to catch up with, be they prompt, the token
sampled last, or everything again after a preemption. A running request with one such token is a stream, one with more
is a prompt. A step takes the streams first, then prompts, then admits waiting requests while there is room.

Order: the queue is sorted by priority, then by arrival, and so is what a preemption puts back. A request is admitted
with blocks for all tokens that it has, so that only growth by generated tokens can run out of blocks; then the running
request of the lowest priority, of these the one admitted last, gives its blocks back and waits. The oldest of the
highest priority is therefore never interrupted, and everyone of a priority gets to the end.

Prompt tokens of a step: all that `max_step_tokens` leaves, and beside streams at most what `prompt_tokens_beside` says,
so that no stream waits for another's prompt. Half of them go to the first prompt in the order of the queue, which
therefore never starves; the rest to those that are nearest to their ends, so that a short prompt does not wait for a
long one. A waiting request that would get none stays in the queue.

Shared beginnings: a full block is found by the weight version and all tokens up to its end, as long as it is not handed
out again. A request is admitted with the blocks of its beginning that are there, and at least its last token is
computed. If its next block is one that a running request computes in this very step, it stays in the queue for the
moment: it will find that block rather than compute it too. A model with recurrent states goes on only where one is kept
(`amalgam.engine.states`).

A step is of one weight version: versions with something to do take turns, and a waiting request of another stays.

Whoever stays in the queue for one of these reasons keeps its place: the slot and the blocks that it would take are set
aside, so that those behind it get what they would have got behind it, and no more.

Whatever tokens and blocks a step then leaves may go to proposals: tokens that may come next, computed behind a
request's own. Those that do not come true are not committed, and their places are computed again; only blocks all of
whose tokens are committed can be found.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from amalgam.engine.blocks import BlockPool
from amalgam.engine.meter import Counts
from amalgam.engine.prefixes import Prefixes
from amalgam.engine.request import Request, RequestStatus, ScheduledRequest, StepPlan
from amalgam.engine.states import StatePool
from amalgam.errors import OverloadedError, PromptTooLongError

if TYPE_CHECKING:
    from amalgam.models.weights import WeightVersion

_MAX_PASSED = 64  # requests that may keep their places while others pass them; bounds a step's search


class Scheduler:
    """The waiting queue, the running list and the rule that makes steps of them. Not thread-safe.

    Args:
        version: weight version of new requests; `version` may be set to a newer one at any time.
        max_batch_size: most running requests.
        max_step_tokens: most tokens in one step; longer prompts are computed in chunks.
        max_sequence_tokens: most tokens of one request, prompt and answer; limited by the pool's capacity as well.
        max_queue: most requests that wait beside those that may run.
        shares_blocks: whether requests use blocks that others have computed.
        states: slots for recurrent states, of which each running request has one; None: the model has none.

    Attributes:
        prompt_tokens_beside: number of streams → most prompt tokens in their step; may be set at any time.
        kept_ids: weight versions that requests may still ask for; may be set at any time.
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
        shares_blocks: bool = True,
        states: StatePool | None = None,
    ) -> None:
        self._version = version
        self._kept_ids: frozenset[int] = frozenset()
        self.pool = pool
        self.states = states
        self.waiting: list[Request] = []  # by rank
        self.running: list[Request] = []  # by priority, then in order of admission
        self.prompt_tokens_beside: Callable[[int], int] = lambda num_streams: max_step_tokens
        self.counts = Counts()
        self.max_sequence_tokens = min(max_sequence_tokens, pool.num_blocks * block_size)
        self._block_size = block_size
        self._max_batch_size = max_batch_size
        self._max_step_tokens = max_step_tokens
        self._max_queue = max_queue
        self._shares_blocks = shares_blocks
        self._prefixes = self._new_prefixes()
        self._last_version_id = 0

    @property
    def version(self) -> WeightVersion:
        return self._version

    @version.setter
    def version(self, version: WeightVersion) -> None:
        self._version = version
        self._forget_dead_versions()

    @property
    def kept_ids(self) -> frozenset[int]:
        return self._kept_ids

    @kept_ids.setter
    def kept_ids(self, version_ids: frozenset[int]) -> None:
        self._kept_ids = version_ids
        self._forget_dead_versions()

    @property
    def has_requests(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Put a new request in the queue, its `max_new_tokens` lowered to what fits.

        Raises:
            PromptTooLongError: the prompt leaves no room for a new token, if it asks for one.
            OverloadedError: the queue is full.
        """
        self.check_prompt_length(request.num_prompt_tokens, min(1, request.max_new_tokens))
        self.check_room()
        request.max_new_tokens = min(request.max_new_tokens, self.max_sequence_tokens - request.num_prompt_tokens)
        insort(self.waiting, request, key=_rank)

    def check_room(self) -> None:
        """
        Raises:
            OverloadedError: the queue is full.
        """
        num_free = max(0, self._max_batch_size - len(self.running))  # a burst at an idle engine need not wait for long
        if len(self.waiting) >= self._max_queue + num_free:
            raise OverloadedError(
                f"{len(self.waiting)} requests are waiting already, and max_queue is {self._max_queue} beside "
                f"{num_free} that may run.",
                remedy="Try again later.",
            )

    def check_prompt_length(self, num_tokens: int, num_new_tokens: int = 1) -> None:
        """
        Raises:
            PromptTooLongError: a prompt of so many tokens leaves no room for so many new ones.
        """
        if num_tokens + num_new_tokens > self.max_sequence_tokens:
            what = "with one new token at most" if num_new_tokens else "at most"
            raise PromptTooLongError(
                f"The prompt has {num_tokens} tokens, and {what} {self.max_sequence_tokens} fit.",
                remedy="Shorten it, or raise inference.max_seq_length or engine.kv_cache_bytes.",
            )

    def schedule(self) -> StepPlan | None:
        """The next step; None if there are no requests."""
        while (version := self._next_version()) is not None:
            scheduled = self._take_streams(version)
            if self.waiting or len(scheduled) < len(self.running):
                scheduled += self._take_prompts(version, self._prompt_budget(len(scheduled)))
            self._last_version_id = version.version_id
            if scheduled:  # empty if the version's only request has just been preempted
                return StepPlan(version, tuple(scheduled))
        return None

    def room_for_proposals(self, plan: StepPlan) -> dict[int, int]:
        """Request id → how many proposed tokens a step that has just been scheduled takes, if they are of it alone.

        Requests that it takes none of are left out: there is nothing to guess for them.
        """
        budget = self._max_step_tokens - plan.num_tokens
        rooms = ((item.request.request_id, self._room(item, budget)) for item in plan.scheduled)
        return {request_id: room for request_id, room in rooms if room > 0}

    def add_proposals(self, plan: StepPlan, proposals: Mapping[int, Sequence[int]]) -> StepPlan:
        """A step that has just been scheduled, with as many of the proposed tokens as it leaves room for.

        Args:
            proposals: request id → tokens that may follow its own.
        """
        scheduled = list(plan.scheduled)
        budget = self._max_step_tokens - plan.num_tokens
        for index, item in enumerate(scheduled):
            request = item.request
            proposed_ids = tuple(proposals.get(request.request_id, ()))
            if not proposed_ids or (room := self._room(item, budget)) <= 0:
                continue
            proposed_ids = proposed_ids[:room]
            state = item.state
            if self.states is not None and request.state is not None and state is not None:
                guessing = self.states.guess(request.state, state, item.num_tokens, len(proposed_ids))
                if guessing is None:
                    continue
                proposed_ids = proposed_ids[: len(guessing.saves) - len(state.saves)]
                state = guessing
            self._reserve(request, item.end + len(proposed_ids))
            scheduled[index] = item._replace(
                num_tokens=item.num_tokens + len(proposed_ids),
                block_ids=tuple(request.block_ids),
                num_unrecorded=item.num_unrecorded + len(proposed_ids),
                proposed_ids=proposed_ids,
                state=state,
            )
            budget -= len(proposed_ids)
        return StepPlan(plan.version, tuple(scheduled))

    def _room(self, item: ScheduledRequest, budget: int) -> int:
        """How many proposed tokens a request may have in a step that has `budget` tokens left."""
        if budget <= 0 or not item.num_logits:
            return 0
        request = item.request
        # One spare block for each running request stays, so that no guess makes anyone go.
        num_free = max(0, self.pool.num_free - len(self.running))
        num_slots = (len(request.block_ids) + num_free) * self._block_size - len(request.token_ids)
        room = min(budget, num_slots, request.max_new_tokens - request.num_new_tokens - 1)
        return room if self.states is None else min(room, self.states.num_free)

    def commit(self, plan: StepPlan, rejected: Mapping[int, int]) -> None:
        """The step has been computed: its tokens' keys and values are in their blocks.

        Args:
            rejected: request id → how many of its proposed tokens it did not take.
        """
        for item in plan.scheduled:
            request = item.request
            if request.num_recorded == 0:
                self._count(num_prefix_hit_tokens=request.num_cached_tokens)
            request.num_computed = item.end
            if rejected:
                request.num_computed -= rejected.get(request.request_id, 0)
            request.num_recorded = max(request.num_recorded, request.num_computed)
            self._prefixes.publish(request)
            if self.states is not None and request.state is not None:
                version_id = plan.version.version_id
                num_rejected = rejected.get(request.request_id, 0) if item.proposed_ids else 0
                self.states.commit(request.state, version_id, request.block_keys, self._block_size, num_rejected)

    def finish(self, request: Request, *, is_sound: bool = True) -> None:
        """Take a request out, wherever it is, and free its blocks; must not happen between `schedule` and `commit`.

        Args:
            is_sound: False: others do not use what it has computed. A NaN spreads to tokens before it, whose weights
                for it are 0, and so to beginnings that others share.
        """
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self._release(request, is_sound=is_sound)
        request.status = RequestStatus.FINISHED
        request.version = request.doubt = None
        self._forget_dead_versions()

    def bound_to(self, version: WeightVersion) -> list[Request]:
        """The requests that run on a weight version, and those that wait to go on with it."""
        return [request for request in (*self.running, *self.waiting) if request.version is version]

    def doubting(self, version: WeightVersion) -> list[Request]:
        """The requests that another version computes again, as this one has computed NaN for them."""
        requests = (*self.running, *self.waiting)
        return [request for request in requests if request.doubt is not None and request.doubt.version is version]

    def start_again(self, request: Request, version: WeightVersion | None = None) -> None:
        """Put a request back in the queue, as if no version had begun with it; not between `schedule` and `commit`.

        What its version has computed is not used by others.

        Args:
            version: that computes what it has; None: the one of new requests when it is admitted.
        """
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            insort(self.waiting, request, key=_rank)
        self._release(request, is_sound=False)
        request.status = RequestStatus.WAITING
        request.version = version
        request.num_computed = 0
        if request.reader is not None:
            request.reader.restart()
        self._forget_dead_versions()

    def clear(self) -> None:
        """Forget all requests, whatever state an error has left them in."""
        self.pool = BlockPool(self.pool.num_blocks)
        self.states = None if self.states is None else StatePool(self.states.num_slots, self.states.num_spare)
        self._prefixes = self._new_prefixes()
        self.waiting.clear()
        self.running.clear()

    def count_by_version(self) -> dict[int, int]:
        """Weight version id → requests that are bound to it; the newest version and kept ones are always there."""
        bound = [request.version for request in (*self.running, *self.waiting) if request.version is not None]
        known = {self.version.version_id: 0} | dict.fromkeys(sorted(self.kept_ids), 0)
        return known | Counter(version.version_id for version in bound)

    def _next_version(self) -> WeightVersion | None:
        """Versions with something to do take turns."""
        by_id = {request.version.version_id: request.version for request in self.running if request.version is not None}
        if self.waiting and self._has_slot():
            first = self.waiting[0]
            version = first.version or self.version
            if self._has_blocks(self._num_blocks_to_take(first, self._find(first, version))):
                by_id[version.version_id] = version
        if not by_id:
            return None
        later = [version_id for version_id in by_id if version_id > self._last_version_id]
        return by_id[min(later or by_id)]

    def _take_streams(self, version: WeightVersion) -> list[ScheduledRequest]:
        """A token for each of the version's streams, in order, while there are tokens and blocks."""
        scheduled: list[ScheduledRequest] = []
        for request in list(self.running):
            if len(scheduled) == self._max_step_tokens:
                break
            # One that comes later in the order may have been preempted for one that came before it.
            if request.version is not version or request.status is not RequestStatus.RUNNING:
                continue
            num_tokens = len(request.token_ids)
            if num_tokens - request.num_computed == 1 and self._reserve(request, num_tokens):
                scheduled.append(self._share_of(request, 1))
        return scheduled

    def _prompt_budget(self, num_scheduled: int) -> int:
        """How many prompt tokens a step may have that has so many streams."""
        budget = self._max_step_tokens - num_scheduled
        num_streams = sum(request.num_behind == 1 for request in self.running)  # of any version: all wait for the step
        if not num_streams or not (self.waiting or len(self.running) > num_streams):
            return budget
        if num_scheduled:
            return min(budget, self.prompt_tokens_beside(num_scheduled))
        return min(budget, self.prompt_tokens_beside(num_streams) or self._block_size)

    def _take_prompts(self, version: WeightVersion, budget: int) -> list[ScheduledRequest]:
        """Shares of the version's prompts, and of requests that are admitted to it."""
        if budget == 0:
            return []
        prompts = [request for request in self.running if request.version is version and request.num_behind > 1]
        self._admit(version, prompts, budget)
        shares = _split(budget, [(request, request.num_behind) for request in prompts])
        return [
            self._share_of(request, shares[request.request_id]) for request in prompts if shares[request.request_id]
        ]

    def _admit(self, version: WeightVersion, prompts: list[Request], budget: int) -> None:
        """Move waiting requests to `prompts`, those that get some of a step's prompt tokens."""
        num_kept_places, num_kept_blocks = 0, 0
        wanted = [(request, request.num_behind) for request in prompts]
        shares = _split(budget, wanted)
        for request in list(self.waiting) if self.waiting and self._has_slot() else ():
            if not self._has_slot(num_kept_places):
                break
            own = request.version or self.version
            shared_ids = self._find(request, own)
            num_blocks = self._num_blocks_to_take(request, shared_ids)
            if not self._has_blocks(num_blocks, num_kept_places, num_kept_blocks):
                break
            if own is not version:  # its turn comes in another step
                num_kept_places += 1
                num_kept_blocks += num_blocks
                if num_kept_places == _MAX_PASSED:
                    break
                continue
            num_behind = len(request.token_ids) - len(shared_ids) * self._block_size
            more_shares = _split(budget, [*wanted, (request, num_behind)])
            num_coming = self._prefixes.count_coming(request, version.version_id, len(shared_ids), shares)
            if num_coming or more_shares[request.request_id] == 0:
                num_kept_places += 1
                num_kept_blocks += num_blocks - num_coming
                if num_kept_places == _MAX_PASSED:
                    break
                continue
            self._start(request, version, shared_ids)
            prompts.append(request)
            wanted.append((request, num_behind))
            shares = more_shares

    def _start(self, request: Request, version: WeightVersion, shared_ids: list[int]) -> None:
        """Make a waiting request a running one, with the blocks that it shares and those that it has to compute."""
        self.waiting.remove(request)
        insort(self.running, request, key=_priority)
        request.status = RequestStatus.RUNNING
        request.version = version
        self.pool.share(shared_ids)
        request.num_computed = len(shared_ids) * self._block_size
        borders = [] if self.states is None else self._borders(request, version)  # before blocks change hands
        num_missing = self._num_blocks_for(len(request.token_ids)) - len(shared_ids)
        request.block_ids = [*shared_ids, *self.pool.allocate(num_missing)]
        request.num_published = len(shared_ids)
        if self.states is not None:
            keys = request.block_keys[: len(shared_ids)]
            request.state = self.states.begin(version.version_id, keys, borders)
        if request.num_recorded == 0:
            request.num_cached_tokens = request.num_computed
        if request.started_at is None:
            request.started_at = time.monotonic()
            if self._prefixes.may_find(request):
                self._count(num_prefix_query_tokens=request.num_prompt_tokens)
        self._prefixes.announce(request)

    def _new_prefixes(self) -> Prefixes:
        has_states = self.states is not None
        return Prefixes(self.pool, self._block_size, is_shared=self._shares_blocks, has_states=has_states)

    def _find(self, request: Request, version: WeightVersion) -> list[int]:
        """The blocks that a waiting request would share."""
        found = self._prefixes.find(request, version.version_id)
        if self.states is None:
            return found
        return found[: self.states.count_usable(version.version_id, request.block_keys[: len(found)])]

    def _borders(self, request: Request, version: WeightVersion) -> list[int]:
        """Where a request that is admitted keeps its state: see `amalgam.engine.states`."""
        if not self._shares_blocks:
            return []
        counts = {
            len(self._prefixes.find(request, version.version_id)),
            (len(request.token_ids) - 1) // self._block_size,
        }
        return sorted(count * self._block_size for count in counts if count * self._block_size > request.num_computed)

    def _release(self, request: Request, *, is_sound: bool = True) -> None:
        """Take back a request's blocks and its state."""
        self._prefixes.release(request, is_sound=is_sound)
        if self.states is not None and request.state is not None:
            self.states.release(request.state, is_sound=is_sound)
            request.state = None

    def _has_slot(self, num_kept_places: int = 0) -> bool:
        has_state = self.states is None or self.states.num_available > num_kept_places
        return has_state and len(self.running) + num_kept_places < self._max_batch_size

    def _has_blocks(self, num_blocks: int, num_kept_places: int = 0, num_kept_blocks: int = 0) -> bool:
        """Whether a request may take so many, beside those that keep their places."""
        # One spare block for each running request, or its growth would at once preempt the newcomer.
        return num_blocks + num_kept_blocks + len(self.running) + num_kept_places <= self.pool.num_free

    def _num_blocks_to_take(self, request: Request, shared_ids: Sequence[int]) -> int:
        """How many free blocks a waiting request would take, of those that it shares the ones that nobody uses."""
        return self._num_blocks_for(len(request.token_ids)) - len(shared_ids) + self.pool.count_free(shared_ids)

    def _forget_dead_versions(self) -> None:
        """Drop what blocks and slots of states hold of versions that no request, old or new, can run on."""
        known = self.pool.version_ids if self.states is None else self.pool.version_ids | self.states.version_ids
        if known <= {self.version.version_id}:
            return
        for version_id in known - self.count_by_version().keys():
            self.pool.forget_version(version_id)
            if self.states is not None:
                self.states.forget_version(version_id)

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
        self._release(request)
        request.num_computed = 0
        request.status = RequestStatus.WAITING
        insort(self.waiting, request, key=_rank)
        self._count(num_preemptions=1)

    def _share_of(self, request: Request, num_tokens: int) -> ScheduledRequest:
        """A share of `num_tokens` that the request has."""
        start = request.num_computed
        if (progress := request.observation.progress) is not None:
            progress.num_tokens = max(progress.num_tokens, min(start + num_tokens, request.num_prompt_tokens))
        needs_sample = start + num_tokens == len(request.token_ids)
        num_unrecorded = min(num_tokens, max(0, start + num_tokens - request.num_recorded))
        block_ids, state = tuple(request.block_ids), None
        if self.states is not None and request.state is not None:
            state = self.states.share(request.state, start, start + num_tokens)
        return ScheduledRequest(request, start, num_tokens, block_ids, num_unrecorded, needs_sample, state=state)

    def _count(self, **more: int) -> None:
        self.counts = self.counts._replace(**{name: getattr(self.counts, name) + by for name, by in more.items()})

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


def _priority(request: Request) -> int:
    return request.priority


def _split(budget: int, wanted: Sequence[tuple[Request, int]]) -> dict[int, int]:
    """Request id → its share of a step's prompt tokens.

    Args:
        wanted: prompts, and how many tokens each has to catch up with.
    """
    left = {request.request_id: num_tokens for request, num_tokens in wanted}
    shares = dict.fromkeys(left, 0)
    if not wanted:
        return shares
    ranks = {request.request_id: request.rank for request, _ in wanted}
    first = min(left, key=ranks.__getitem__)
    shares[first] = min(left[first], budget - budget // 2)
    left[first] -= shares[first]
    budget -= shares[first]
    for request_id in sorted(left, key=lambda request_id: (left[request_id], ranks[request_id])):
        share = min(left[request_id], budget)
        shares[request_id] += share
        budget -= share
    return shares
