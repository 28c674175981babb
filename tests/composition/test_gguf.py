"""GGUF as a source like any other, and as the only one."""

from __future__ import annotations

import json
import math
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from amalgam.checkpoint import TensorStore
from amalgam.composition.source import Source
from amalgam.config.model import MixedPrecisionSettings
from amalgam.errors import AmalgamError, CheckpointError, PlanError, UnsupportedError
from amalgam.models.registry import all_families
from tests.errors import raises
from tests.models.gguf_writer import ARCHITECTURES, KIND, write_gguf
from tests.models.harness import Runner, hand_built, load_model
from tests.models.tiny import GEMMA4_MOE, save_tiny, write_checkpoint

TOLERANCE = 1e-4
PROMPT = list(range(3, 64))
FAMILIES = {family.name: family for family in all_families() if family.architectures[0] in ARCHITECTURES}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 128,
    "short_factor": [1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
}
HYBRID = {
    "architecture": "GraniteMoeHybridForCausalLM",
    "shared_intermediate_size": 48,
    "layer_types": ["full_attention", "linear_attention"],
    "mamba_n_heads": 4,
    "mamba_d_state": 16,
    "tie_word_embeddings": True,
}
OLMO3 = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}


def olmo3_scaled(factor: float, write: Callable[[gguf.GGUFWriter, float], None]) -> tuple[str, dict[str, Any], Any]:
    """OLMo 3, whose file says how much YaRN sharpens attention."""
    rope = FAMILIES["olmo3"].tiny_config["rope_parameters"]
    rope = {**rope, "full_attention": {**rope["full_attention"], "attention_factor": factor}}
    return "olmo3", {**OLMO3, "rope_parameters": rope}, {"edit": lambda writer: write(writer, factor)}


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama_rope_llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 64}, {}),
    "llama_rope_linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {},
    ),
    "mixtral_window": ("mixtral", {"sliding_window": 8}, {}),
    "mixtral_one_tensor_per_expert": ("mixtral", {}, {"stacks_experts": False}),
    "qwen3_moe_fused": ("qwen3_moe", {}, {"fuses_gate_up": True}),
    "xverse_dense": ("xverse", {"num_experts": None, "moe_top_k": None, "num_shared_experts": None}, {}),
    "gpt_oss_default_rope": ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {}),
    "olmoe_clipped": ("olmoe", {"clip_qkv": 0.5}, {}),
    "deepseek_v2_groups": (
        "deepseek_v2",
        {"q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        {},
    ),
    "deepseek_v2_latent": ("deepseek_v2", {}, {"splits_latent": True}),
    "deepseek_v3_latent": ("deepseek_v3", {}, {"splits_latent": True}),
    "gemma2_plain": (
        "gemma2",
        {"query_pre_attn_scalar": 32, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        {},
    ),
    "gemma4_moe": ("gemma4", GEMMA4_MOE, {}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}, {}),
    "seed_oss_biases": ("seed_oss", {"attention_out_bias": True, "attention_bias": True, "mlp_bias": True}, {}),
    "ernie4_5_biases": ("ernie4_5", {"use_bias": True, "tie_word_embeddings": False}, {}),
    "granite_tied": ("granite", {"tie_word_embeddings": True}, {}),
    "granitemoe_shared": (
        "granitemoe",
        {"architecture": "GraniteMoeSharedForCausalLM", "shared_intermediate_size": 48, "tie_word_embeddings": True},
        {},
    ),
    "granitemoe_hybrid": ("granitemoe", HYBRID, {}),
    "granitemoe_hybrid_rope": ("granitemoe", {**HYBRID, "position_embedding_type": "rope"}, {}),
    "granitemoe_hybrid_dense": ("granitemoe", {**HYBRID, "num_local_experts": 0, "mamba_n_groups": 2}, {}),
    "lfm2_biases": ("lfm2", {"conv_bias": True, "block_auto_adjust_ff_dim": False}, {}),
    "glm4_moe_lite_latent": ("glm4_moe_lite", {}, {"splits_latent": True}),
    "deepseek_v32_chosen": ("deepseek_v32", {"index_topk": 16, "index_n_heads": 16}, {}),
    "bailing_hybrid_layers": (
        "bailing_hybrid",
        {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "kda_lower_bound": -2.5},
        {},
    ),
    "exaone_moe_full": ("exaone_moe", {"layer_types": ["full_attention"] * 3}, {}),
    "ernie4_5_moe_some": ("ernie4_5_moe", {"moe_layer_interval": 2, "num_hidden_layers": 4}, {}),
    "olmo3_factor": olmo3_scaled(1.3, gguf.GGUFWriter.add_rope_scaling_yarn_attn_factor),
    "olmo3_older_factor": olmo3_scaled(1.3, gguf.GGUFWriter.add_rope_scaling_attn_factors),
    "olmo3_published_factor": olmo3_scaled(0.1 * math.log(4.0) + 1, gguf.GGUFWriter.add_rope_scaling_yarn_attn_factor),
    "qwen3_moe_split": ("qwen3_moe", {}, {"split_max_tensors": 5}),
}
# What these files cannot say: the first two have scores of a scale of their own, the fourth a choice of layers.
FIXED: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "dots1": {"sliding_window": None},
    "llama4": {"attention_chunk_size": 8192, "floor_scale": 8192},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"routed_scaling_factor": 1.0},
    "olmo3": OLMO3,
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}
CASES = {name: (name, FIXED.get(name, {}), {}) for name in FAMILIES if name != "xverse"} | VARIANTS


