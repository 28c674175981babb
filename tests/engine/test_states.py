"""Recurrent states: whose slot is whose, what of shared beginnings is kept, and that no answer changes by it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.engine import core
from amalgam.engine.core import Engine
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason
from amalgam.engine.runner import choose_num_states
from amalgam.engine.speculation.speculator import Speculator
from amalgam.engine.states import StatePool
from amalgam.errors import ConfigError
from amalgam.models.decoder import Decoder
from amalgam.models.registry import all_families
from amalgam.models.weights import WeightVersion
from amalgam.text.tokenizer import Tokenizer
from tests.engine.fakes import FunctionProposer, make_settings
from tests.engine.running import Outputs, all_made, is_at_rest, wait_until
from tests.engine.test_scheduler import Simulation, expected_tokens, guesses, make_request, make_scheduler
from tests.engine.test_scheduler import make_version as version_of
from tests.errors import raises
from tests.models.harness import hand_built, load_model
from tests.models.tiny import save_tiny


class WithStates(Simulation):
    """Beside the cache, slots whose content is all tokens up to a place, of a version."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.slots: list[Any] = [None] * scheduler.states.num_slots
        self.num_computed = self.num_guessed = 0

    def _compute(self, item: Any, version_id: int) -> None:
        super()._compute(item, version_id)
        self.num_computed += item.num_tokens
        self.num_guessed += len(item.proposed_ids)
        state, tokens = item.state, [*item.request.token_ids, *item.proposed_ids]
        if state.source is None:
            assert item.start == 0
        else:
            assert self.slots[state.source] == (version_id, tokens[: item.start])
        for count, slot in (*state.saves, (item.num_tokens, state.target)):
            self.slots[slot] = version_id, tokens[: item.start + count]


def at_rest(scheduler: Any) -> bool:
    pool: StatePool = scheduler.states
    return bool(pool.num_available == pool.num_slots and scheduler.pool.num_free == scheduler.pool.num_blocks)


class Shared:
    """One scheduler and its simulation."""

    def __init__(self, num_slots: int = 16, **settings: Any) -> None:
        self.scheduler = make_scheduler(states=StatePool(num_slots), **settings)
        self.simulation = WithStates(self.scheduler)

    def computed(self, *prompts: list[int]) -> int:
        """Answer prompts together; how many tokens were computed."""
        before, first = self.simulation.num_computed, len(self.simulation.finished)
        for index, prompt in enumerate(prompts):
            self.scheduler.add(make_request(first + index, prompt=prompt, num_new=1))
        self.simulation.run()
        assert at_rest(self.scheduler)
        return self.simulation.num_computed - before


def test_a_prompt_goes_on_from_the_end_of_its_last_full_block() -> None:
    shared, prompt = Shared(), list(range(30))
    assert shared.computed(prompt) == 30
    assert shared.computed(prompt) == 30 - 28
    assert shared.computed([*prompt[:28], 7, 8, 9]) == 3
    assert shared.computed(prompt[:28]) == 28  # its last token has to be computed, and there is no state before it


def test_where_two_prompts_part_a_state_is_kept_for_the_third() -> None:
    shared, beginning = Shared(), list(range(20))
    assert shared.computed([*beginning, 50, 51, 52, 53, 54]) == 25
    assert shared.computed([*beginning, 60, 61, 62, 63, 64]) == 25
    assert shared.computed([*beginning, 70, 71, 72, 73, 74]) == 5


def test_samples_of_one_prompt_wait_for_its_state() -> None:
    shared, prompt = Shared(), list(range(30))
    assert shared.computed(*[prompt] * 4) == 30 + 3 * 2


def test_what_has_not_been_used_for_longest_goes_first() -> None:
    shared = Shared(num_slots=3, max_batch_size=1)
    first, second, third = ([n, *range(10)] for n in (50, 60, 70))
    for prompt in (first, second, first, third):
        shared.computed(prompt)
    assert shared.computed(first) == 3
    assert shared.computed(second) == 11


def test_with_one_slot_a_request_goes_on_in_the_one_it_starts_from() -> None:
    shared, prompt = Shared(num_slots=1), list(range(30))
    assert shared.computed(prompt) == 30
    assert shared.computed(prompt, prompt) == 60  # there was no slot to keep a state in
    pool = StatePool(2)
    state = pool.begin(1, [], [8])
    assert pool.share(state, 0, 9).saves == ((8, 1),)
    pool.commit(state, 1, [b"a", b"b"], 4)
    pool.release(state)
    other = pool.begin(1, [], [])
    assert pool.num_available == 1
    taken = pool.begin(1, [b"a", b"b"], [])
    assert pool.num_available == 0
    assert pool.share(taken, 8, 9)[:2] == (1, 1)
    pool.release(taken)
    pool.release(other)


