"""The scheduler against a simulated model: no tensors, but a cache in which every wrong block is noticed."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest

from amalgam.engine.blocks import BlockPool
from amalgam.engine.request import Request, RequestStatus, SamplingParams
from amalgam.engine.scheduler import Scheduler
from amalgam.errors import OverloadedError, PromptTooLongError
from tests.errors import raises

BLOCK_SIZE = 4


def make_version(version_id):
    return SimpleNamespace(version_id=version_id)


class GuessingScheduler(Scheduler):
    """Asks for proposals behind each step, as the engine does."""

    def __init__(self, propose, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.propose = propose

    def schedule(self):
        plan = super().schedule()
        if plan is None or self.propose is None:
            return plan
        proposals = {item.request.request_id: self.propose(item.request.token_ids) for item in plan.scheduled}
        return self.add_proposals(plan, proposals)


def make_scheduler(
    num_blocks=64,
    max_batch_size=8,
    max_step_tokens=32,
    max_sequence_tokens=200,
    max_queue=1000,
    version=None,
    propose=None,
):
    return GuessingScheduler(
        propose,
        version or make_version(1),
        BlockPool(num_blocks),
        block_size=BLOCK_SIZE,
        max_batch_size=max_batch_size,
        max_step_tokens=max_step_tokens,
        max_sequence_tokens=max_sequence_tokens,
        max_queue=max_queue,
    )


def make_request(request_id, num_prompt, num_new=4):
    prompt = [(request_id * 31 + i) % 97 for i in range(num_prompt)]
    return Request(request_id, prompt, SamplingParams(max_new_tokens=num_new), on_output=lambda output: None)


def next_token(token_ids, version_id):
    return (sum((token + 1) * (17 * place + 3) for place, token in enumerate(token_ids)) + version_id) % 97


def expected_tokens(request_prompt, num_new, version_id):
    token_ids = list(request_prompt)
    for _ in range(num_new):
        token_ids.append(next_token(token_ids, version_id))
    return token_ids


class Simulation:
    """Runs steps as a runner would, with a list for the KV cache and `next_token` for the model."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.cache = [None] * (scheduler.pool.num_blocks * BLOCK_SIZE)
        self.num_times_recorded = Counter()  # (request, place) → times
        self.versions = {}  # request id → version ids that it ran on
        self.finished = []

    def step(self):
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        for item in plan.scheduled:
            self._compute(item, plan.version.version_id)
        rejected = {item.request.request_id: self._take(item, plan.version.version_id) for item in plan.scheduled}
        self.scheduler.commit(plan, rejected)
        for item in plan.scheduled:
            if item.request.num_new_tokens == item.request.max_new_tokens:
                self.scheduler.finish(item.request)
                self.finished.append(item.request)
        return plan

    def run(self, limit=100_000):
        plans = []
        while (plan := self.step()) is not None:
            plans.append(plan)
            assert len(plans) < limit, "no progress"
        return plans

    def _compute(self, item, version_id):
        request = item.request
        assert item.start == request.num_computed
        self.versions.setdefault(request.request_id, set()).add(version_id)
        for place, token_id in zip(range(item.start, item.end), item.token_ids, strict=True):
            self.cache[self._slot(item, place)] = (request.request_id, place, token_id, version_id)

    def _take(self, item, version_id):
        """Add the tokens that the cache gives to the request; returns how many proposals are wrong."""
        request, end = item.request, item.end - len(item.proposed_ids)
        if item.needs_sample:
            request.token_ids.append(self._read(request, item, end, version_id))
            for proposed_id in item.proposed_ids:
                if request.token_ids[end] != proposed_id:
                    break
                end += 1
                request.token_ids.append(self._read(request, item, end, version_id))
        for place in range(item.end - item.num_unrecorded, end):
            self.num_times_recorded[request.request_id, place] += 1
        return item.end - end

    def _read(self, request, item, end, version_id):
        entries = [self.cache[self._slot(item, place)] for place in range(end)]
        for place, entry in enumerate(entries):
            assert entry == (request.request_id, place, request.token_ids[place], version_id)
        return next_token([entry[2] for entry in entries], version_id)

    def _slot(self, item, place):
        return item.block_ids[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE


def shares(plan):
    return [(item.request.request_id, item.start, item.num_tokens) for item in plan.scheduled]


def test_a_long_prompt_is_computed_in_chunks_and_sampled_once_at_its_end():
    scheduler = make_scheduler(max_step_tokens=10)
    scheduler.add(make_request(1, num_prompt=25, num_new=2))
    plans = Simulation(scheduler).run()
    assert [shares(plan) for plan in plans] == [[(1, 0, 10)], [(1, 10, 10)], [(1, 20, 5)], [(1, 25, 1)]]
    assert [plan.scheduled[0].needs_sample for plan in plans] == [False, False, True, True]


def test_running_requests_come_before_waiting_ones():
    scheduler = make_scheduler(max_step_tokens=10)
    simulation = Simulation(scheduler)
    scheduler.add(make_request(1, num_prompt=4, num_new=9))
    simulation.step()
    scheduler.add(make_request(2, num_prompt=30))
    assert [shares(simulation.step()) for _ in range(2)] == [[(1, 4, 1), (2, 0, 9)], [(1, 5, 1), (2, 9, 9)]]


@pytest.mark.parametrize(
    ("limits", "num_admitted"),
    [({}, 6), ({"max_batch_size": 2}, 2), ({"max_step_tokens": 20}, 3), ({"num_blocks": 8}, 3)],
)
def test_admission_keeps_to_sequences_tokens_and_blocks(limits, num_admitted):
    scheduler = make_scheduler(**{"max_step_tokens": 64, **limits})
    for request_id in range(6):
        scheduler.add(make_request(request_id, num_prompt=8))  # 2 blocks
    assert len(scheduler.schedule().scheduled) == num_admitted
    assert len(scheduler.waiting) == 6 - num_admitted


def test_the_request_admitted_last_gives_its_blocks_back_and_keeps_its_tokens():
    scheduler = make_scheduler(num_blocks=5)
    simulation = Simulation(scheduler)
    first, second = make_request(1, num_prompt=7, num_new=10), make_request(2, num_prompt=4, num_new=9)
    scheduler.add(first)
    scheduler.add(second)
    third = make_request(3, num_prompt=12, num_new=1)
    for step in range(6):
        simulation.step()
        if step == 2:
            scheduler.add(third)
    assert first.status is RequestStatus.RUNNING
    assert second.num_new_tokens > 0
    assert (second.num_computed, second.block_ids) == (0, [])
    assert second.num_recorded == len(second.token_ids) - 1
    assert list(scheduler.waiting) == [second, third]
    simulation.run()
    for request in (first, second):
        assert request.token_ids == expected_tokens(request.prompt_ids, request.max_new_tokens, 1)
    assert set(simulation.num_times_recorded.values()) == {1}


def test_a_request_keeps_the_version_of_its_first_admission_through_preemption():
    scheduler = make_scheduler(num_blocks=5)
    simulation = Simulation(scheduler)
    first, second = make_request(1, num_prompt=7, num_new=10), make_request(2, num_prompt=4, num_new=9)
    scheduler.add(first)
    scheduler.add(second)
    simulation.step()
    scheduler.version = make_version(2)
    third = make_request(3, num_prompt=4, num_new=2)
    scheduler.add(third)
    simulation.run()
    assert simulation.versions == {1: {1}, 2: {1}, 3: {2}}


def test_a_waiting_request_gets_the_version_that_is_newest_when_it_is_admitted():
    scheduler = make_scheduler(max_batch_size=1)
    simulation = Simulation(scheduler)
    for request_id in (1, 2):
        scheduler.add(make_request(request_id, num_prompt=4))
    simulation.step()
    scheduler.version = make_version(2)
    simulation.run()
    assert simulation.versions == {1: {1}, 2: {2}}


def test_versions_take_turns():
    scheduler = make_scheduler()
    simulation = Simulation(scheduler)
    for version_id in (1, 2, 3):
        scheduler.version = make_version(version_id)
        scheduler.add(make_request(version_id, num_prompt=4, num_new=20))
        simulation.step()
    assert scheduler.count_by_version() == {1: 1, 2: 1, 3: 1}
    turns = [simulation.step().version.version_id for _ in range(12)]
    assert turns == [1, 2, 3] * 4
    simulation.run()
    assert scheduler.count_by_version() == {3: 0}


def test_a_prompt_that_never_fits_is_refused_with_both_numbers():
    with raises(PromptTooLongError, 50):
        make_scheduler(max_sequence_tokens=50).add(make_request(1, num_prompt=50))
    with raises(PromptTooLongError, 40):
        make_scheduler(num_blocks=10).add(make_request(1, num_prompt=40))


def test_an_answer_ends_where_the_sequence_must():
    scheduler = make_scheduler(num_blocks=10)
    request = make_request(1, num_prompt=35, num_new=1000)
    scheduler.add(request)
    Simulation(scheduler).run()
    assert len(request.token_ids) == 40


def test_the_queue_has_a_limit():
    scheduler = make_scheduler(max_queue=2)
    for request_id in (1, 2):
        scheduler.add(make_request(request_id, num_prompt=4))
    with raises(OverloadedError, "max_queue", 2):
        scheduler.add(make_request(3, num_prompt=4))


def test_a_request_that_leaves_frees_its_blocks_at_once():
    scheduler = make_scheduler(max_batch_size=1)
    running, waiting = make_request(1, num_prompt=30), make_request(2, num_prompt=4)
    scheduler.add(running)
    scheduler.add(waiting)
    Simulation(scheduler).step()
    scheduler.finish(running)
    scheduler.finish(waiting)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert not scheduler.has_requests
    assert scheduler.schedule() is None


def guesses(rng):
    """Proposes up to six tokens, of which some are right."""

    def propose(token_ids):
        proposed = []
        for _ in range(rng.randint(0, 6)):
            is_right = rng.random() < 0.8
            proposed.append(next_token([*token_ids, *proposed], 1) if is_right else rng.randrange(97))
        return proposed

    return propose


def test_proposals_that_come_true_save_steps():
    scheduler = make_scheduler(propose=lambda token_ids: expected_tokens(token_ids, 3, 1)[len(token_ids) :])
    request = make_request(1, num_prompt=5, num_new=10)
    scheduler.add(request)
    plans = Simulation(scheduler).run()
    # The prompt's step gives the first tokens too; the last token is never computed, so that nobody guesses it.
    assert [(item.num_tokens, len(item.proposed_ids)) for plan in plans for item in plan.scheduled] == [
        (8, 3), (4, 3), (2, 1)
    ]  # fmt: skip
    assert request.token_ids == expected_tokens(request.prompt_ids, 10, 1)


def test_proposals_take_no_tokens_or_blocks_from_others():
    def guess(token_ids):
        return [0] * 100

    scheduler = make_scheduler(max_step_tokens=10, num_blocks=8, propose=guess)
    simulation = Simulation(scheduler)
    for request_id in (1, 2):
        scheduler.add(make_request(request_id, num_prompt=5, num_new=20))
    simulation.step()
    second = scheduler.schedule()
    assert [item.num_tokens - len(item.proposed_ids) for item in second.scheduled] == [1, 1]
    assert sum(item.num_tokens for item in second.scheduled) == 10
    assert scheduler.pool.num_free >= 2  # one for each


@pytest.mark.parametrize("is_guessing", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_any_traffic_gets_the_right_tokens_and_leaves_nothing_behind(seed, is_guessing):
    """Hundreds of requests that come, leave early, and share a pool that is far too small, over changing versions."""
    rng = random.Random(seed)
    num_blocks, max_batch_size, max_step_tokens = rng.randint(8, 30), rng.randint(1, 12), rng.randint(1, 40)
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        max_batch_size=max_batch_size,
        max_step_tokens=max_step_tokens,
        max_sequence_tokens=rng.randint(20, 100),
        propose=guesses(rng) if is_guessing else None,
    )
    simulation = Simulation(scheduler)
    requests, cancelled = {}, set()
    for _ in range(100_000):
        if len(requests) < 250 and rng.random() < 0.4:
            num_prompt = rng.randint(1, scheduler.max_sequence_tokens - 1)
            request = make_request(len(requests), num_prompt, num_new=rng.randint(1, 30))
            requests[request.request_id] = request
            scheduler.add(request)
        if rng.random() < 0.05:
            in_flight = [*scheduler.running, *scheduler.waiting]
            if in_flight:
                request = rng.choice(in_flight)
                cancelled.add(request.request_id)
                scheduler.finish(request)
        if rng.random() < 0.02:
            scheduler.version = make_version(scheduler.version.version_id + 1)
        plan = simulation.step()
        if plan is not None:
            assert sum(item.num_tokens for item in plan.scheduled) <= max_step_tokens
            assert len(scheduler.running) <= max_batch_size
            assert {item.request.request_id for item in plan.scheduled}.isdisjoint(cancelled)
        elif len(requests) == 250:
            break
    assert not scheduler.has_requests, "no progress"
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert {request.request_id for request in simulation.finished} == set(requests) - cancelled
    for request in simulation.finished:
        (version_id,) = simulation.versions[request.request_id]
        assert request.token_ids == expected_tokens(request.prompt_ids, request.max_new_tokens, version_id)
        # The token sampled last never runs through the model.
        places = range(len(request.token_ids) - 1)
        assert all(simulation.num_times_recorded[request.request_id, place] == 1 for place in places)
        assert simulation.num_times_recorded[request.request_id, len(places)] == 0
    assert set(simulation.num_times_recorded.values()) == {1}