def logits_of(path: Path, mixed: MixedPrecisionSettings | None = None) -> torch.Tensor:
    return Runner(*load_model(path, mixed=mixed), blocks_each=40).step({0: PROMPT})[0]


@pytest.mark.parametrize("case", CASES)
def test_alone_it_computes_what_hugging_face_does(case: str, tmp_path: Path) -> None:
    family, changes, options = CASES[case]
    model = save_tiny(FAMILIES[family], tmp_path / "hf", **changes)
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "hf", tmp_path / "gguf" / "model.gguf", **options)
    torch.testing.assert_close(logits_of(tmp_path / "gguf"), model.logits(PROMPT), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in ("llama", "mixtral", "qwen2", "qwen3_moe") for kind in (KIND.Q4_0, KIND.Q8_0)]
    + [("llama", kind) for kind in (KIND.F16, KIND.BF16, KIND.Q4_1, KIND.Q5_0, KIND.Q5_1, KIND.MXFP4)],
)
def test_every_weight_is_what_the_tool_makes_of_it(
    family: str, kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    """Also under the permutation of Llama's query and key rows, and for each expert of a stack."""
    save_tiny(FAMILIES[family], tmp_path / "hf")
    file = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", kind)
    decoder, version = load_model(file)
    published = load_file(tmp_path / "hf" / "model.safetensors")
    num_quantized = 0
    for slot, origin in version.origins.items():
        weight = published[origin.name].numpy()
        if origin.stored_format != "fp32":
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
            num_quantized += 1
        assert torch.equal(version[slot].dequantize(torch.float32), torch.from_numpy(weight)), slot
    assert num_quantized > 10

    composed, expected = (Runner(decoder, v).step({0: PROMPT})[0] for v in (version, hand_built(version)))
    assert torch.equal(composed, expected)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    save_tiny(FAMILIES["qwen3_moe"], root / "hf")
    for kind in (KIND.F32, KIND.Q8_0, KIND.Q4_0):
        write_gguf(root / "hf", root / f"{kind.name.lower()}.gguf", kind)
    return root


@pytest.mark.parametrize("kind", [KIND.F16, KIND.Q8_0])
def test_latent_attention_in_two_parts(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}
    save_tiny(FAMILIES["deepseek_v2"], tmp_path / "hf", **sizes)
    _, version = load_model(write_gguf(tmp_path / "hf", tmp_path / "model.gguf", kind, splits_latent=True))
    published = load_file(tmp_path / "hf" / "model.safetensors")
    for layer in range(2):
        heads = published[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].numpy().reshape(4, 96, 32)
        key, value = (
            gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(part), kind), kind)
            for part in (heads[:, :32].transpose(0, 2, 1), heads[:, 32:])
        )
        expected = np.concatenate((key.transpose(0, 2, 1), value), axis=1).reshape(384, 32)
        found = version[f"layers.{layer}.attention.kv_b"].dequantize(torch.float32)
        assert torch.equal(found, torch.from_numpy(expected))
        parts = version.origins[f"layers.{layer}.attention.kv_b"].parts
        assert {part.tensor for part in parts} == {f"blk.{layer}.attn_{part}_b.weight" for part in "kv"}


