"""The scheduler against a simulated model: no tensors, but a cache in which every wrong block is noticed."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest

from amalgam.engine.blocks import BlockPool
from amalgam.engine.meter import Counts
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Observation, Request, RequestStatus
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
    **others,
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
        **others,
    )


def make_request(request_id, num_prompt=0, num_new=4, *, prompt=None, priority=0, wants_trace=False):
    return Request(
        request_id,
        prompt or [(request_id * 31 + i) % 97 for i in range(num_prompt)],
        SamplingParams(max_new_tokens=num_new, priority=priority),
        on_output=lambda output: None,
        observation=Observation(wants_trace=wants_trace),
    )


def next_token(token_ids, version_id):
    return (sum((token + 1) * (17 * place + 3) for place, token in enumerate(token_ids)) + version_id) % 97


def expected_tokens(request_prompt, num_new, version_id):
    token_ids = list(request_prompt)
    for _ in range(num_new):
        token_ids.append(next_token(token_ids, version_id))
    return token_ids


def contents(token_ids, place, version_id):
    """Keys and values of a place: they depend on all tokens up to it."""
    return hash(tuple(token_ids[: place + 1])), version_id


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
        assert len(item.token_ids) == item.num_tokens
        token_ids = [*request.token_ids, *item.proposed_ids]
        for place in range(item.start, item.end):
            self.cache[self._slot(item, place)] = contents(token_ids, place, version_id)

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
        for place in range(end):
            assert self.cache[self._slot(item, place)] == contents(request.token_ids, place, version_id)
        return next_token(request.token_ids[:end], version_id)

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
    scheduler = make_scheduler(max_queue=2, max_batch_size=3)
    for request_id in range(5):  # three that may run in the next step, and two that wait
        scheduler.add(make_request(request_id, num_prompt=4))
    with raises(OverloadedError, "max_queue", 2):
        scheduler.add(make_request(5, num_prompt=4))
    Simulation(scheduler).step()
    with raises(OverloadedError, "max_queue", 2):
        scheduler.add(make_request(6, num_prompt=4))


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


def blocks_of(scheduler, *requests):
    return [list(request.block_ids) for request in requests]


class TestSharedBeginnings:
    def test_a_request_begins_behind_the_blocks_that_are_there(self):
        scheduler = make_scheduler()
        simulation = Simulation(scheduler)
        first = make_request(1, 22)
        scheduler.add(first)
        simulation.run()
        same, longer, other = (
            make_request(2, prompt=first.prompt_ids),
            make_request(3, prompt=[*first.token_ids, 5, 6]),
            make_request(4, prompt=[*first.prompt_ids[:9], *[1] * 9]),
        )
        for request in (same, longer, other):
            scheduler.add(request)
        plan = simulation.step()
        # 25 tokens of the first one were computed, its answer's too: six blocks of four.
        assert shares(plan) == [(2, 20, 2), (3, 24, 4), (4, 8, 10)]
        assert [item.num_unrecorded for item in plan.scheduled] == [2, 4, 10]
        assert [request.num_cached_tokens for request in (first, same, longer, other)] == [0, 20, 24, 8]
        assert same.block_ids[:5] == longer.block_ids[:5]
        assert scheduler.counts == Counts(0, 22 + 22 + 28 + 18, 20 + 24 + 8)

    def test_the_last_token_is_computed_whatever_is_there(self):
        scheduler = make_scheduler()
        simulation = Simulation(scheduler)
        for request_id in (1, 2):
            scheduler.add(make_request(request_id, prompt=[3] * 8))
            plans = simulation.run()
        assert shares(plans[0]) == [(2, 4, 4)]

    @pytest.mark.parametrize("reason", ["another version", "another token", "a trace", "it is off"])
    def test_what_is_not_shared(self, reason):
        scheduler = make_scheduler(shares_blocks=reason != "it is off")
        simulation = Simulation(scheduler)
        scheduler.add(make_request(1, prompt=[3] * 20))
        simulation.run()
        if reason == "another version":
            scheduler.version = make_version(2)
        prompt = [4 if reason == "another token" else 3, *[3] * 19]
        request = make_request(2, prompt=prompt, wants_trace=reason == "a trace")
        scheduler.add(request)
        assert shares(simulation.step()) == [(2, 0, 20)]
        assert request.num_cached_tokens == scheduler.counts.num_prefix_hit_tokens == 0

    def test_blocks_of_a_version_are_dropped_with_its_last_request(self):
        scheduler = make_scheduler()
        simulation = Simulation(scheduler)
        scheduler.add(make_request(1, 20, num_new=5))
        simulation.step()
        scheduler.version = make_version(2)
        scheduler.add(make_request(2, 20, num_new=9))
        simulation.step()
        assert scheduler.pool.version_ids == {1, 2}
        simulation.run()
        assert scheduler.pool.version_ids == {2}
        scheduler.version = make_version(3)
        assert not scheduler.pool.version_ids

    def test_who_would_compute_what_another_is_computing_waits_for_it_and_blocks_nobody(self):
        scheduler = make_scheduler(max_step_tokens=16)
        simulation = Simulation(scheduler)
        prompt = [7] * 41
        samples = [make_request(request_id, prompt=prompt) for request_id in (1, 2, 3)]
        for request in (*samples, make_request(4, 2)):
            scheduler.add(request)
        plans = simulation.run()
        assert shares(plans[0]) == [(1, 0, 14), (4, 0, 2)]
        assert [shares(plan) for plan in plans[1:4]] == [
            [(4, 2, 1), (1, 14, 15)],
            [(4, 3, 1), (1, 29, 12)],
            [(1, 41, 1), (4, 4, 1), (2, 40, 1), (3, 40, 1)],
        ]

    def test_n_samples_of_a_prompt_take_its_blocks_once(self):
        scheduler = make_scheduler(num_blocks=30, max_step_tokens=100)
        simulation = Simulation(scheduler)
        samples = [make_request(request_id, prompt=[7] * 41, num_new=2) for request_id in range(8)]
        for request in samples:
            scheduler.add(request)
        simulation.step()
        assert samples[0].status is RequestStatus.RUNNING
        simulation.step()  # 10 blocks for all, and one for each
        assert len({block_id for request in samples for block_id in request.block_ids}) <= 10 + 8
        assert scheduler.counts.num_prefix_hit_tokens == 7 * 40

    def test_those_that_wait_keep_their_places(self):
        """Two slots: the second sample's is not given away."""
        scheduler = make_scheduler(max_batch_size=2, max_step_tokens=16)
        for request in (*[make_request(i, prompt=[7] * 41) for i in (1, 2)], make_request(3, 2)):
            scheduler.add(request)
        plans = Simulation(scheduler).run()
        assert [shares(plan) for plan in plans[:4]] == [
            [(1, 0, 16)],
            [(1, 16, 16)],
            [(1, 32, 9)],
            [(1, 41, 1), (2, 40, 1)],
        ]

    def test_if_the_one_who_computes_leaves_the_next_goes_on(self):
        scheduler = make_scheduler(max_step_tokens=16)
        simulation = Simulation(scheduler)
        first, second, third = (make_request(request_id, prompt=[7] * 41) for request_id in (1, 2, 3))
        for request in (first, second, third):
            scheduler.add(request)
        simulation.step()
        scheduler.finish(first)
        assert shares(simulation.step()) == [(2, 16, 16)]
        simulation.run()
        assert second.token_ids == third.token_ids == expected_tokens([7] * 41, 4, 1)

    def test_a_preempted_request_finds_its_own_blocks_again(self):
        scheduler = make_scheduler(num_blocks=8, max_sequence_tokens=30)
        first, second = make_request(1, 11, num_new=18), make_request(2, 10, num_new=8)
        scheduler.add(first)
        scheduler.add(second)
        plans = Simulation(scheduler).run()
        starts = [item.start for plan in plans for item in plan.scheduled if item.request is second]
        assert scheduler.counts.num_preemptions > 0
        assert starts[0] == 0 and min(starts[1:]) > 0
        assert second.num_cached_tokens == scheduler.counts.num_prefix_hit_tokens == 0  # it has computed them itself
        assert second.token_ids == expected_tokens(second.prompt_ids, 8, 1)

    def test_guesses_that_did_not_come_true_are_not_found(self):
        scheduler = make_scheduler(propose=lambda token_ids: [0] * 9)
        simulation = Simulation(scheduler)
        first = make_request(1, 8, num_new=2)
        scheduler.add(first)
        simulation.run()
        scheduler.add(make_request(2, prompt=[*first.prompt_ids, first.token_ids[8], *[0] * 8]))
        assert shares(simulation.step())[0][:2] == (2, 8)


