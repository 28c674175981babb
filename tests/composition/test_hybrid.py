"""Gated delta nets with quantized projections and shared experts: equal to the model of the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.model import MixedPrecisionSettings
from amalgam.models.registry import all_families
from amalgam.tools.analyze import analyze_checkpoint
from tests.models.harness import Runner, hand_built, load_model
from tests.models.tiny import save_tiny

FAMILIES = {family.name: family for family in all_families()}
PROMPT = list(range(3, 40))


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
@pytest.mark.parametrize("target", ["int4", "fp8", "int8"])
def test_quantized_projections(tmp_path: Path, name: str, target: str) -> None:
    # Wide enough for whole groups of int4 and blocks of fp8.
    sizes = {"linear_value_head_dim": 32, "moe_intermediate_size": 64, "linear_key_head_dim": 32}
    save_tiny(FAMILIES[name], tmp_path / "wide", **sizes)
    quantize_checkpoint(str(tmp_path / "wide"), tmp_path / target, target)
    decoder, version = load_model(tmp_path / target)
    formats = {slot: origin.format for slot, origin in version.origins.items()}
    first = "layers.0.attention.qkvz" if name == "qwen3_next" else "layers.0.attention.qkv"
    for slot in (first, "layers.0.attention.out", "layers.1.attention.q", "layers.0.mlp.shared.gate"):
        assert formats[slot] == formats["layers.0.mlp.experts.0.up"] != "fp32", slot
    for slot in ("layers.0.attention.convolution", "layers.0.attention.log_rate", "layers.0.mlp.shared_gate"):
        assert formats[slot] == "fp32", slot
    logits, expected = (Runner(decoder, one).step({0: PROMPT})[0] for one in (version, hand_built(version)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert not torch.equal(logits, Runner(*load_model(tmp_path / "wide")).step({0: PROMPT})[0])


WIDE: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "lfm2_moe": (
        {"moe_intermediate_size": 64},
        ("layers.0.attention.bcx", "layers.0.attention.out", "layers.1.attention.o", "layers.0.mlp.gate"),
        ("layers.0.attention.convolution", "layers.1.mlp.router", "layers.1.mlp.router_correction"),
    ),
    "bailing_hybrid": (
        {"moe_intermediate_size": 64, "head_dim": 32, "kv_lora_rank": 32, "v_head_dim": 32},
        ("layers.1.attention.g", *(f"layers.0.attention.{part}" for part in ("q", "k", "v", "f", "g", "out"))),
        tuple(f"layers.0.attention.{part}" for part in ("b", "q_convolution", "log_rate", "decay_bias", "norm")),
    ),
    "granitemoe": (
        {
            "architecture": "GraniteMoeHybridForCausalLM",
            "layer_types": ["linear_attention", "full_attention"],
            "intermediate_size": 64,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 4,
            "mamba_d_state": 32,
        },
        ("layers.0.attention.in", "layers.0.attention.out", "layers.1.attention.q", "layers.0.mlp.shared.gate"),
        tuple(f"layers.0.attention.{part}" for part in ("convolution", "convolution_bias", "log_rate", "skip")),
    ),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("target", ["int4", "fp8", "int8"])
def test_every_projection_beside_a_state(tmp_path: Path, name: str, target: str) -> None:
    changes, quantized, wide = WIDE[name]
    save_tiny(FAMILIES[name], tmp_path / "wide", **changes)
    quantize_checkpoint(str(tmp_path / "wide"), tmp_path / target, target)
    decoder, version = load_model(tmp_path / target)
    formats = {slot: origin.format for slot, origin in version.origins.items()}
    assert {formats[slot] for slot in quantized} == {formats["layers.1.mlp.experts.0.up"]} != {"fp32"}
    assert {formats[slot] for slot in wide} == {"fp32"}
    logits, expected = (Runner(decoder, one).step({0: PROMPT})[0] for one in (version, hand_built(version)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_experts_in_int4_beside_delta_nets_in_fp8(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_5_moe"], tmp_path / "wide", moe_intermediate_size=64)
    for target in ("int4", "fp8"):
        quantize_checkpoint(str(tmp_path / "wide"), tmp_path / target, target)
    mixed = MixedPrecisionSettings.model_validate(
        {
            "int4_path": str(tmp_path / "int4"),
            "fp8_path": str(tmp_path / "fp8"),
            "weight_mapping": {
                "model.language_model.layers.*.mlp.experts.*": "int4",
                "model.language_model.layers.*.linear_attn.*_proj*": "fp8",
            },
        }
    )
    decoder, version = load_model(tmp_path / "wide", mixed=mixed)
    sources = {slot: origin.source for slot, origin in version.origins.items()}
    assert sources["layers.0.attention.qkv"] == sources["layers.2.attention.out"] == "fp8"
    assert sources["layers.1.mlp.experts.7.down"] == "int4"
    logits, expected = (Runner(decoder, one).step({0: PROMPT})[0] for one in (version, hand_built(version)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_roles(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_next"], tmp_path)
    roles = analyze_checkpoint(str(tmp_path)).to_dict()["roles"]
    assert {"linear_attention", "attention", "convolution", "shared_expert", "router"} <= roles.keys()
    assert "other" not in roles