def test_what_is_not_sound_is_not_found() -> None:
    shared, prompt = Shared(), list(range(30))
    request = make_request(0, prompt=prompt, num_new=4)
    shared.scheduler.add(request)
    shared.simulation.step()
    shared.scheduler.finish(request, is_sound=False)
    assert at_rest(shared.scheduler)
    assert shared.computed(prompt) == 30


def test_a_state_that_may_be_wrong_is_forgotten_by_whoever_started_from_it() -> None:
    shared, prompt = Shared(), list(range(30))
    assert shared.computed(prompt) == 30
    request = make_request(7, prompt=[*prompt[:28], 7, 8, 9], num_new=4)
    shared.scheduler.add(request)
    shared.simulation.step()
    shared.scheduler.finish(request, is_sound=False)
    assert at_rest(shared.scheduler)
    assert shared.computed(prompt) == 30


def test_a_state_that_somebody_reads_is_forgotten_and_freed_when_it_is_read() -> None:
    pool = StatePool(4)
    first = pool.begin(1, [], [4])
    pool.share(first, 0, 4)
    pool.commit(first, 1, [b"a"], 4)
    reader = pool.begin(1, [b"a"], [])
    pool.release(first, is_sound=False)
    assert pool.count_usable(1, [b"a"]) == 0
    assert pool.num_available == 2, "the reader's slot and the one it is about to read are taken"
    pool.release(reader)
    assert pool.num_available == pool.num_slots


