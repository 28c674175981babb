"""Mixtures as publishers quantize them: every projection in their layout, the rest spared by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from amalgam.config.model import MixedPrecisionSettings
from amalgam.kernels.weights import PackedWeight
from amalgam.models.registry import all_families, read_spec
from amalgam.models.spec import Slot
from tests.formats.layouts import LAYOUTS
from tests.models.harness import Runner, hand_built, load_model
from tests.models.tiny import GEMMA4_MOE, save_tiny, write_checkpoint

FAMILIES = {family.name: family for family in all_families()}
PROMPT = list(range(3, 40))


@dataclass(frozen=True)
class Case:
    """A family in a layout; `spared`: what the declaration names as not quantized, and `says` how."""

    family: str
    layout: str
    says: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    spared: tuple[str, ...] = ()

    def is_quantized(self, slot: Slot, name: str) -> bool:
        is_projection = (slot.is_linear and slot.role != "head") or slot.role == "indexer"
        return is_projection and not any(part in name for part in self.spared)


LATENT = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 16}
INDEXED = {**LATENT, "index_topk": 12, "index_head_dim": 64, "index_n_heads": 16}
CASES = {
    "MiniMax M2 in FP8": Case(
        "minimax_m2", "fp8-block", {"modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
    ),
    "MiniMax M2 in AWQ": Case("minimax_m2", "awq", {"modules_to_not_convert": ["block_sparse_moe.gate"]}),
    "GLM-4.7-Flash in AWQ": Case(
        "glm4_moe_lite",
        "awq",
        {"modules_to_not_convert": ["self_attn", "mlp.gate", "shared_experts"]},
        LATENT,
        ("self_attn", "shared_experts"),
    ),
    "dots.llm1 in GPTQ": Case(
        "dots1", "gptq-int4", {"dynamic": {"-:.*mlp\\.gate$": {}, "-:.*self_attn.*": {}}}, spared=("self_attn",)
    ),
    "K-EXAONE in FP8": Case("exaone_moe", "fp8-block", {"modules_to_not_convert": ["lm_head", "mlp.gate"]}),
    "ERNIE 4.5 in W4A16": Case("ernie4_5_moe", "int4"),
    "Hunyuan in GPTQ": Case("hunyuan_v1_moe", "gptq-int4"),
    "Mistral 4 in NVFP4": Case("mistral4", "nvfp4", changes=LATENT),
    "DeepSeek-V3.2 in FP8": Case(
        "deepseek_v32", "fp8-block", {"modules_to_not_convert": ["weights_proj"]}, INDEXED, ("weights_proj",)
    ),
    "GLM-5 in FP8": Case(
        "glm_moe_dsa", "fp8-block", {"modules_to_not_convert": ["weights_proj"]}, INDEXED, ("weights_proj",)
    ),
    "Llama 4 in FP8": Case("llama4", "fp8-channel"),
    "Mixtral in AQLM": Case(
        "mixtral",
        "aqlm",
        {"linear_weights_not_to_quantize": [f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)]},
    ),
    "Granite MoE in W4A16": Case("granitemoe", "int4"),
    "Gemma 4 in FP8": Case("gemma4", "fp8-block", {"modules_to_not_convert": ["router", "lm_head"]}, GEMMA4_MOE),
    "Gemma 4 in W4A16": Case("gemma4", "int4", changes=GEMMA4_MOE),
    "Gemma 4 with inputs of layers in GPTQ": Case("gemma4", "gptq-int4", changes={"hidden_size_per_layer_input": 64}),
}


def write(case: Case, folder: Path) -> None:
    """The tiny model, its projections replaced by random ones in the case's layout, experts one by one."""
    family, layout = FAMILIES[case.family], LAYOUTS[case.layout]
    save_tiny(family, folder, torch.bfloat16, **case.changes)
    config = json.loads((folder / "config.json").read_text())
    _, spec = read_spec(config, "config.json")
    _, wide = load_model(folder, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for slot in spec.slots:
        name = family.logical_name(slot)
        if case.is_quantized(slot, name):
            rows, columns = slot.shape
            parts = layout.make(rows, columns)
            tensors |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in parts.items()}
        else:
            tensors[name] = stored[name] if name in stored else dense_of(wide[slot.name])
    declared = {**layout.quantization, **case.says}
    write_checkpoint(folder, {**config, "quantization_config": declared}, tensors)


def dense_of(weight: PackedWeight) -> torch.Tensor:
    return weight.dequantize(torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_model_of_dequantized_weights(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(3)
    write(case, tmp_path)
    decoder, version = load_model(tmp_path)
    logits, expected = (Runner(decoder, v).step({0: PROMPT})[0] for v in (version, hand_built(version)))
    assert bool(torch.isfinite(expected).all())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * float(expected.std()))
    formats = {origin.slot: origin.stored_format for origin in version.origins.values()}
    spec, family = decoder.spec, FAMILIES[case.family]
    for slot in spec.slots:
        if (slot.is_linear and slot.role != "head") or slot.role == "indexer":
            is_quantized = case.is_quantized(slot, family.logical_name(slot))
            assert (formats[slot.name] == LAYOUTS[case.layout].format) == is_quantized, slot.name


@pytest.mark.parametrize("family", ["minimax_m2", "ernie4_5_moe", "llama4", "granitemoe", "hunyuan_v1_moe", "gemma4"])
def test_a_single_expert_may_come_from_elsewhere(family: str, tmp_path: Path) -> None:
    from amalgam.composition.quantize import quantize_checkpoint

    save_tiny(FAMILIES[family], tmp_path / "base", **(GEMMA4_MOE if family == "gemma4" else {}))
    quantize_checkpoint(str(tmp_path / "base"), tmp_path / "int8", "int8")
    config = json.loads((tmp_path / "base/config.json").read_text())
    _, spec = read_spec(config, "config.json")
    layer = spec.moe_layer_ids[-1]
    slot = next(slot for slot in spec.slots if slot.name == f"layers.{layer}.mlp.experts.1.up")
    logical = FAMILIES[family].logical_name(slot)
    expert = f"{logical.rsplit('.', 2)[0]}.*"
    mixed = MixedPrecisionSettings(sources={"int8": str(tmp_path / "int8")}, weight_mapping={expert: "int8"})
    _, version = load_model(tmp_path / "base", mixed=mixed)
    found = {slot for slot, origin in version.origins.items() if origin.stored_format == "int8"}
    assert found == {f"layers.{layer}.mlp.experts.1.{part}" for part in ("gate", "up", "down")}
