"""Numbers in GGUF metadata, as llama.cpp reads them: its defaults, its older keys, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from amalgam.checkpoint import TensorStore
from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.formats.gguf.config import read_config
from tests.composition.test_gguf import FAMILIES, PROMPT, TOLERANCE, logits_of
from tests.errors import raises
from tests.models.gguf_writer import write_gguf
from tests.models.tiny import save_tiny

Edit = Callable[[gguf.GGUFWriter], None]
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
}


def without(*keys: str) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        for key in keys:
            del writer.kv_data[0][key]

    return edit


def changed(architecture: str, **values: Any) -> Edit:
    """Keys of the architecture, `__` for a dot; a key that is there gets the new value."""

    def edit(writer: gguf.GGUFWriter) -> None:
        for name, value in values.items():
            key = f"{architecture}.{name.replace('__', '.')}"
            writer.kv_data[0].pop(key, None)
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)

    return edit


def both(*edits: Edit) -> Edit:
    return lambda writer: [edit(writer) for edit in edits] and None


WORKS: dict[str, tuple[str, dict[str, Any], Edit]] = {
    "a factor without a type is linear": ("llama", LINEAR, without("llama.rope.scaling.type")),
    "the older key of the factor": (
        "llama",
        LINEAR,
        both(
            without("llama.rope.scaling.type", "llama.rope.scaling.factor"),
            changed("llama", rope__scale_linear=4.0),
        ),
    ),
    "the newer key of the factor wins": ("llama", LINEAR, changed("llama", rope__scale_linear=2.0)),
    "a factor without a type, of experts": ("qwen3_moe", LINEAR, without("qwen3moe.rope.scaling.type")),
    "a factor of a latent attention": ("deepseek_v2", LINEAR, without("deepseek2.rope.scaling.type")),
    "no factor": ("llama", {}, changed("llama", rope__scaling__factor=0.0)),
    "a factor of one": ("llama", {}, changed("llama", rope__scaling__factor=1.0)),
    "linear without a factor": ("llama", {}, changed("llama", rope__scaling__type="linear")),
    "a type that forbids the factor": (
        "llama",
        {},
        changed("llama", rope__scaling__type="none", rope__scaling__factor=4.0),
    ),
    "yarn without the trained length": ("llama", YARN, without("llama.rope.scaling.original_context_length")),
    "yarn's other keys with another type": (
        "llama",
        LINEAR,
        changed("llama", rope__scaling__original_context_length=64, rope__scaling__yarn_beta_fast=8.0),
    ),
    "no base of the angles": ("llama", {}, without("llama.rope.freq_base")),
    "no experts, said with a zero": ("llama", {}, changed("llama", expert_count=0, expert_used_count=0)),
    "no window, said with a zero": ("qwen3", {}, changed("qwen3", attention__sliding_window=0)),
    "no groups, said with a one": (
        "qwen3_moe",
        {},
        changed("qwen3moe", expert_group_count=1, expert_group_used_count=1, expert_shared_count=0),
    ),
    "factors of one": (
        "llama",
        {},
        changed("llama", logit_scale=1.0, rope__scaling__attn_factor=1.0, attention__causal=True),
    ),
    "which layers have a window": ("gpt_oss", {}, changed("gpt-oss", attention__sliding_window_pattern=2)),
    "which layers have a window, each": (
        "gpt_oss",
        {},
        changed("gpt-oss", attention__sliding_window_pattern=[True, False], rope__freq_base_swa=150000.0),
    ),
    "widths of experts": (
        "qwen2_moe",
        {},
        without("qwen2moe.expert_feed_forward_length", "qwen2moe.expert_shared_feed_forward_length"),
    ),
    "sigmoid told by the bias of the experts": ("deepseek_v3", {}, without("deepseek2.expert_gating_func")),
    "GLM without groups": (
        "glm4_moe",
        {},
        without("glm4moe.expert_group_count", "glm4moe.expert_group_used_count", "glm4moe.expert_gating_func"),
    ),
    "how queries grow, which converters do not write": (
        "mistral4",
        {},
        changed("mistral4", attention__temperature_scale=0.1, attention__temperature_length=16),
    ),
    "KV heads of a draft layer": (
        "bailing_hybrid",
        {},
        changed("bailingmoe3", block_count=4, nextn_predict_layers=1, attention__head_count_kv=[0, 1, 0, 1]),
    ),
    "a bounded gate, which need not be said": ("bailing_hybrid", {}, without("bailingmoe3.kda.safe_gate")),
}


@pytest.mark.parametrize("case", WORKS)
def test_computes_what_llama_cpp_reads(case: str, tmp_path: Path) -> None:
    family, changes, edit = WORKS[case]
    model = save_tiny(FAMILIES[family], tmp_path / "hf", **changes)
    file = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", edit=edit)
    torch.testing.assert_close(logits_of(file), model.logits(PROMPT), atol=TOLERANCE, rtol=0)


def test_the_scaling_is_seen_in_the_logits(tmp_path: Path) -> None:
    """Else the cases above would prove nothing."""
    save_tiny(FAMILIES["llama"], tmp_path / "hf")
    plain = logits_of(write_gguf(tmp_path / "hf", tmp_path / "plain.gguf"))
    scaled = write_gguf(tmp_path / "hf", tmp_path / "scaled.gguf", edit=changed("llama", rope__scaling__factor=4.0))
    assert (logits_of(scaled) - plain).abs().max() > 0.1


REFUSED: dict[str, tuple[str, Edit, str]] = {
    "attn_factor": ("llama", changed("llama", rope__scaling__attn_factor=1.2), "llama.rope.scaling.attn_factor"),
    "alpha": ("llama", changed("llama", rope__scaling__alpha=1000.0), "alpha = 1000.0"),
    "yarn_log_multiplier": (
        "llama",
        changed("llama", rope__scaling__type="yarn", rope__scaling__yarn_log_multiplier=1.0),
        "yarn_log_multiplier = 1.0",
    ),
    "yarn_attn_factor": ("llama", changed("llama", rope__scaling__yarn_attn_factor=2.0), "yarn_attn_factor = 2.0"),
    "yarn_ext_factor": (
        "llama",
        changed("llama", rope__scaling__type="yarn", rope__scaling__yarn_ext_factor=0.0),
        "yarn_ext_factor = 0.0",
    ),
    "longrope": ("llama", changed("llama", rope__scaling__type="longrope"), "type = 'longrope'"),
    "logit_scale": ("llama", changed("llama", logit_scale=0.5), "logit_scale = 0.5"),
    "attention.scale": ("llama", changed("llama", attention__scale=0.1), "attention.scale"),
    "softcapping": ("qwen3", changed("qwen3", attn_logit_softcapping=30.0), "attn_logit_softcapping = 30.0"),
    "causal": ("qwen3", changed("qwen3", attention__causal=False), "causal = False"),
    "a number as a flag": ("qwen3", changed("qwen3", attention__sliding_window="0"), "sliding_window = '0'"),
    "groups": ("qwen3_moe", changed("qwen3moe", expert_group_count=4), "expert_group_count = 4"),
    "expert_weights_scale": ("qwen3_moe", changed("qwen3moe", expert_weights_scale=2.5), "expert_weights_scale = 2.5"),
    "expert_gating_func": ("qwen3_moe", changed("qwen3moe", expert_gating_func=2), "expert_gating_func = 2"),
    "norm": ("mixtral", changed("llama", expert_weights_norm=False), "expert_weights_norm = False"),
    "pattern": ("gpt_oss", changed("gpt-oss", attention__sliding_window_pattern=3), "sliding_window_pattern = 3"),
    "patterns": (
        "gpt_oss",
        changed("gpt-oss", attention__sliding_window_pattern=[False, True]),
        "sliding_window_pattern",
    ),
    "freq_base_swa": ("gpt_oss", changed("gpt-oss", rope__freq_base_swa=7.0), "freq_base_swa = 7.0"),
    "swiglu": ("gpt_oss", changed("gpt-oss", swiglu_clamp_exp=5.0), "swiglu_clamp_exp = 5.0"),
    "pooled keys of an indexer": ("deepseek_v32", changed("deepseek32", attention__indexer__kpool=2), "kpool = 2"),
    "blocks of an indexer": (
        "deepseek_v32",
        changed("deepseek32", attention__indexer__block_size=64),
        "block_size = 64",
    ),
    "layers without an indexer": (
        "deepseek_v32",
        changed("deepseek32", attention__indexer__types=[True, False]),
        "deepseek32.attention.indexer.types",
    ),
    "limits of experts": ("deepseek_v32", changed("deepseek32", swiglu_clamp_exp=[0.0, 7.0]), "swiglu_clamp_exp"),
    "a gate without a bound": ("bailing_hybrid", changed("bailingmoe3", kda__safe_gate=False), "kda.safe_gate = False"),
    "heads that turn in halves, for images": (
        "bailing_hybrid",
        changed("bailingmoe3", rope__dimension_sections=[2, 1, 1, 0]),
        "bailingmoe3.rope.dimension_sections",
    ),
    "a limit of a layer without experts": (
        "bailing_hybrid",
        changed("bailingmoe3", swiglu_clamp_shexp=[7.0, 7.0, 7.0]),
        "bailingmoe3.swiglu_clamp_shexp",
    ),
    "no groups said": ("bailing_hybrid", without("bailingmoe3.expert_group_count"), "bailingmoe3.expert_group_count"),
    "wider shared experts": (
        "bailing_hybrid",
        changed("bailingmoe3", expert_shared_feed_forward_length=64),
        "expert_shared_feed_forward_length = 64",
    ),
    "another start of growing queries": (
        "mistral4",
        changed("mistral4", attention__temperature_length=7),
        "temperature_length = 7",
    ),
    "positions that are not stretched": ("mistral4", changed("mistral4", rope__scaling__type="none"), "type = 'none'"),
    "one of two group keys": (
        "deepseek_v3",
        without("deepseek2.expert_group_used_count"),
        "deepseek2.expert_group_used_count",
    ),
    "one of two group keys, GLM": ("glm4_moe", without("glm4moe.expert_group_count"), "glm4moe.expert_group_count"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name(case: str, tmp_path: Path) -> None:
    family, edit, named = REFUSED[case]
    save_tiny(FAMILIES[family], tmp_path / "hf")
    with raises(UnsupportedError, named, "config.json"):
        read_config(TensorStore.open(write_gguf(tmp_path / "hf", tmp_path / "model.gguf", edit=edit)))


def test_two_scalings_at_once(tmp_path: Path) -> None:
    """llama.cpp applies both; no published model wants that."""
    rope = {**LLAMA3_ROPE, "factor": 8.0}
    save_tiny(FAMILIES["llama"], tmp_path / "hf", rope_parameters=rope, head_dim=64)
    edit = changed("llama", rope__scaling__factor=8.0)
    with raises(UnsupportedError, "scaling.factor", 8.0, "rope_freqs.weight"):
        read_config(TensorStore.open(write_gguf(tmp_path / "hf", tmp_path / "model.gguf", edit=edit)))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class TestGroupsOfOlderConverters:
    KEYS = ("deepseek2.expert_group_count", "deepseek2.expert_group_used_count")

    @pytest.mark.parametrize(
        ("num_layers", "num_experts", "gating", "groups"),
        [(60, 160, 1, (8, 3)), (27, 64, 1, (1, 1)), (61, 256, 2, (8, 4)), (61, 384, 2, (1, 1)), (27, 64, 2, (1, 1))],
    )
    def test_published_models_are_known_by_their_size(
        self, num_layers: int, num_experts: int, gating: int, groups: tuple[int, int], tmp_path: Path
    ) -> None:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "deepseek2")
        numbers = {
            "embedding_length": 16,
            "block_count": num_layers,
            "feed_forward_length": 16,
            "context_length": 64,
            "attention.head_count": 2,
            "attention.kv_lora_rank": 8,
            "attention.key_length": 12,
            "attention.value_length": 8,
            "rope.dimension_count": 4,
            "expert_count": num_experts,
            "expert_used_count": 6,
            "expert_shared_count": 1,
            "expert_feed_forward_length": 16,
            "expert_gating_func": gating,
        }
        for key, value in numbers.items():
            writer.add_uint32(f"deepseek2.{key}", value)
        writer.add_float32("deepseek2.attention.layer_norm_rms_epsilon", 1e-6)
        writer.add_tensor("token_embd.weight", np.zeros((8, 16), np.float32))
        writer.add_tensor("blk.1.ffn_gate_inp.weight", np.zeros((num_experts, 16), np.float32))
        for layer in range(num_layers):
            writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.zeros(16, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        config = read_config(TensorStore.open(tmp_path / "model.gguf"))
        assert (config["n_group"], config["topk_group"]) == groups
        assert config["first_k_dense_replace"] == 0

    def test_of_another_size_the_error_names_the_cure_and_the_cure_helps(self, tmp_path: Path) -> None:
        model = save_tiny(FAMILIES["deepseek_v3"], tmp_path / "hf", n_group=4, topk_group=2)
        (tmp_path / "gguf").mkdir()
        write_gguf(tmp_path / "hf", tmp_path / "gguf" / "model.gguf", edit=without(*self.KEYS))
        with raises(CheckpointError, self.KEYS[0], "config.json"):
            logits_of(tmp_path / "gguf")
        (tmp_path / "gguf" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
        torch.testing.assert_close(logits_of(tmp_path / "gguf"), model.logits(PROMPT), atol=TOLERANCE, rtol=0)
