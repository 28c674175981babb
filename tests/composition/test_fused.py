"""Experts in one tensor per layer: the same weights under the same names as one tensor per expert."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.composition.loader import ModelLoader
from amalgam.composition.manifest import plan_manifest
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.composition.source import Source
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.placement import BASE_SOURCE
from amalgam.errors import CheckpointError
from amalgam.formats.fused import FusedTensor
from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.backends.reference import operators as reference
from amalgam.models.families import gpt_oss, mixtral, phimoe, qwen3_moe
from amalgam.models.registry import all_families, fused_tensors
from amalgam.models.spec import Family
from amalgam.tools.analyze import analyze_checkpoint
from tests.errors import raises
from tests.formats.layouts import LAYOUTS
from tests.models.harness import CPU, Runner, load_model
from tests.models.tiny import GEMMA4_MOE, HuggingFace, tiny_model, write_checkpoint

# gpt-oss stores nothing else, and of what Ministral 3's wrapper may hold only Mistral 4 has experts.
FUSED = [family for family in all_families() if family.fused and family.name not in ("gpt_oss", "ministral3")]
PROMPT = list(range(3, 40))


@pytest.mark.parametrize("family", FUSED, ids=lambda family: family.name)
def test_both_sets_of_names_hold_the_same_weights(family: Family, tmp_path: Path) -> None:
    model = tiny_model(family, **(GEMMA4_MOE if family.name == "gemma4" else {}))
    model.save_pretrained(tmp_path / "alone")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(".experts.gate_up_proj" in name for name in load_file(tmp_path / "fused/model.safetensors"))
    _, alone = load_model(tmp_path / "alone")
    _, fused = load_model(tmp_path / "fused")
    assert alone.origins.keys() == fused.origins.keys()
    for slot in alone.origins:
        assert torch.equal(alone[slot].dequantize(), fused[slot].dequantize()), slot
        assert all(part.is_contiguous() for part in fused[slot].parts.values())


PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def renamed(name: str) -> str:
    """As llm-compressor 0.13 publishes Mixtral's experts one by one, under the names of transformers 5."""
    name = re.sub(r"block_sparse_moe\.(experts\.\d+)\.(w[123])", lambda m: f"mlp.{m[1]}.{PARTS[m[2]]}", name)
    return name.replace("block_sparse_moe.gate", "mlp.gate")


@pytest.mark.parametrize("layout", ["fp32", "mxfp4", "gptq-int4", "awq", "int4", "fp8-channel", "bnb-nf4", "hqq-int4"])
@pytest.mark.parametrize("family", [mixtral.FAMILY, phimoe.FAMILY], ids=lambda family: family.name)
def test_experts_one_by_one_under_the_names_of_other_families(family: Family, layout: str, tmp_path: Path) -> None:
    """In any format, and declared under the names that they are stored under."""
    torch.manual_seed(5)
    tiny_model(family).save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensor, module = tensors.pop(name), name.removesuffix(".weight")
        tensors |= {f"{module}.{suffix}": part for suffix, part in LAYOUTS[layout].make(*tensor.shape).items()}
    config["quantization_config"] = LAYOUTS[layout].quantization
    write_checkpoint(tmp_path / "old", config, tensors)
    write_checkpoint(tmp_path / "new", config, {renamed(name): tensor for name, tensor in tensors.items()})
    assert any("mlp.experts.0.gate_proj" in name for name in load_file(tmp_path / "new/model.safetensors"))
    old, new = (load_model(tmp_path / folder)[1] for folder in ("old", "new"))
    assert old.origins.keys() == new.origins.keys()
    for slot in old.origins:
        assert torch.equal(old[slot].dequantize(), new[slot].dequantize()), slot
    assert analyze_checkpoint(str(tmp_path / "new")).notes == ()

    twice = {renamed(name): tensor.clone() for name, tensor in tensors.items()} | tensors
    write_checkpoint(tmp_path / "twice", config, twice)
    with raises(CheckpointError):
        load_model(tmp_path / "twice")


def test_renamed_experts_are_declared_under_their_stored_names(tmp_path: Path) -> None:
    tiny_model(mixtral.FAMILY).save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    stored = {renamed(name): tensor for name, tensor in tensors.items()}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    for targets, is_refused in (
        ([r"re:.*mlp\.experts\.[0-9]+\.(gate|up|down)_proj$"], False),
        (["model.layers.0.mlp.experts.0.gate_proj"], True),  # by name, and the tensor is plain
    ):
        groups = {"group_0": {"targets": targets, "weights": weights, "format": "pack-quantized"}}
        declared = {"quant_method": "compressed-tensors", "config_groups": groups}
        write_checkpoint(tmp_path / "new", {**config, "quantization_config": declared}, stored)
        if not is_refused:
            load_model(tmp_path / "new")
            continue
        with raises(CheckpointError, "model.layers.0.block_sparse_moe.experts.0.w1.weight"):
            load_model(tmp_path / "new")