@pytest.mark.parametrize("seed", range(8))
def test_any_traffic_finds_its_states(seed: int) -> None:
    """Requests that come, leave, preempt each other and share beginnings, over changing versions, in few slots."""
    rng = random.Random(seed)
    max_batch_size = rng.randint(1, 8)
    scheduler = make_scheduler(
        num_blocks=rng.randint(8, 30),
        max_batch_size=max_batch_size,
        max_step_tokens=rng.randint(1, 40),
        max_sequence_tokens=rng.randint(20, 100),
        propose=guesses(rng) if seed % 2 else None,
        states=StatePool(num_slots := rng.randint(1, 2 * max_batch_size), rng.randint(0, num_slots // 2)),
    )
    scheduler.prompt_tokens_beside = lambda num_streams: rng.randint(0, 20)
    simulation, cancelled = WithStates(scheduler), set[int]()
    requests: dict[int, Any] = {}
    for _ in range(100_000):
        if len(requests) < 150 and rng.random() < 0.4:
            num_prompt = rng.randint(1, scheduler.max_sequence_tokens - 1)
            beginning = [rng.choice((5, 6))] * rng.randint(0, num_prompt)
            prompt = beginning + [rng.randrange(97) for _ in range(num_prompt - len(beginning))]
            for _ in range(rng.choice((1, 1, 3))):
                request = make_request(len(requests), prompt=prompt, num_new=rng.randint(1, 30))
                requests[request.request_id] = request
                scheduler.add(request)
        if rng.random() < 0.05 and scheduler.has_requests:
            request = rng.choice([*scheduler.running, *scheduler.waiting])
            cancelled.add(request.request_id)
            scheduler.finish(request, is_sound=rng.random() < 0.5)
        if rng.random() < 0.02:
            scheduler.version = version_of(scheduler.version.version_id + 1)
        if simulation.step() is None and len(requests) >= 150:
            break
    assert not scheduler.has_requests, "no progress"
    assert at_rest(scheduler)
    assert bool(simulation.num_guessed) == bool(seed % 2) or scheduler.states.num_slots < 3
    assert len(simulation.finished) + len(cancelled) == len(requests)
    for request in simulation.finished:
        (version_id,) = simulation.versions[request.request_id]
        assert request.token_ids == expected_tokens(request.prompt_ids, request.num_new_tokens, version_id)


# --- A model with such states ---

GREEDY = SamplingParams(max_new_tokens=24, do_sample=False, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, WeightVersion]:
    folder: Path = tmp_path_factory.mktemp("hybrid")
    name = getattr(request, "param", "qwen3_5_moe")
    save_tiny(next(family for family in all_families() if family.name == name), folder)
    return load_model(folder)


@pytest.fixture
def make(model: tuple[Decoder, WeightVersion], tokenizer: Tokenizer) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(propose: Any = None, **settings: Any) -> Engine:
        decoder, version = model
        cpu = torch.device("cpu")
        guess = None if propose is None else Speculator("function", FunctionProposer(propose), 8, 256)
        engine = Engine(decoder, version, tokenizer, make_settings(**settings), cpu, torch.float32, None, guess)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()


def prompts_of(count: int, length: int = 40) -> list[list[int]]:
    rng = random.Random(3)
    beginning = [rng.randrange(3, 256) for _ in range(length // 2)]
    return [beginning + [rng.randrange(3, 256) for _ in range(rng.randint(1, length // 2))] for _ in range(count)]


def answers_of(engine: Engine, prompts: list[list[int]]) -> list[tuple[Any, Any]]:
    """Tokens and log-probabilities: these differ where a bit of a state does."""
    return [(answer.token_ids, answer.logprobs) for answer in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("model", ["lfm2_moe", "qwen3_5_moe"], indirect=True)
def test_chunks_neighbours_preemption_and_shared_beginnings_change_no_bit(make: Callable[..., Engine]) -> None:
    prompts = prompts_of(6)
    alone = make(max_batch_size=1, prefix_cache=False)
    expected = answers_of(alone, prompts)
    cramped = make(max_seq_length=72, kv_cache_bytes=19 * 4 * 2 * 2 * 32 * 4, max_step_tokens=7)
    whole = [tuple(prompt) + token_ids for prompt, (token_ids, _) in zip(prompts, expected, strict=True)]

    def guess(token_ids: tuple[int, ...]) -> list[int]:
        """None, one or two of three are right."""
        known = next(one for one in whole if one[: len(token_ids)] == token_ids)
        num_right = len(token_ids) % 3
        return [*known[len(token_ids) :][:num_right], 5, 6, 7][:3]

    guessing = make(propose=guess)
    for engine in (make(), make(max_step_tokens=5), guessing, make(propose=guess, max_step_tokens=9), cramped):
        assert answers_of(engine, prompts) == expected
        assert answers_of(engine, prompts) == expected  # from states that the first round has left
        assert is_at_rest(engine)
        assert engine.meter.read().counts.num_prefix_hit_tokens > 0
    counts = guessing.meter.read().speculation
    assert counts is not None and 0 < counts.num_accepted < counts.num_proposed
    assert cramped.meter.read().counts.num_preemptions > 0
    assert alone.meter.read().counts.num_prefix_hit_tokens == 0


def test_two_versions_have_their_own_states(
    make: Callable[..., Engine], model: tuple[Decoder, WeightVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    version, pools = model[1], all_made(monkeypatch, core, "StatePool")
    other = hand_built(version)
    changed = {slot: other[slot] for slot in other.origins}
    changed["layers.0.attention.log_rate"] = changed["layers.2.attention.log_rate"]
    other = WeightVersion(2, changed, other.origins, other.keys)
    prompts, engine = prompts_of(3), make()
    first = answers_of(engine, prompts)
    outputs = [Outputs() for _ in prompts]
    with engine.between_steps():
        for prompt, output in zip(prompts, outputs, strict=True):
            engine.submit(prompt, GREEDY, output)
    wait_until(lambda: len(outputs[0].all) > 1)
    engine.set_version(other)
    second = answers_of(engine, prompts)
    assert [tuple(output.token_ids) for output in outputs if output.last()] == [tokens for tokens, _ in first]
    assert second != first
    assert second == answers_of(engine, prompts)
    assert [pool.version_ids for pool in pools] == [{2}]


def test_a_cancelled_request_gives_its_slot_back(
    make: Callable[..., Engine], model: tuple[Decoder, WeightVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = all_made(monkeypatch, core, "StatePool")
    engine, output = make(max_batch_size=1), Outputs()
    request_id = engine.submit(prompts_of(1)[0], SamplingParams(max_new_tokens=200, ignore_eos=True), output)
    wait_until(lambda: len(output.all) > 2)
    engine.cancel(request_id)
    assert output.last().finish_reason is FinishReason.CANCELLED
    (pool,) = pools
    assert pool.num_available == pool.num_slots == 2
    assert engine.state_cache_bytes == 2 * model[0].spec.state_bytes > 0


def test_slots_without_room_are_refused(model: tuple[Decoder, WeightVersion]) -> None:
    spec = model[0].spec
    cpu = torch.device("cpu")
    for count in (3, 300):
        assert choose_num_states(spec, make_settings(state_cache_bytes=count * spec.state_bytes), cpu) == count
    with raises(ConfigError, str(spec.state_bytes), "state_cache_bytes"):
        choose_num_states(spec, make_settings(state_cache_bytes=spec.state_bytes - 1), cpu)
