"""Sparse attention in a running engine: index keys are shared, evicted and versioned with the blocks they lie in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.engine.core import Engine
from amalgam.engine.params import SamplingParams
from amalgam.kernels.backends.cpu import panels
from amalgam.kernels.layouts import dense
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.registry import all_families
from amalgam.models.weights import WeightVersion
from amalgam.text.tokenizer import Tokenizer
from tests.engine.fakes import make_settings
from tests.engine.running import is_at_rest
from tests.models.harness import hand_built, load_model
from tests.models.tiny import save_tiny

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_new_tokens=24, do_sample=False, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, WeightVersion]:
    folder: Path = tmp_path_factory.mktemp("indexed")
    save_tiny(next(family for family in all_families() if family.name == "glm_moe_dsa"), folder, index_topk=12)
    return load_model(folder)


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.stop()


def answers_of(engine: Engine, prompts: list[list[int]]) -> list[tuple[Any, Any]]:
    """Tokens and log-probabilities: these differ where a bit does."""
    return [(answer.token_ids, answer.logprobs) for answer in engine.generate(prompts, GREEDY)]


def test_chunks_neighbours_preemption_versions_and_shared_beginnings_change_no_bit(
    model: tuple[Decoder, WeightVersion], tokenizer: Tokenizer, engines: list[Engine]
) -> None:
    decoder, version = model
    rng = random.Random(3)
    beginning = [rng.randrange(3, 256) for _ in range(20)]
    prompts = [beginning + [rng.randrange(3, 256) for _ in range(rng.randint(1, 20))] for _ in range(6)]

    def make(**settings: Any) -> Engine:
        engine = Engine(decoder, version, tokenizer, make_settings(**settings), CPU, torch.float32, None, None)
        engines.append(engine)
        engine.start()
        return engine

    expected = answers_of(make(max_batch_size=1, prefix_cache=False), prompts)
    block_bytes = KVCache.bytes_per_block(decoder.spec, 4, torch.float32)
    cramped = make(max_seq_length=72, kv_cache_bytes=19 * block_bytes, max_step_tokens=7)
    for engine in (make(max_step_tokens=5), cramped):
        for _ in range(2):  # the second time from blocks that the first has left
            assert answers_of(engine, prompts) == expected
        assert is_at_rest(engine)
        assert engine.meter.read().counts.num_prefix_hit_tokens > 0
    assert cramped.meter.read().counts.num_preemptions > 0
    other = hand_built(version)
    key = -other["layers.0.attention.index_k"].dequantize(torch.float32)
    changed = {slot: other[slot] for slot in other.origins}
    changed["layers.0.attention.index_k"] = panels.prepare(dense(key))
    cramped.set_version(WeightVersion(2, changed, other.origins, other.keys))
    second = answers_of(cramped, prompts)
    assert second != expected and second == answers_of(cramped, prompts)
