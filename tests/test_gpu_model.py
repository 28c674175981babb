"""The arithmetic of a step on a card adds up to the model's own bytes."""

from __future__ import annotations

import pytest
from benchmarks import gpu_model

from amalgam.models.registry import all_families, read_spec
from amalgam.models.spec import ModelSpec
from amalgam.planning.cards import Card
from tests.models.tiny import BASE_CONFIG

HOST = gpu_model.Host(50e9, 10e-6)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_spec({**gpu_model.QWEN3_30B, "num_hidden_layers": 2, "num_experts": 16, "vocab_size": 512}, "tiny")[1]


def model_of(spec: ModelSpec, sequences: int, plan: str = "int4") -> gpu_model.Model:
    found = gpu_model.models(spec, [sequences], 64, {"even": gpu_model.even_use(spec)})
    return next(model for model in found if model.name == plan)


def test_many_sequences_read_all_weights_but_the_embedding_once(spec: ModelSpec) -> None:
    model = model_of(spec, 4096)
    read = gpu_model.weight_bytes([one for one in model.everything if one.kind != "embed"])
    norms = sum(2 * slot.shape[0] for slot in spec.slots if len(slot.shape) == 1)
    embedding = 2 * spec.vocab_size * spec.hidden_size
    assert read == pytest.approx(model.weights_bytes - embedding - norms, rel=1e-6)


def test_one_sequence_reads_the_experts_of_one_token(spec: ModelSpec) -> None:
    one, mixed = model_of(spec, 1), model_of(spec, 1, "mixed")
    experts = gpu_model.weight_bytes([x for x in one.everything if x.kind in ("gate up", "down")])
    assert experts == pytest.approx(float(one.experts_bytes.sum()) * 8 / 16)
    assert len(mixed.everything) == len(one.everything) + 2 * spec.num_layers, "two more launches a layer and format"


def test_bounds_follow_from_bytes_launches_and_room(spec: ModelSpec) -> None:
    model = model_of(spec, 1)
    large = Card("large", 10**12, 1e12, 32e9)
    free, floored = model.bound(large, 0.0, HOST), model.bound(large, 1e-3, HOST)
    assert free is not None and floored is not None
    assert free.share == pytest.approx(1) and free.step_ms == pytest.approx(1e3 * free.card_bytes / 1e12)
    assert floored.step_ms == pytest.approx(free.launches) and free.resident == 1
    others = model.weights_bytes - int(model.experts_bytes.sum())
    small = Card("small", others + int(model.experts_bytes.sum() * 0.6), 1e12, 32e9)
    divided = model.bound(small, 0.0, HOST)
    assert divided is not None and 0 < divided.resident < 1 and divided.processor_bytes > 0
    assert divided.step_ms > free.step_ms
    assert model.bound(Card("none", others // 2, 1e12, 32e9), 0.0, HOST) is None


def test_recurrent_layers_are_what_torch_does_for_each_sequence() -> None:
    [family] = [family for family in all_families() if family.name == "qwen3_next"]
    config = {**BASE_CONFIG, **family.tiny_config, "architectures": list(family.architectures)}
    _, spec = read_spec(config, "tiny")
    one, two, three = ([x for x in model_of(spec, count).everything if x.kind == "torch"] for count in (1, 2, 3))
    more = len(two) - len(one)
    assert len(three) - len(two) == more > 0 and more % 2 == 0, "as many for every sequence in each of two layers"
    states = sum(x.activation_bytes for x in two) - sum(x.activation_bytes for x in one)
    assert states > 2 * spec.state_bytes, "each sequence's states are read and written"
