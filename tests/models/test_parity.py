"""Each family against the Hugging Face class (XVERSE: its description in numpy) on tiny random models, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.models.registry import all_families
from amalgam.models.spec import Family
from tests.models.harness import Runner, load_model
from tests.models.tiny import EOS, GEMMA4_MOE, Reference, save_tiny

TOLERANCE = 1e-4
# Cases whose class, in float32, is farther than that from itself in float64 (1.5e-4, with AVX-512).
UNCERTAIN = {"qwen3_5_moe_yarn": 3e-4}
LENGTHS = (37, 5, 71, 1)  # delta nets of the Hugging Face classes work in chunks of 64

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0],
}
GROUP_LIMITED = {
    "q_lora_rank": 32,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,  # with 2 the two best groups would always hold the two best experts
    "routed_scaling_factor": 16.0,
    "attention_bias": True,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 64,
    },
}
# Case → changes to its family's tiny configuration; the case's name starts with the family's.
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
    "llama_rope_dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "llama_rope_yarn": {"rope_parameters": YARN},
    "llama_rope_yarn_all": {
        "rope_parameters": {
            **YARN,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 1.3,
            "mscale_all_dim": 0.6,
            "truncate": False,
        }
    },
    "llama_rope_longrope": {"rope_parameters": LONGROPE},
    "llama_rope_longrope_factor": {"rope_parameters": {**LONGROPE, "factor": 3.0}},
    "mistral_full": {"sliding_window": None, "tie_word_embeddings": True},
    "qwen2_window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "mixtral_window": {"sliding_window": 8},
    "qwen3_window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3_moe_window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3_moe_mixed": {"mlp_only_layers": [0], "norm_topk_prob": False, "attention_bias": True},
    "qwen2_moe_mixed": {
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmoe_clipped": {"clip_qkv": 0.5, "norm_topk_prob": True, "attention_bias": True},
    "deepseek_v2_group_limited": GROUP_LIMITED,
    "deepseek_v3_full_query": {"q_lora_rank": None, "attention_bias": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3_halves": {"rope_interleave": False, "norm_topk_prob": False, "rope_scaling": None},
    "glm4_moe_plain": {
        "use_qk_norm": False,
        "attention_bias": False,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.7,
        "partial_rotary_factor": 1.0,
    },
    # Contexts of more positions than are chosen. Of few heads many scores would be 0, and the classes choose by chance.
    "deepseek_v32_chosen": {"index_topk": 16, "index_n_heads": 16, "rope_scaling": YARN},
    "glm_moe_dsa_chosen": {
        "index_topk": 16,
        "index_n_heads": 16,
        "num_hidden_layers": 3,
        "indexer_types": ["full", "shared", "full"],
    },
    "mistral_large4_shared": {
        "kv_source_layers": [0, 1, 0, 1],
        "no_rope_layers": [1, 0, 1, 0],
        "indexer_types": ["full", "full", "shared", "full"],
        "index_topk": 16,
        "index_n_heads": 16,
        "attention_bias": True,
    },
    "minimax_m2_whole_heads": {"rotary_dim": None, "tie_word_embeddings": True},
    "dots1_full": {"sliding_window": None, "attention_bias": True, "n_group": 2, "topk_group": 1},
    "glm4_moe_lite_sparse_first": {
        "mlp_layer_types": ["sparse", "dense"],
        "q_lora_rank": None,
        "rope_interleave": False,
        "attention_bias": True,
    },
    "exaone_moe_full": {"layer_types": ["full_attention"] * 3, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe_some": {
        "moe_layer_interval": 2,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 2,
        "num_hidden_layers": 4,
        "moe_num_shared_experts": 0,
        "tie_word_embeddings": False,
    },
    "hunyuan_v1_moe_plain": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "mistral4_halves": {"rope_interleave": False, "norm_topk_prob": False, "q_lora_rank": None},
    "llama4_plain": {
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": True,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [1, 0, 1, 1],
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        },
    },
    "granitemoe_shared": {
        "architecture": "GraniteMoeSharedForCausalLM",
        "shared_intermediate_size": 48,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "granitemoe_hybrid": {
        "architecture": "GraniteMoeHybridForCausalLM",
        "shared_intermediate_size": 48,
        "layer_types": ["full_attention"] * 2,
        "mamba_n_heads": 4,
    },
    "granitemoe_mamba": {
        "architecture": "GraniteMoeHybridForCausalLM",
        "shared_intermediate_size": 48,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 24,
        "mamba_chunk_size": 16,
    },
    "granitemoe_mamba_dense": {
        "architecture": "GraniteMoeHybridForCausalLM",
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
        "mamba_d_conv": 3,
        "mamba_expand": 1,
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
        "position_embedding_type": "rope",
    },
    "granitemoe_dense": {
        "architecture": "GraniteMoeHybridForCausalLM",
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["full_attention"] * 2,
        "position_embedding_type": "rope",
        "mamba_n_heads": 4,
    },
    "gpt_oss_layer_types": {
        "layer_types": ["full_attention", "sliding_attention"],
        "swiglu_limit": 0.3,
        "swiglu_alpha": 1.2,
    },
    "qwen3_next_mixed": {
        "layer_types": None,
        "full_attention_interval": 2,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "attention_bias": True,
        "linear_conv_kernel_dim": 2,
        "linear_num_key_heads": 4,
        "tie_word_embeddings": True,
    },
    "lfm2_biases": {
        "conv_bias": True,
        "conv_L_cache": 4,
        "tie_word_embeddings": False,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe_plain": {
        "conv_bias": True,
        "use_expert_bias": False,
        "norm_topk_prob": False,
        "num_dense_layers": 2,
        "conv_L_cache": 2,
    },
    "bailing_hybrid_softplus": {
        "head_dim": 16,
        "n_group": 4,
        "topk_group": 2,
        "kda_safe_gate": False,
        "layer_types": None,
        "layer_group_size": 2,
        "num_hidden_layers": 4,
        "attention_bias": True,
        "short_conv_kernel_size": 3,
        "norm_topk_prob": False,
        "rope_parameters": {**YARN, "mscale_all_dim": 0.8},
    },
    "qwen3_5_moe_yarn": {
        "rope_parameters": {
            **YARN,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
    },
    "gpt2_untied": {"tie_word_embeddings": False, "n_inner": 96},
    "phimoe_longrope": {
        "lm_head_bias": False,
        "attention_bias": False,
        "router_jitter_noise": 0.01,
        "sliding_window": 16,
        "rope_parameters": {**LONGROPE, "short_mscale": 1.24, "long_mscale": 1.3},
    },
    "gemma2_plain": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma3_capped": {
        "final_logit_softcapping": 2.0,
        "attention_bias": True,
        "rope_parameters": None,
        "num_hidden_layers": 3,
        "layer_types": None,
        "sliding_window_pattern": 3,
    },
    "gemma4_moe": GEMMA4_MOE,
    "gemma4_dense": {
        **GEMMA4_MOE,
        "enable_moe_block": False,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "num_hidden_layers": 6,
        "layer_types": None,
        "rope_parameters": None,
        "use_bidirectional_attention": "vision",
    },
    "gemma4_unified": {
        "architecture": "Gemma4UnifiedForCausalLM",
        "hidden_size_per_layer_input": None,
        "vocab_size_per_layer_input": None,
        "layer_types": ["full_attention"] * 4,
        "num_kv_shared_layers": 1,
    },
    "phi3_longrope": {
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {**LONGROPE, "partial_rotary_factor": 1.0},
        "original_max_position_embeddings": 256,
    },
    "olmo2_biases": {"attention_bias": True, "tie_word_embeddings": True},
    "olmo3_plain": {"rope_parameters": None, "layer_types": None, "num_hidden_layers": 4, "attention_bias": True},
    "smollm3_window": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "granite_biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "seed_oss_biases": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    "ministral3_window": {"sliding_window": 8, "tie_word_embeddings": True},
    "ernie4_5_biases": {"use_bias": True, "tie_word_embeddings": False},
    "starcoder2_plain": {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False},
    "xverse_dense": {"num_experts": None, "moe_top_k": None, "num_shared_experts": None, "rope_theta": 10000.0},
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
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Any]:
    name, family, changes = request.param
    folder = tmp_path_factory.mktemp(name)
    return save_tiny(family, folder, **changes), load_model(folder)


@pytest.fixture
def tolerance(request: pytest.FixtureRequest) -> float:
    """How far logits may be from the reference's."""
    return UNCERTAIN.get(request.node.callspec.params["models"][0], TOLERANCE)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 256, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(models: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The reference's logits of each prompt."""
    return [models[0].logits(prompt) for prompt in prompts]


def _runner(models: Any) -> Runner:
    return Runner(*models[1], num_sequences=len(LENGTHS), blocks_each=40)


def test_whole_prompt(models: Any, prompts: list[list[int]], expected: list[torch.Tensor], tolerance: float) -> None:
    runner = _runner(models)
    for sequence, prompt in enumerate(prompts):
        logits = runner.step({sequence: prompt})[sequence]
        torch.testing.assert_close(logits, expected[sequence], atol=tolerance, rtol=0)


def test_batched_chunked_and_cached(
    models: Any, prompts: list[list[int]], expected: list[torch.Tensor], tolerance: float
) -> None:
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
    for parts, whole in zip(collected, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, atol=tolerance, rtol=0)


def test_chunks_and_neighbours_change_no_bit(models: Any, prompts: list[list[int]]) -> None:
    alone = [_runner(models).step({0: prompt})[0] for prompt in prompts]
    together = _runner(models).step(dict(enumerate(prompts)))
    for sequence, logits in enumerate(alone):
        assert torch.equal(together[sequence], logits)
    runner = _runner(models)
    parts = [runner.step({0: prompts[0][start : start + 5], 1: [9]})[0] for start in range(0, len(prompts[0]), 5)]
    assert torch.equal(torch.cat(parts), alone[0])


def test_greedy_tokens_equal(models: Any, prompts: list[list[int]]) -> None:
    """Each token is the one that the reference gives after those before it."""
    prompt = prompts[0]
    runner = _runner(models)
    logits = runner.step({0: prompt})[0][-1]
    tokens: list[int] = []
    while len(tokens) < 64:  # with the prompt, more than a chunk of a delta net's class
        logits = logits.clone()
        logits[EOS] = -torch.inf
        tokens.append(int(logits.argmax()))
        logits = runner.step({0: [tokens[-1]]})[0][-1]
    expected = models[0].logits([*prompt, *tokens])[len(prompt) - 1 : -1].clone()
    expected[:, EOS] = -torch.inf
    assert tokens == expected.argmax(-1).tolist()


def test_longrope_beyond_the_original_context(tmp_path: Path) -> None:
    """Prompts that are longer than it: their classes choose the long factors by the prompt, we by what is served."""
    family = next(family for family in all_families() if family.name == "phi3")
    rope = {**LONGROPE, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 32}
    reference = save_tiny(family, tmp_path, rope_parameters=rope, original_max_position_embeddings=32)
    runner = Runner(*load_model(tmp_path), num_sequences=2, blocks_each=40)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 256, (length,), generator=generator).tolist() for length in (37, 61)]
    for prompt, logits in zip(prompts, runner.step(dict(enumerate(prompts))).values(), strict=True):
        torch.testing.assert_close(logits, reference.logits(prompt), atol=TOLERANCE, rtol=0)