def test_granite_without_rotary_positions(tmp_path: Path) -> None:
    """A key that says nothing elsewhere says for Granite whether heads are rotated."""

    def without(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_finetuned(False)

    save_tiny(FAMILIES["granite"], tmp_path / "hf")
    with raises(CheckpointError, "rope.scaling.finetuned"):
        load_model(write_gguf(tmp_path / "hf", tmp_path / "model.gguf", edit=without))


def test_draft_layers_have_no_place(tmp_path: Path) -> None:
    """GLM-4.5 and DeepSeek-V3 files hold a layer more, which predicts the token after the next."""

    def add_draft(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["glm4moe.block_count"].value = 3
        writer.add_nextn_predict_layers(1)
        add(writer, "blk.2.attn_norm.weight", 64)
        add(writer, "blk.2.nextn.eh_proj.weight", 64)

    model = save_tiny(FAMILIES["glm4_moe"], tmp_path / "hf")
    file = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", edit=add_draft)
    torch.testing.assert_close(logits_of(file), model.logits(PROMPT), atol=TOLERANCE, rtol=0)


class TestMixed:
    def test_with_safetensors_among_the_experts_of_a_layer(self, checkpoints: Path) -> None:
        mixed = MixedPrecisionSettings(
            sources={name: str(checkpoints / f"{name}.gguf") for name in ("q8_0", "q4_0")},
            weight_mapping={
                "model.layers.*.mlp.experts.{0,3,6}.*": "q8_0",
                "model.layers.*.mlp.experts.{1,4,7}.*": "q4_0",
            },
        )
        decoder, version = load_model(checkpoints / "hf", mixed=mixed)
        formats = {(o.source, o.format) for o in version.origins.values() if ".experts." in o.slot}
        assert formats == {("base", "fp32"), ("q8_0", "gguf_q8_0"), ("q4_0", "gguf_q4_0")}
        composed, expected = (Runner(decoder, v).step({0: PROMPT})[0] for v in (version, hand_built(version)))
        assert torch.equal(composed, expected)

    def test_safetensors_with_gguf_as_the_base(self, checkpoints: Path) -> None:
        mixed = MixedPrecisionSettings(
            sources={"hf": str(checkpoints / "hf")}, weight_mapping={"model.layers.0.*": "hf"}
        )
        assert torch.equal(logits_of(checkpoints / "f32.gguf", mixed), logits_of(checkpoints / "hf"))

    def test_every_part_has_its_place_in_the_file(self, checkpoints: Path) -> None:
        """The manifest tells the bytes of each expert."""
        _, version = load_model(checkpoints / "q8_0.gguf")
        raw = (checkpoints / "q8_0.gguf").read_bytes()
        stack = {
            int(s.split(".")[4]): o
            for s, o in version.origins.items()
            if s.startswith("layers.1.mlp.experts.") and s.endswith(".down")
        }
        offsets = [stack[expert].parts[0].offset for expert in range(8)]
        sizes = {part.nbytes for origin in stack.values() for part in origin.parts}
        assert len(sizes) == 1
        assert np.all(np.diff(offsets) == sizes.pop())
        assert all(o.parts[0].tensor == "blk.1.ffn_down_exps.weight" for o in stack.values())
        assert offsets[0] is not None and offsets[7] < len(raw)

    @pytest.mark.parametrize(("change", "is_same"), [(0.0, True), (0.5, False)])
    def test_a_head_beside_a_tied_embedding(self, tmp_path: Path, change: float, is_same: bool) -> None:
        """A GGUF file may have both, in two precisions; the base checkpoint says that they are one."""
        save_tiny(FAMILIES["qwen3_moe"], tmp_path / "hf", tie_word_embeddings=True)
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        tensors = load_file(tmp_path / "hf" / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][7] += change
        write_checkpoint(tmp_path / "twice", config, tensors)
        other = write_gguf(tmp_path / "twice", tmp_path / "other.gguf", KIND.Q8_0)
        mixed = MixedPrecisionSettings(sources={"other": str(other)}, weight_mapping={"*.experts.*": "other"})
        if is_same:
            load_model(tmp_path / "hf", mixed=mixed)
        else:
            with raises(CheckpointError, "other", "lm_head.weight"):
                load_model(tmp_path / "hf", mixed=mixed)

    def test_another_model(self, checkpoints: Path, tmp_path: Path) -> None:
        save_tiny(FAMILIES["qwen3_moe"], tmp_path / "hf", num_experts_per_tok=3)
        other = write_gguf(tmp_path / "hf", tmp_path / "other.gguf")
        mixed = MixedPrecisionSettings(sources={"other": str(other)}, weight_mapping={"model.norm.weight": "other"})
        with raises(CheckpointError, "other", "num_active_experts is 3"):
            load_model(checkpoints / "hf", mixed=mixed)

    def test_a_quantized_weight_where_none_may_be(self, checkpoints: Path, tmp_path: Path) -> None:
        def quantized_norm(writer: gguf.GGUFWriter) -> None:
            raw = gguf.quants.quantize(np.ones(64, np.float32), KIND.Q8_0)
            writer.add_tensor("blk.2.attn_norm.weight", raw, raw_dtype=KIND.Q8_0)

        file = write_gguf(checkpoints / "hf", tmp_path / "model.gguf", edit=quantized_norm)
        with raises(CheckpointError, "blk.2.attn_norm.weight", "Q8_0"):
            load_model(file)


def add(writer: gguf.GGUFWriter, name: str, size: int) -> None:
    writer.add_tensor(name, np.full(size, 3.5, np.float32))


class TestRefusals:
    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Path:
        save_tiny(FAMILIES["llama"], tmp_path / "hf")
        return tmp_path

    @pytest.mark.parametrize(
        ("edit", "error", "named"),
        [
            (lambda w: w.add_uint32("llama.new_trick", 7), CheckpointError, "llama.new_trick = 7"),
            (lambda w: w.add_head_count(3), CheckpointError, "3 heads"),
            (lambda w: w.add_head_count(0), CheckpointError, "0 heads"),
            (lambda w: w.add_head_count([4, 2]), CheckpointError, "llama.attention.head_count"),
            (lambda w: w.add_string("llama.block_count", "two"), CheckpointError, "block_count = 'two'"),
            (lambda w: w.add_block_count(3), PlanError, "model.layers.2"),
            (lambda w: w.add_block_count(2**31 - 1), CheckpointError, "block_count = 2147483647"),
            (lambda w: w.add_block_count(0), CheckpointError, "block_count = 0"),
            (lambda w: w.add_expert_count(2**31 - 1), CheckpointError, "'blk.0.ffn_gate_inp.weight'"),
            (lambda w: w.add_block_count(1), CheckpointError, "model.layers.1"),
            (lambda w: w.add_embedding_length(32), PlanError, [256, 32]),
            (lambda w: w.add_float32("llama.rope.freq_base", float("nan")), CheckpointError, "freq_base = nan"),
            (lambda w: w.add_string("llama.rope.scaling.type", "spiral"), CheckpointError, "scaling.type = 'spiral'"),
            (lambda w: add(w, "rope_freqs.weight", 8), CheckpointError, "rope_freqs"),
            (lambda w: add(w, "rope_factors_long.weight", 8), CheckpointError, "rope_factors_short"),
            (lambda w: add(w, "blk.0.attn_gate.weight", 64), CheckpointError, "'blk.0.attn_gate.weight'"),
            (lambda w: add(w, "blk.0.attn_q_norm.weight", 16), CheckpointError, "attn_q_norm"),
            (lambda w: add(w, "blk.7.attn_norm.weight", 64), CheckpointError, "model.layers.7"),
            (lambda w: add(w, "blk.0.ffn_gate_exps.weight", 64), CheckpointError, "experts"),
            (lambda w: add(w, "output.scale", 64), CheckpointError, "'output.scale'"),
            (lambda w: w.add_tensor("output.bias", np.ones(64, np.int32)), CheckpointError, "output.bias"),
        ],
    )  # fmt: skip
    def test_what_is_not_understood(self, edit: Any, error: type[Exception], named: object, tiny: Path) -> None:
        def replaced(writer: gguf.GGUFWriter) -> None:
            with_edit = gguf.GGUFWriter(None, "llama")
            edit(with_edit)
            for key in with_edit.kv_data[0]:
                if key != "general.architecture":
                    writer.kv_data[0].pop(key, None)
            edit(writer)

        file = write_gguf(tiny / "hf", tiny / "model.gguf", edit=replaced)
        with raises(error, named):
            load_model(file)

    def test_an_unknown_architecture(self, tiny: Path) -> None:
        def rename(writer: gguf.GGUFWriter) -> None:
            writer.kv_data[0]["general.architecture"].value = "mamba"

        file = write_gguf(tiny / "hf", tiny / "model.gguf", edit=rename)
        with raises(UnsupportedError, "mamba", "deepseek2"):
            load_model(file)

    def test_a_config_beside_the_file_takes_the_place_of_metadata(self, tiny: Path) -> None:
        folder = tiny / "gguf"
        folder.mkdir()
        write_gguf(tiny / "hf", folder / "x.gguf", edit=lambda w: w.add_uint32("llama.new_trick", 7))
        with raises(CheckpointError, "llama.new_trick = 7", "config.json"):
            load_model(folder)
        (folder / "config.json").write_bytes((tiny / "hf" / "config.json").read_bytes())
        assert torch.equal(logits_of(folder), logits_of(tiny / "hf"))

    def test_a_truncated_file(self, tiny: Path) -> None:
        file = write_gguf(tiny / "hf", tiny / "model.gguf")
        file.write_bytes(file.read_bytes()[:-100])
        with raises(CheckpointError, file, file.stat().st_size):
            load_model(file)

    def test_floats_come_back_as_they_were(self, tiny: Path) -> None:
        config = Source.open("x", str(write_gguf(tiny / "hf", tiny / "model.gguf"))).config
        published = json.loads((tiny / "hf" / "config.json").read_text())
        assert config["rms_norm_eps"] == published["rms_norm_eps"] == 1e-6
        assert config["rope_parameters"] == published["rope_parameters"]


def test_150_mutations(checkpoints: Path, tmp_path: Path) -> None:
    """Whatever byte of the header is another: the same model, another one that fits, or an error of ours."""
    good = (checkpoints / "q8_0.gguf").read_bytes()
    first = min(entry.offset or 0 for entry in TensorStore.open(checkpoints / "q8_0.gguf").values())
    rng = random.Random(5)
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(good)
        position = rng.randrange(first)
        values = (bytes([rng.randrange(256)]), struct.pack("<I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1))))
        value = rng.choice(values)
        damaged[position : position + len(value)] = value
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        started = time.process_time()
        try:
            load_model(tmp_path / "damaged.gguf")
        except AmalgamError:
            num_refused += 1
        assert time.process_time() - started < 5
    assert num_refused > 50


def test_families_have_architectures() -> None:
    assert {"llama", "mixtral", "qwen2", "qwen3", "qwen3_moe"} <= set(FAMILIES)
