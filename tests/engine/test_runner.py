from types import SimpleNamespace

import pytest
import torch

from amalgam.config.statistics import StatisticsSettings
from amalgam.engine.memory import available_bytes
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Request, ScheduledRequest, StepPlan
from amalgam.engine.runner import Runner, choose_num_blocks, token_spans
from amalgam.errors import ConfigError
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.kv_cache import KVCache
from amalgam.models.routing import TokenSpan
from tests.engine.fakes import FakeDecoder, FakeVersion, greedy_tokens, kv_cache_bytes, make_settings
from tests.errors import raises

CPU = torch.device("cpu")


def make_item(request_id, start, num_tokens, *, prompt=(5, 6, 7, 8, 9, 10), generated=(), blocks=(), num_recorded=0):
    params = SamplingParams(do_sample=False)
    request = Request(request_id, list(prompt), params, on_output=lambda output: None, num_recorded=num_recorded)
    request.token_ids += generated
    end = start + num_tokens
    num_unrecorded = min(num_tokens, max(0, end - num_recorded))
    return ScheduledRequest(request, start, num_tokens, tuple(blocks), num_unrecorded, end == len(request.token_ids))


def num_blocks(max_sequence_tokens=256, **settings):
    spec = FakeDecoder().spec
    return choose_num_blocks(spec, make_settings(**settings), max_sequence_tokens, CPU, torch.float32)


def test_a_step_mixes_chunks_and_single_tokens_over_scattered_blocks():
    runner = Runner(FakeDecoder(), make_settings(kv_cache_bytes=kv_cache_bytes(70)), 256, CPU, torch.float32)
    version = FakeVersion(1)
    first = make_item(1, 0, 4, blocks=(9, 3))
    assert runner.execute(StepPlan(version, (first,))).tokens == {}
    rest = make_item(1, 4, 2, blocks=(9, 3))
    whole = make_item(2, 0, 3, prompt=(11, 12, 13), blocks=(68,))
    result = runner.execute(StepPlan(version, (rest, whole)))
    token_ids = {request_id: tokens.token_ids for request_id, tokens in result.tokens.items()}
    assert token_ids == {1: greedy_tokens((5, 6, 7, 8, 9, 10), 1), 2: greedy_tokens((11, 12, 13), 1)}


def test_spans_tell_what_to_count_and_as_what():
    plan = StepPlan(
        FakeVersion(1),
        (
            make_item(1, 0, 4),  # the prompt's first part
            make_item(2, 4, 3, generated=(1,)),  # its end and a generated token
            make_item(3, 6, 1, generated=(1,), num_recorded=6),  # a generated token
            make_item(4, 0, 8, generated=(1, 2), num_recorded=7),  # computed again after a preemption
            make_item(5, 0, 4, num_recorded=6),  # again, and all of it known
        ),
    )
    assert token_spans(plan) == [
        TokenSpan(1, 0, 4, record_from=0, generated_from=4),
        TokenSpan(2, 4, 7, record_from=4, generated_from=6, position=4),
        TokenSpan(3, 7, 8, record_from=7, generated_from=7, position=6),
        TokenSpan(4, 8, 16, record_from=15, generated_from=14),
        TokenSpan(5, 16, 20, record_from=20, generated_from=20),
    ]


def test_a_step_that_fails_counts_neither_tokens_nor_requests():
    decoder, tracker = FakeDecoder(), ExpertTracker((0,), 8, 2, StatisticsSettings())
    settings = make_settings(kv_cache_bytes=kv_cache_bytes(70))
    runner = Runner(decoder, settings, 256, CPU, torch.float32, tracker)
    plan = StepPlan(FakeVersion(1), (make_item(1, 0, 6, blocks=(0, 1)), make_item(2, 0, 6, blocks=(2, 3))))

    def fail(token_ids):
        raise ValueError("no luck")

    decoder.on_step = fail
    with raises(ValueError, "no luck"):
        runner.execute(plan)
    tally = tracker.snapshot().tally
    assert (tally.num_requests, tally.num_tokens.sum(), tally.counts.sum()) == (0, 0, 0)
    decoder.on_step = lambda token_ids: None
    runner.execute(plan)
    runner.commit(plan, {})
    tally = tracker.snapshot().tally
    assert (tally.num_requests, tally.num_tokens.sum(), tally.counts.sum()) == (2, 12, 24)


def test_the_cache_takes_what_the_setting_allows():
    assert num_blocks(kv_cache_bytes=kv_cache_bytes(100) + 1) == 100


def test_without_a_setting_the_cache_holds_a_full_batch():
    assert num_blocks(max_sequence_tokens=99, max_batch_size=3) == 3 * 25


def test_without_a_setting_the_cache_takes_a_quarter_of_memory_at_most(monkeypatch):
    monkeypatch.setattr("amalgam.engine.runner.available_bytes", lambda device: 4 * kv_cache_bytes(80))
    assert num_blocks(max_batch_size=8) == 80


def test_a_cache_too_small_for_one_sequence_is_refused_with_both_numbers(monkeypatch):
    with raises(ConfigError, kv_cache_bytes(64), "engine.kv_cache_bytes", 1000):
        num_blocks(kv_cache_bytes=1000)
    monkeypatch.setattr("amalgam.engine.runner.available_bytes", lambda device: 4000)
    with raises(ConfigError, kv_cache_bytes(64), 1000):
        num_blocks()


def test_available_memory_is_a_plausible_number():
    assert 2**20 < available_bytes(CPU) < 2**50


@pytest.mark.parametrize(
    ("kv_dtype", "slot_bytes"),
    # The fake's layers have one head of 1 and 1, and two heads of 3 and 1: ten values, and six scales of 4 bytes.
    [("auto", 40), ("float32", 40), ("bfloat16", 20), ("float16", 20), ("int8", 10 + 24), ("fp8", 10 + 24)],
)
def test_a_cache_takes_what_its_type_takes(kv_dtype, slot_bytes):
    settings = make_settings(kv_cache_bytes=70 * 4 * slot_bytes, kv_dtype=kv_dtype)
    runner = Runner(FakeDecoder(), settings, 256, CPU, torch.float32)
    assert runner.num_blocks == 70
    assert runner.kv_cache_bytes == 70 * 4 * slot_bytes


def test_latents_have_no_values_and_so_no_scales_of_them():
    spec = SimpleNamespace(kv_shapes=((1, 20, 0),), state_shapes=(None,), index_dims=(0,))
    assert KVCache.bytes_per_block(spec, 16, torch.int8) == 16 * (20 + 4)
    assert KVCache.allocate(spec, 3, 16, torch.int8, CPU).nbytes == 3 * 16 * (20 + 4)


def test_index_keys_are_counted_with_keys_and_values():
    spec = SimpleNamespace(kv_shapes=((1, 20, 0),) * 2, state_shapes=(None, None), index_dims=(8, 0))
    for dtype, token_bytes in ((torch.bfloat16, 2 * 40 + 16), (torch.int8, 2 * (20 + 4) + 8 + 4)):
        assert KVCache.bytes_per_block(spec, 16, dtype) == 16 * token_bytes
        assert KVCache.allocate(spec, 3, 16, dtype, CPU).nbytes == 3 * 16 * token_bytes


def test_other_types_of_cache_are_refused():
    with raises(ConfigError, "engine.kv_dtype", "int4", "int8", "fp8"):
        make_settings(kv_dtype="int4")