def test_a_fused_source_mixes_with_others(tmp_path: Path) -> None:
    """Expert by expert, and the manifest tells which bytes each came from."""
    tiny_model(mixtral.FAMILY).save_pretrained(tmp_path / "fused", save_original_format=False)
    quantize_checkpoint(str(tmp_path / "fused"), tmp_path / "int8", "int8")
    mapping = {f"model.layers.*.block_sparse_moe.experts.{expert}.*": "int8" for expert in (0, 2)}
    mixed = MixedPrecisionSettings(sources={"int8": str(tmp_path / "int8")}, weight_mapping=mapping)
    _, version = load_model(tmp_path / "fused", mixed=mixed)
    formats = {slot: origin.format for slot, origin in version.origins.items() if ".experts." in slot}
    assert {slot for slot, name in formats.items() if name == "int8"} == {s for s in formats if s[21] in "02"}
    up = version.origins["layers.1.mlp.experts.3.up"].parts[0]
    assert up.tensor == "model.layers.1.mlp.experts.gate_up_proj[3, 128:256]"
    raw = (tmp_path / "fused/model.safetensors").read_bytes()[up.offset : up.offset + up.nbytes]
    expected = version["layers.1.mlp.experts.3.up"].dequantize()
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32).view(expected.shape), expected)