class TestPromptsBesideStreams:
    def test_a_step_with_streams_takes_so_many_prompt_tokens(self):
        scheduler = make_scheduler(max_step_tokens=32)
        scheduler.prompt_tokens_beside = lambda num_streams: 6
        simulation = Simulation(scheduler)
        scheduler.add(make_request(1, 4, num_new=30))
        simulation.step()
        scheduler.add(make_request(2, 100))
        plans = [simulation.step() for _ in range(17)]
        assert [[num for _, _, num in shares(plan)] for plan in plans] == [*[[1, 6]] * 16, [1, 4]]

    def test_streams_of_another_version_count_too(self):
        scheduler = make_scheduler()
        scheduler.prompt_tokens_beside = lambda num_streams: 6
        simulation = Simulation(scheduler)
        scheduler.add(make_request(1, 4, num_new=30))
        simulation.step()
        scheduler.version = make_version(2)
        scheduler.add(make_request(2, 50))
        assert [shares(simulation.step()) for _ in range(4)] == [[(2, 0, 6)], [(1, 4, 1)], [(2, 6, 6)], [(1, 5, 1)]]

    def test_a_step_of_streams_alone_may_be_asked_for(self):
        scheduler = make_scheduler()
        scheduler.prompt_tokens_beside = lambda num_streams: 0
        simulation = Simulation(scheduler)
        scheduler.add(make_request(1, 4, num_new=3))
        simulation.step()
        scheduler.add(make_request(2, 50))
        assert [shares(simulation.step()) for _ in range(3)] == [[(1, 4, 1)], [(1, 5, 1)], [(2, 0, 32)]]

    def test_a_short_prompt_passes_a_long_one_that_goes_on(self):
        scheduler = make_scheduler(max_step_tokens=16)
        simulation = Simulation(scheduler)
        long, second, short = make_request(1, 100), make_request(2, 110), make_request(3, 12)
        scheduler.add(long)
        scheduler.add(second)
        simulation.step()
        scheduler.add(short)
        plans = [simulation.step() for _ in range(2)]
        assert [shares(plan) for plan in plans] == [[(1, 16, 8), (3, 0, 8)], [(1, 24, 12), (3, 8, 4)]]

    def test_the_first_of_many_prompts_gets_half_whatever_comes(self):
        scheduler = make_scheduler(max_step_tokens=16, num_blocks=200, max_batch_size=20)
        simulation = Simulation(scheduler)
        long = make_request(1, 120)
        scheduler.add(long)
        for step in range(1, 14):
            scheduler.add(make_request(1 + step, 15, num_new=1))
            simulation.step()
            assert long.num_computed == 8 * step


