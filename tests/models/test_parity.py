"""Each family against the Hugging Face class on tiny random models, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amalgam.models.spec import Family, all_families
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny

TOLERANCE = 1e-4
LENGTHS = (37, 5, 61, 1)

VARIANTS: dict[str, dict[str, Any]] = {
    "llama_biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama_rope_llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama_rope_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "qwen2_window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "mixtral_window": {"sliding_window": 8},
    "qwen3_moe_mixed": {"mlp_only_layers": [0], "norm_topk_prob": False, "attention_bias": True},
}


def _cases() -> list[tuple[str, Family, dict[str, Any]]]:
    families = {family.name: family for family in all_families()}
    plain = [(name, family, {}) for name, family in families.items()]
    names = sorted(families, key=len, reverse=True)
    variants = [
        (case, families[next(name for name in names if case.startswith(name))], changes)
        for case, changes in VARIANTS.items()
    ]
    return plain + variants


@pytest.fixture(scope="module", params=_cases(), ids=lambda case: case[0])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Runner]:
    name, family, changes = request.param
    folder = tmp_path_factory.mktemp(name)
    return save_tiny(family, folder, **changes), load_model(folder)


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 256, (length,), generator=generator).tolist() for length in LENGTHS]


def _expected(reference: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([prompt])).logits[0].float()


def _runner(models: Any) -> Runner:
    return Runner(*models[1], num_sequences=len(LENGTHS), blocks_each=40)


def test_whole_prompt(models: Any, prompts: list[list[int]]) -> None:
    runner = _runner(models)
    for sequence, prompt in enumerate(prompts):
        logits = runner.step({sequence: prompt})[sequence]
        torch.testing.assert_close(logits, _expected(models[0], prompt), atol=TOLERANCE, rtol=0)


def test_batched_chunked_and_cached(models: Any, prompts: list[list[int]]) -> None:
    """Unequal lengths side by side, cut into chunks of unequal size, the last tokens one by one."""
    runner = _runner(models)
    collected: list[list[torch.Tensor]] = [[] for _ in prompts]
    cursor = [0] * len(prompts)
    sizes = (7, 3, 16, 1)
    while any(cursor[s] < len(prompt) for s, prompt in enumerate(prompts)):
        chunks = {}
        for sequence, prompt in enumerate(prompts):
            remaining = len(prompt) - cursor[sequence]
            if remaining:
                size = 1 if remaining <= 4 else sizes[sequence]
                chunks[sequence] = prompt[cursor[sequence] : cursor[sequence] + size]
                cursor[sequence] += len(chunks[sequence])
        for sequence, logits in runner.step(chunks).items():
            collected[sequence].append(logits)
    for prompt, parts in zip(prompts, collected, strict=True):
        torch.testing.assert_close(torch.cat(parts), _expected(models[0], prompt), atol=TOLERANCE, rtol=0)


def test_chunks_and_neighbours_change_no_bit(models: Any, prompts: list[list[int]]) -> None:
    alone = [_runner(models).step({0: prompt})[0] for prompt in prompts]
    together = _runner(models).step(dict(enumerate(prompts)))
    for sequence, logits in enumerate(alone):
        assert torch.equal(together[sequence], logits)
    runner = _runner(models)
    parts = [runner.step({0: prompts[0][start : start + 5], 1: [9]})[0] for start in range(0, len(prompts[0]), 5)]
    assert torch.equal(torch.cat(parts), alone[0])


def test_greedy_tokens_equal(models: Any, prompts: list[list[int]]) -> None:
    reference, _ = models
    prompt = prompts[0]
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0
    )[0, len(prompt) :].tolist()
    runner = _runner(models)
    logits = runner.step({0: prompt})[0][-1]
    tokens: list[int] = []
    while len(tokens) < 64:
        logits = logits.clone()
        logits[2] = -torch.inf  # min_new_tokens forbids the end of the sequence
        tokens.append(int(logits.argmax()))
        logits = runner.step({0: [tokens[-1]]})[0][-1]
    assert tokens == expected