def test_gpt_oss_in_mxfp4_equals_the_hugging_face_class(tmp_path: Path) -> None:
    """Attention wide, experts in MXFP4 as published, against the class with what transformers makes of the blocks."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = tiny_model(gpt_oss.FAMILY)
    torch.manual_seed(3)
    replaced = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, inputs, outputs = parameter.shape
                blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
                scales = torch.randint(121, 125, (experts, outputs, inputs // 32), dtype=torch.uint8)
                parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
                replaced |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    save_file({**kept, **replaced}, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    spared = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": spared}
    (tmp_path / "config.json").write_text(json.dumps(config))

    decoder, version = load_model(tmp_path)
    layout = "panels_table4" if extension.is_available() else "table4"
    assert {version[f"layers.0.mlp.experts.1.{part}"].layout.name for part in ("gate", "up", "down")} == {layout}
    logits = Runner(decoder, version).step({0: PROMPT})[0]
    torch.testing.assert_close(logits, HuggingFace(model).logits(PROMPT), atol=1e-4, rtol=0)


def test_fused_fp8_blocks_keep_their_scales(tmp_path: Path) -> None:
    """transformers' fp8 experts: each of gate and up has whole blocks of scales of its own."""
    torch.manual_seed(1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values = torch.randn(2, 2 * 20, 48).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2 * 2, 3) + 0.5  # 20 rows are 2 blocks of 16, so a scale never serves both
    write(tmp_path, {name: values, f"{name}_scale_inv": scales}, [16, 16])
    source = Source.open("test", str(tmp_path), fused_tensors)
    for expert in range(2):
        for position, part in enumerate(("gate", "up")):
            stored = source.weights[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"]
            rows = torch.arange(20)
            spread = scales[expert, 2 * position + rows // 16][:, torch.arange(48) // 16]
            expected = values[expert, 20 * position : 20 * position + 20].float() * spread
            assert torch.equal(source.load(stored).dequantize(), expected)


def test_transposed_tensors_hold_gate_columns_before_up_columns(tmp_path: Path) -> None:
    """Llama 4: `[experts, in, 2 out]`, no alternation, down transposed too; no family here has it, a plugin may."""
    experts, inputs, outputs = 3, 8, 5
    prefix = "model.layers.7.feed_forward.experts"
    gate_up, down = torch.randn(experts, inputs, 2 * outputs), torch.randn(experts, outputs, inputs)
    write(tmp_path, {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down})
    stored = "model.layers.{}.feed_forward.experts"
    table = (
        FusedTensor(
            f"{stored}.gate_up_proj",
            (f"{stored}.{{}}.gate_proj", f"{stored}.{{}}.up_proj"),
            is_transposed=True,
        ),
        FusedTensor(f"{stored}.down_proj", (f"{stored}.{{}}.down_proj",), is_transposed=True),
    )
    source = Source.open("test", str(tmp_path), lambda config: table)
    for expert in range(experts):
        expected = {
            "gate_proj": gate_up[expert, :, :outputs].t(),
            "up_proj": gate_up[expert, :, outputs:].t(),
            "down_proj": down[expert].t(),
        }
        for part, weight in expected.items():
            found = source.weights.pop(f"{prefix}.{expert}.{part}.weight")
            assert torch.equal(source.load(found).dequantize(), weight)
            x = torch.randn(2, weight.shape[1])
            torch.testing.assert_close(reference.linear(x, source.load(found)), x @ weight.t())
    assert not source.weights
    assert found.parts["weight"].name == f"{prefix}.down_proj[2, :, 0:8]"


def write(folder: Path, tensors: dict[str, torch.Tensor], block: list[int] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"architectures": list(qwen3_moe.FAMILY.architectures)}
    if block:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    (folder / "config.json").write_text(json.dumps(config))


def open_source(folder: Path, tensors: dict[str, torch.Tensor], block: list[int] | None = None) -> Source:
    write(folder, tensors, block)
    return Source.open(BASE_SOURCE, str(folder), fused_tensors)


NAME = "model.layers.0.mlp.experts.gate_up_proj"
MALFORMED: dict[str, tuple[dict[str, torch.Tensor], list[int] | None, str]] = {
    "two dimensions": ({NAME: torch.ones(4, 8)}, None, "[4, 8]"),
    "rows that gate and up cannot share": ({NAME: torch.ones(2, 7, 8)}, None, "[2, 7, 8]"),
    "integers": ({NAME: torch.ones(2, 8, 8, dtype=torch.int32)}, None, "int32"),
    "fp8 without scales": ({NAME: torch.ones(2, 8, 8).to(torch.float8_e4m3fn)}, None, "scales []"),
    "blocks that gate and up share": (
        {NAME: torch.ones(1, 56, 16).to(torch.float8_e4m3fn), f"{NAME}_scale_inv": torch.ones(1, 4, 1)},
        [16, 16],
        "16 rows",
    ),
    "too few blocks": (
        {NAME: torch.ones(1, 40, 16).to(torch.float8_e4m3fn), f"{NAME}_scale_inv": torch.ones(1, 3, 1)},
        [16, 16],
        "[1, 3, 1]",
    ),
    "scales without declared blocks": (
        {NAME: torch.ones(1, 32, 16).to(torch.float8_e4m3fn), f"{NAME}_scale_inv": torch.ones(1, 2, 1)},
        None,
        "weight_block_size",
    ),
    "an expert both fused and alone": (
        {NAME: torch.ones(1, 8, 8), "model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(4, 8)},
        None,
        NAME,
    ),
    "blocks without scales": (
        {f"{NAME}_blocks": torch.ones(1, 4, 1, 16, dtype=torch.uint8)},
        None,
        "uint8",
    ),
    "blocks of the wrong rank": (
        {
            f"{NAME}_blocks": torch.ones(1, 4, 16, dtype=torch.uint8),
            f"{NAME}_scales": torch.ones(1, 4, 1, dtype=torch.uint8),
        },
        None,
        "[experts, outputs, blocks, 16]",
    ),
    "scales of fewer experts": (
        {
            f"{NAME}_blocks": torch.ones(2, 4, 1, 16, dtype=torch.uint8),
            f"{NAME}_scales": torch.ones(1, 4, 1, dtype=torch.uint8),
        },
        None,
        "experts.1.gate_proj",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_impossible_tensors_are_refused_by_name(case: str, tmp_path: Path) -> None:
    tensors, block, named = MALFORMED[case]
    with raises(CheckpointError, "experts", named):
        open_source(tmp_path / "model", tensors, block)


@pytest.mark.parametrize("shape", [[2**30, 2, 0], [2**20, 2, 1]])
def test_more_experts_than_any_model_has_are_refused_at_once(shape: list[int], tmp_path: Path) -> None:
    write(tmp_path, {NAME: torch.ones(1, 2, 1)})
    size = 4 * math.prod(shape)
    header = json.dumps({NAME: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    with raises(CheckpointError, NAME, shape):
        Source.open("test", str(tmp_path), lambda config: qwen3_moe.FAMILY.fused)


def test_a_transposed_tensor_must_be_wide(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    write(tmp_path, {name: torch.ones(1, 8, 4).to(torch.float8_e4m3fn)})
    with raises(CheckpointError, name, "float8_e4m3fn"):
        Source.open("test", str(tmp_path), lambda config: gpt_oss.FAMILY.fused)


def test_the_manifest_hashes_slices(tmp_path: Path) -> None:
    tiny_model(gpt_oss.FAMILY).save_pretrained(tmp_path)
    loader = ModelLoader(ModelSettings(base_path=str(tmp_path)), InferenceSettings(), CPU, threads=1)
    planned = loader.plan()
    assert "gate_up_proj[0, :, 1:128:2]" in json.dumps(plan_manifest(planned, digest_threads=1))