class TestPriorities:
    def test_the_lowest_number_comes_first_and_equals_in_order(self):
        scheduler = make_scheduler(max_batch_size=1)
        for request_id, priority in enumerate([5, 0, 5, -1, 0]):
            scheduler.add(make_request(request_id, 4, num_new=1, priority=priority))
        simulation = Simulation(scheduler)
        simulation.run()
        assert [request.request_id for request in simulation.finished] == [3, 1, 4, 0, 2]

    def test_the_least_urgent_gives_its_blocks_back(self):
        scheduler = make_scheduler(num_blocks=9)
        simulation = Simulation(scheduler)
        least, first, last = (
            make_request(1, 7, num_new=12, priority=3),
            make_request(2, 7, num_new=12),
            make_request(3, 7, num_new=12),
        )
        for request in (least, first, last):
            scheduler.add(request)
        preempted = []
        while scheduler.has_requests:
            running = list(scheduler.running)
            simulation.step()
            preempted += [request.request_id for request in running if request in scheduler.waiting]
        assert preempted[:2] == [1, 3]
        assert [request.request_id for request in simulation.finished] == [2, 3, 1]


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
    scheduler.prompt_tokens_beside = lambda num_streams: rng.randint(0, 20)
    simulation = Simulation(scheduler)
    requests, cancelled = {}, set()
    for _ in range(100_000):
        if len(requests) < 250 and rng.random() < 0.4:
            num_prompt = rng.randint(1, scheduler.max_sequence_tokens - 1)
            beginning = [rng.choice((5, 6))] * rng.randint(0, num_prompt)  # many have one in common
            prompt = beginning + [rng.randrange(97) for _ in range(num_prompt - len(beginning))]
            priority, num_samples = rng.choice((0, 0, 0, 1)), rng.choice((1, 1, 1, 4))
            for _ in range(num_samples):
                request = make_request(
                    len(requests),
                    prompt=prompt,
                    num_new=rng.randint(1, 30),
                    priority=priority,
                    wants_trace=rng.random() < 0.1,
                )
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
        elif len(requests) >= 250:
            break
    assert not scheduler.has_requests, "no progress"
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert {request.request_id for request in simulation.finished} == set(requests) - cancelled
    for request in simulation.finished:
        (version_id,) = simulation.versions[request.request_id]
        assert request.token_ids == expected_tokens(request.prompt_ids, request.max_new_tokens, version_id)
        # The token sampled last never runs through the model.
        assert request.num_cached_tokens == 0 or not request.observation.wants_trace
        places = range(request.num_cached_tokens, len(request.token_ids) - 1)
        assert all(simulation.num_times_recorded[request.request_id, place] == 1 for place in places)
        for place in (*range(request.num_cached_tokens), len(request.token_ids) - 1):
            assert simulation.num_times_recorded[request.request_id, place] == 0
    assert scheduler.counts.num_prefix_hit_tokens > 0
    assert set(simulation.num_times_recorded.values()) == {1}
