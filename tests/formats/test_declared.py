"""What a checkpoint declares: parsed per module, refused where it is not understood, compared with the tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from amalgam.composition.source import Source
from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.formats.declared.config import parse_declaration, read_declaration
from amalgam.formats.declared.keys import HARMLESS, TRANSFORMS, TRANSFORMS_OF_A_MODEL
from amalgam.formats.declared.values import UNDECLARED, Declared
from tests.errors import is_named, raises
from tests.formats.layouts import LAYOUTS, ct
from tests.formats.published import PUBLISHED

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def of(config: dict[str, Any], module: str) -> Declared:
    return parse_declaration(config, "config.json").of(module)


def test_groups_of_compressed_tensors_apply_by_name_then_pattern_then_class() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
        "b": {"targets": ["re:.*down_proj"], "weights": {**INT4, "num_bits": 8}, "format": "pack-quantized"},
        "c": {"targets": ["model.layers.0.mlp.up_proj"], "weights": {"num_bits": 8, "type": "float"}},
    }
    ignored = ["lm_head", r"re:.*mlp\.gate$", "re:model.layers.1.*down_proj"]
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ignored}
    assert of(config, "model.layers.0.self_attn.q_proj").bits == 4
    assert of(config, "model.layers.0.mlp.experts.3.down_proj").bits == 8
    named = of(config, "model.layers.0.mlp.up_proj")
    assert (named.number, named.strategy, named.is_quantized) == ("float", "tensor", True)
    assert of(config, "lm_head").is_quantized is False
    assert of(config, "model.layers.0.mlp.gate").is_quantized is False
    assert of(config, "model.layers.0.mlp.gate_proj").is_quantized is None
    assert of(config, "model.layers.1.mlp.down_proj").is_quantized is False


def test_dynamic_and_extra_config_change_single_modules() -> None:
    dynamic = {"-:.*mlp.gate$": {}, r"+:.*\.0\..*": {"bits": 8}, ".*down_proj": {"group_size": 32}}
    config = {**GPTQ, "dynamic": dynamic, "lm_head": False}
    assert of(config, "model.layers.3.mlp.gate").is_quantized is False
    assert of(config, "model.layers.0.mlp.down_proj").bits == 8  # the first that matches
    assert of(config, "model.layers.1.mlp.down_proj").group_size == 32
    assert of(config, "lm_head").is_quantized is False
    extra = {"model.layers.0.mlp.gate": {"bits": 16}, ".*experts.*": {"bits": 2}, "model.layers.1.o_proj": {"bits": 8}}
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "extra_config": extra}
    assert of(config, "model.layers.0.mlp.gate").is_quantized is False
    assert of(config, "model.layers.0.mlp.experts.1.up_proj").bits == 2
    assert of(config, "model.layers.1.o_proj").bits == 8
    assert of(config, "model.layers.2.o_proj").bits == 4


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({"packing_format": "auto_round:auto_gptq"}, "gptq"),
        ({"packing_format": "auto_round:gptqmodel"}, "gptq_v2"),
        ({"packing_format": "auto_round"}, "gptq_v2"),
        ({"packing_format": "auto_round:auto_awq"}, "awq"),
        ({"packing_format": "auto_round:llm_compressor"}, None),
        ({"packing_format": "auto_round:gptq"}, "gptq"),
        ({"packing_format": "auto_round:awq"}, "awq"),
        ({"packing_format": "auto_round", "backend": "auto"}, "gptq_v2"),
        ({"packing_format": "auto_round:auto_awq", "backend": "auto_round:exllamav2"}, "awq"),
        ({}, "gptq"),
        ({"backend": "auto"}, "gptq"),
        # Versions that declared nothing else.
        ({"backend": "auto_round:exllamav2"}, "gptq_v2"),
        ({"backend": "autoround:exllamav2"}, "gptq_v2"),
        ({"backend": "auto-round:triton"}, "gptq_v2"),
        ({"backend": "auto_round:gptq:exllamav2"}, "gptq"),
        ({"backend": "auto_round:auto_gptq"}, "gptq"),
        ({"backend": "auto_gptq:exllamav2"}, "gptq"),
        ({"backend": "auto_round:auto_awq"}, "awq"),
    ],
)
def test_auto_round_packs_as_others_do(config: dict[str, Any], layout: str | None) -> None:
    assert of({"quant_method": "auto-round", "bits": 4, **config}, "x").layout == layout


def test_modules_left_alone_are_whole_parts_of_names() -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["gate", "lm_head"]}
    assert of(config, "model.layers.0.mlp.gate").is_quantized is False
    assert of(config, "model.layers.0.mlp.gate_proj").is_quantized is None
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["*router*", "model.layers.1.*"]}
    assert of(config, "model.layers.0.mlp.router").is_quantized is False
    assert of(config, "model.layers.1.self_attn.q_proj").is_quantized is False
    assert of(config, "model.layers.11.self_attn.q_proj").is_quantized is None
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    assert of(config, "model.layers.3.self_attn.q_proj").is_quantized is False


def test_mixed_precision_of_modelopt_names_every_layer() -> None:
    layers = {"model.a": {"quant_algo": "FP8"}, "model.b": {"quant_algo": "NVFP4", "group_size": 16}}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert (of(config, "model.a").bits, of(config, "model.b").bits, of(config, "model.c").bits) == (8, 4, None)


REFUSED = {
    "unknown method": ({"quant_method": "quark"}, "'quark'"),
    "no method": ({"bits": 4}, "no quant_method"),
    "method of the wrong type": ({"quant_method": 3}, "quant_method = 3"),
    "rotated weights": ({**ct("pack-quantized", **INT4), "transform_config": {"a": {}}}, "transform_config"),
    "sparse weights": (
        {**ct("pack-quantized", **INT4), "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse-24",
    ),
    "unknown layout": (ct("marlin-24", **INT4), "marlin-24"),
    "unknown strategy": (ct("pack-quantized", **{**INT4, "strategy": "attn_head"}), "attn_head"),
    "dynamic weights": (ct("pack-quantized", **{**INT4, "dynamic": True}), "dynamic"),
    "groups of the wrong type": ({"quant_method": "compressed-tensors", "config_groups": [1]}, "config_groups"),
    "a group size of zero": (ct("pack-quantized", **{**INT4, "group_size": 0}), "group_size = 0"),
    "a pattern that is none": (
        {**ct("pack-quantized", **INT4), "ignore": ["re:(unclosed"]},
        "unclosed",
    ),
    "a pattern of unbounded size": ({**GPTQ, "dynamic": {"(a{1000}){1000}(?!b)": {}}}, "repetitions"),
    "look-around that takes forever": ({**ct("pack-quantized", **INT4), "ignore": ["re:(?!x)(a|a)*$"]}, "(a|a)*"),
    "look-around of many repetitions": ({**GPTQ, "dynamic": {"(?!x)" + ".*" * 20: {}}}, "repetitions"),
    "more patterns than names": ({**GPTQ, "dynamic": {f"a{i}.*": {} for i in range(10_000)}}, "8193 patterns"),
    "gptq of another layout": ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
    "gptq in bytes": ({**GPTQ, "pack_dtype": "int8"}, "pack_dtype = 'int8'"),
    "gptq of five bits": ({**GPTQ, "bits": 5}, "bits = 5"),
    "gptq of bits as text": ({**GPTQ, "bits": "4"}, "bits = '4'"),
    "awq of another version": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
    "awq with zero points as text": ({"quant_method": "awq", "bits": 4, "zero_point": "no"}, "zero_point"),
    "awq of eight bits": ({"quant_method": "awq", "bits": 8}, "bits = 8"),
    "autoround of another packing": ({"quant_method": "auto-round", "packing_format": "auto_round:mlx"}, "mlx"),
    "autoround for another backend": ({"quant_method": "intel/auto-round", "backend": "auto_round:marlin"}, "marlin"),
    "autoround of floats": ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "mx_fp"),
    "fp8 experts in fp4": ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype"),
    "fp8 of another type": ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
    "fp8 of other scales": ({"quant_method": "fp8", "weight_scale_semantics": "log2"}, "log2"),
    "fp8 of other groups": ({"quant_method": "fp8", "weight_scale_method": "column"}, "column"),
    "fp8 of blocks without a size": ({"quant_method": "fp8", "weight_scale_method": "block"}, "weight_block_size"),
    "fp8 of another format": ({"quant_method": "fp8", "format": "float8_e5m2"}, "float8_e5m2"),
    "fp8 of another machine": (
        {**ct("float-quantized", num_bits=8, type="float"), "fp8_dtype_flavor": "e4m3fnuz"},
        "e4m3fnuz",
    ),
    "experts replaced by constants": (
        {**ct("pack-quantized", **INT4), "moe_sparsity_config": {"method": "novice"}},
        "novice",
    ),
    "awq in another tool's order": ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "llm-awq"),
    "awq in the order of activations": ({"quant_method": "awq", "bits": 4, "desc_act": True}, "desc_act"),
    "gptq for another kernel": ({**GPTQ, "is_marlin_format": True}, "is_marlin_format"),
    "gptq of floats": ({**GPTQ, "data_type": "fp"}, "data_type"),
    "modelopt that contradicts itself": (
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}},
        },
        "num_bits = 4",
    ),
    "modelopt with zero points": (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "has_zero_point": True},
        "has_zero_point",
    ),
    "modelopt with coded scales": (
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"m.x": {"quant_algo": "NVFP4", "weight_scale_encoding": "csf"}},
        },
        "weight_scale_encoding",
    ),
    "an activation that is rotated": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {"targets": ["Linear"], "weights": INT4, "input_activations": {"rotate": True}}},
        },
        "rotate",
    ),
    "autoround of floats with more exponents": (
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static", "bits": 8, "data_type": "fp8_e5m2"},
        "fp8_e5m2",
    ),
    "fp8 of odd scales": ({"quant_method": "fp8", "scale_fmt": "log"}, "scale_fmt"),
    "fp8 of impossible blocks": ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "[128, 0]"),
    "modelopt of another algorithm": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
    "bitsandbytes without bits": ({"quant_method": "bitsandbytes"}, "load_in_8bit"),
    "bitsandbytes of another type": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
        "'int4'",
    ),
    "hqq with quantized scales": (
        {
            "quant_method": "hqq",
            "quant_config": {"weight_quant_params": {"nbits": 4}, "scale_quant_params": {"nbits": 8}},
        },
        "scale_quant_params",
    ),
    "aqlm without codebooks": ({"quant_method": "aqlm", "num_codebooks": 0}, "num_codebooks = 0"),
    "aqlm of wider codes": ({"quant_method": "aqlm", "nbits_per_codebook": 17}, "nbits_per_codebook = 17"),
    "hqq of seven bits": ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 7}}}, "nbits = 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str) -> None:
    config, named = REFUSED[case]
    with raises((UnsupportedError, CheckpointError), named, "config.json"):
        parse_declaration(config, "config.json")


# What most modules are stored in: the layout, bits, what shares a scale, and how many inputs or which block that is.
READ: dict[str, tuple[str | None, int | None, str | None, int | tuple[int, int] | None]] = {
    "AutoGPTQ": ("gptq", 4, "group", 128),
    "Optimum": ("gptq", 4, "group", 128),
    "GPTQModel": ("gptq", 4, "group", 128),
    "GPTQModel AWQ": ("awq", 4, "group", 128),
    "GPTQModel FP8": ("float", 8, "block", (128, 128)),
    "AutoAWQ": ("awq", 4, "group", 128),
    "AutoAWQ's own names": ("awq", 4, "group", 128),
    "AWQ by transformers": ("awq", 4, "group", 128),
    "AutoRound": ("gptq", 4, "group", 128),
    "AutoRound, older": ("gptq", 4, "group", 128),
    "AutoRound AWQ": ("awq", 4, "group", 128),
    "AutoRound MXFP4": (None, 4, None, None),
    "AutoRound FP8": ("float", 8, "block", (128, 128)),
    "AutoRound as GPTQ": ("gptq", 4, "group", 128),
    "llm-compressor W4A16": ("pack-quantized", 4, "group", 128),
    "llm-compressor FP8": ("float-quantized", 8, "channel", None),
    "llm-compressor FP8 with a cache": ("float-quantized", 8, "tensor", None),
    "llm-compressor of a pruned model": ("pack-quantized", 4, "group", 128),
    "DeepSeek": ("ue8m0", 8, "block", (128, 128)),
    "Qwen FP8": ("float", 8, "block", (128, 128)),
    "FP8 under torch's name": ("float", 8, "block", (128, 128)),
    "FP8 by transformers": ("float", 8, None, None),
    "FBGEMM": (None, 8, "channel", None),
    "ModelOpt": ("NVFP4", 4, "group", 16),
    "ModelOpt, mixed": (None, None, None, None),
    "bitsandbytes": ("nf4", 4, None, None),
    "LLM.int8": ("int8", 8, "channel", None),
    "HQQ": (None, 4, None, None),
    "AQLM": (None, None, None, None),
    "gpt-oss": (None, 4, "group", 32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_declarations_are_read(name: str) -> None:
    found = parse_declaration(PUBLISHED[name], "config.json").default
    assert (found.layout, found.bits, found.strategy, found.group_size or found.block) == READ[name]


def objects(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all objects in a declaration whose keys decide what weights mean, its own included."""
    yield path
    for key, inner in value.items():
        if isinstance(inner, Mapping) and key not in HARMLESS:
            yield from objects(inner, (*path, key))


PLACES = [(name, path) for name, config in PUBLISHED.items() for path in objects(config)]


@pytest.mark.parametrize(("name", "path"), PLACES, ids=str)
def test_a_key_that_nobody_reads_is_refused_by_name(name: str, path: tuple[str, ...]) -> None:
    """At any depth; a declaration is read whole, or not at all."""
    config = deepcopy(PUBLISHED[name])
    place: Any = config
    for key in path:
        place = place[key]
    for value in (True, 1, "x", {"a": 1}, ["a"]):
        place["scale_is_squared"] = value
        keys = () if path[:1] == ("transform_config",) else (*path, "scale_is_squared")  # the former as a whole
        with raises((UnsupportedError, CheckpointError), "config.json", *keys):
            parse_declaration(config, "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_key_that_says_nothing_changes_nothing(name: str) -> None:
    expected = parse_declaration(PUBLISHED[name], "config.json")
    for value in (None, False, "", [], {}):
        found = parse_declaration({**PUBLISHED[name], "some_feature": value, "rotation_config": value}, "config.json")
        assert (found.default, found.named, len(found.rules)) == (
            expected.default, expected.named, len(expected.rules),
        ), value  # fmt: skip


@pytest.mark.parametrize("key", sorted(TRANSFORMS))
@pytest.mark.parametrize("name", ["GPTQModel", "GPTQModel AWQ", "AutoRound MXFP4", "llm-compressor FP8", "DeepSeek"])
def test_rotated_weights_are_refused_everywhere(name: str, key: str) -> None:
    for config in (
        {**PUBLISHED[name], key: {"block_size": 32}},
        {**PUBLISHED[name], "dynamic": {".*": {key: "hadamard"}}},
        {**PUBLISHED[name], "extra_config": {"model.layers.0.mlp.down_proj": {key: {"block_size": 32}}}},
    ):
        with raises(UnsupportedError, "config.json") as refused:
            parse_declaration(config, "config.json")
        assert any(is_named(part, str(refused.value)) for part in (key, "dynamic", "extra_config"))


@pytest.mark.parametrize("key", sorted(TRANSFORMS_OF_A_MODEL))
def test_rotations_beside_the_declaration_are_refused(key: str, tmp_path: Path) -> None:
    for config in ({key: {"r1": True}}, {"text_config": {key: {"r1": True}}}):
        with raises(UnsupportedError, key):
            read_declaration(tmp_path, config)
    assert read_declaration(tmp_path, {key: None}).default == UNDECLARED


def test_synonyms_that_disagree_are_refused() -> None:
    for changes in ({"format": "gptq_v2", "checkpoint_format": "gptq"}, {"q_group_size": 64}, {"method": "awq"}):
        with raises(CheckpointError, next(iter(changes))):
            parse_declaration({**GPTQ, **changes}, "config.json")
    assert of({"quant_method": "awq", "bits": 4, "version": "GEMM", "format": "gemm"}, "x").layout == "awq"


def test_side_files_are_read_whole_too(tmp_path: Path) -> None:
    for name, content in (
        ("hf_quant_config.json", {"producer": {}, "scale_is_squared": 1, "quantization": {"quant_algo": "FP8"}}),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "FP8", "scale_is_squared": 1}}),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "scale_is_squared": 1}),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "scale_is_squared": 1}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with raises(UnsupportedError, name, "scale_is_squared"):
            read_declaration(tmp_path, {})
        (tmp_path / name).unlink()


def test_awq_with_dynamic_rules() -> None:
    config = PUBLISHED["GPTQModel AWQ"]
    assert of(config, "model.layers.0.mlp.gate").is_quantized is False
    assert of(config, "model.layers.0.mlp.down_proj").group_size == 32
    assert of(config, "model.layers.0.mlp.up_proj").group_size == 128
    assert of(config, "lm_head").is_quantized is False


def test_scales_that_divide_are_declared_by_module() -> None:
    config = PUBLISHED["GPTQModel FP8"]
    assert of(config, "x.up_proj").divides_by_scale and of(config, "x.up_proj").block == (128, 128)
    row = of(config, "x.q_proj")
    assert (row.divides_by_scale, row.strategy, row.block) == (True, "channel", None)
    assert not of(PUBLISHED["DeepSeek"], "x.up_proj").divides_by_scale


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("(.|.)*!", False),
        ("(a|a)*$", True),
        ("(a|aa)+b", False),
        ("(a+)+$", True),
        (".*" * 30 + "!", False),
        ("(a*)*(a*)*b", False),
    ],
)
def test_patterns_take_time_linear_in_the_name(pattern: str, matches: bool) -> None:
    """A backtracking engine would take the age of the universe."""
    declaration = parse_declaration({**ct("pack-quantized", **INT4), "ignore": [f"re:{pattern}"]}, "config.json")
    (ignored, declared), *_ = declaration.rules
    assert declared.is_quantized is False
    assert ignored("a" * 4000) is matches


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        (r".*mlp\.gate$", ["model.layers.3.mlp.gate"], ["model.layers.3.mlp.gate_proj"]),
        (r"^(?!.*shared).*experts.*$", ["m.experts.3.up_proj"], ["m.shared.experts.3.up_proj", "m.mlp"]),
        (r"model\.layers\.(?:0|1)\.", ["model.layers.1.mlp"], ["model.layers.2.mlp", "x.model.layers.1.mlp"]),
    ],
)
def test_patterns_with_and_without_look_around(pattern: str, matching: list[str], others: list[str]) -> None:
    declaration = parse_declaration({**ct("pack-quantized", **INT4), "ignore": [f"re:{pattern}"]}, "config.json")
    for name in matching:
        assert declaration.of(name).is_quantized is False
    for name in others:
        assert declaration.of(name).is_quantized is not False


def test_side_files_declare_what_config_does_not(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128, "sym": True}))
    assert read_declaration(tmp_path, {}).default.layout == "gptq"
    (tmp_path / "quantize_config.json").unlink()
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    assert read_declaration(tmp_path, {}).default.group_size == 64
    (tmp_path / "quant_config.json").unlink()
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": inner}))
    declaration = read_declaration(tmp_path, {})
    assert declaration.default.bits == 8 and declaration.of("lm_head").is_quantized is False


def test_a_side_file_that_contradicts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 128, "sym": True}))
    with raises(CheckpointError, "bits", 4, tmp_path / "quantize_config.json", 8):
        read_declaration(tmp_path, {"quantization_config": GPTQ})


def test_compression_config_of_old_tools_is_refused(tmp_path: Path) -> None:
    with raises(UnsupportedError, "compression_config"):
        read_declaration(tmp_path, {"compression_config": {}})


def open_as(folder: Path, layout: str, quantization: dict[str, Any] | None) -> Source:
    """A weight of one layout under a declaration of its own."""
    torch.manual_seed(4)
    tensors = LAYOUTS[layout].make(64, 128)
    save_file({f"m.x.{suffix}": tensor for suffix, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return Source.open("test", str(folder))


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "other bits, compressed-tensors": ("int4", ct("pack-quantized", **{**INT4, "num_bits": 8}), "8 bits"),
    "other bits, gptq": ("gptq-int4", {**LAYOUTS["gptq-int4"].quantization, "bits": 8}, "qzeros"),
    "other groups, gptq": ("gptq-int4", {**GPTQ, "group_size": 64}, "1 × 64"),
    "other groups, compressed-tensors": (
        "int4",
        ct("pack-quantized", **{**INT4, "group_size": 64}),
        "1 × 64",
    ),
    "other groups, awq": ("awq", {**LAYOUTS["awq"].quantization, "group_size": 128}, "1 × 128"),
    "other blocks": ("fp8-block", {**LAYOUTS["fp8-block"].quantization, "weight_block_size": [16, 16]}, "16 × 16"),
    "another strategy": ("fp8-channel", ct("float-quantized", num_bits=8, type="float", strategy="tensor"), "64 × 128"),
    "another number": ("int8-channel", ct("float-quantized", num_bits=8, type="float", strategy="channel"), "float"),
    "another tool": ("bnb-nf4", GPTQ, "quant_method gptq"),
    "another tool's int4": ("int4", {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "quant_method modelopt"),
    "awq's tensors under gptq": ("awq", {**GPTQ, "group_size": 32}, "qweight"),
    "gptq's tensors under awq": ("gptq-int4", {"quant_method": "awq", "bits": 4, "group_size": 32}, "qweight"),
    "gptq without a declaration": ("gptq-int4", None, "quantization_config"),
    "nested bitsandbytes as int8": ("bnb-nf4-nested", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
    "hqq of other bits": (
        "hqq-int4",
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 8}}},
        "8 bits",
    ),
    "another number of codebooks": ("aqlm", {**LAYOUTS["aqlm"].quantization, "num_codebooks": 1}, "m.x.codebooks"),
    "codebooks of other sizes": ("aqlm-blocks", {**LAYOUTS["aqlm-blocks"].quantization, "out_group_size": 1}, "1 × 8"),
    "aqlm's default": ("aqlm", {"quant_method": "aqlm"}, "2^16"),
    "left alone, and quantized": ("int4", {**ct("pack-quantized", **INT4), "ignore": ["m.x"]}, "config.json"),
    "left alone by pattern, and quantized": (
        "fp8-block",
        {**LAYOUTS["fp8-block"].quantization, "modules_to_not_convert": ["x"]},
        "config.json",
    ),
    "quantized by name, and plain": (
        "bf16",
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {"targets": ["m.x"], "weights": INT4, "format": "pack-quantized"}},
        },
        "bf16",
    ),
    "groups in an order that nothing tells": (
        "gptq-int4",
        {**LAYOUTS["gptq-int4"].quantization, "desc_act": True},
        "g_idx",
    ),
    "groups in an order that nothing tells, compressed-tensors": (
        "int4",
        ct("pack-quantized", **{**INT4, "actorder": "group"}),
        "weight_g_idx",
    ),
    "e8m0 bytes without saying so": ("mxfp8", {"quant_method": "fp8", "weight_block_size": [1, 32]}, "uint8"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_tensors_that_contradict_are_refused_by_name(case: str, tmp_path: Path) -> None:
    layout, quantization, named = CONTRADICTIONS[case]
    with raises((UnsupportedError, CheckpointError), named, "m.x"):
        open_as(tmp_path, layout, quantization)


def test_plain_weights_among_quantized_ones_are_what_they_are(tmp_path: Path) -> None:
    """A class of modules says nothing of one module: routers and heads are often left alone without being listed."""
    source = open_as(tmp_path, "bf16", ct("pack-quantized", **INT4))
    assert source.weights["m.x.weight"].is_wide


@pytest.mark.parametrize("declared", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", [7, 8])
def test_symmetric_gptq_follows_the_data(stored: int, declared: str, tmp_path: Path) -> None:
    """Files exist that declare version 1 and hold version 2: symmetric zero points are 8 whatever is declared."""
    tensors = LAYOUTS["gptq-int4"].make(64, 128)
    word = sum(stored << shift for shift in range(0, 32, 4))
    tensors["qzeros"] = torch.full((4, 8), word, dtype=torch.int64).to(torch.int32)
    save_file({f"x.{suffix}": tensor for suffix, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = {**LAYOUTS["gptq-int4"].quantization, "checkpoint_format": declared}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    source = Source.open("test", str(tmp_path))
    packed = source.load(source.weights["x.weight"])
    assert "zero" not in packed.parts
    codes = (tensors["qweight"][5 // 8] >> (4 * (5 % 8))) & 15
    assert torch.equal(packed.dequantize()[:, 5], (codes.float() - 8) * tensors["scales"][0].float())


def test_zero_points_that_are_neither_version_are_refused(tmp_path: Path) -> None:
    config = {**LAYOUTS["gptq-int4-unordered"].quantization, "sym": True}
    source = open_as(tmp_path, "gptq-int4-unordered", config)
    with raises(CheckpointError, "m.x.qzeros", "sym"):
        source.load(source.weights["m.x.weight"])


@pytest.mark.parametrize(("name", "more"), [("awq", {"zero_point": False}), ("autoround-awq", {"sym": True})])
def test_awq_that_declares_no_zero_points_and_has_some_is_refused(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    source = open_as(tmp_path, name, {**LAYOUTS[name].quantization, **more})
    with raises(CheckpointError, "m.x.qzeros"):
        source.load(source.weights["m.x.weight"])


def test_a_zero_point_that_tools_read_differently_is_refused(tmp_path: Path) -> None:
    tensors = LAYOUTS["gptq-int3"].make(64, 128)
    tensors["qzeros"][0, 0] |= 7
    save_file({f"x.{suffix}": tensor for suffix, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": LAYOUTS["gptq-int3"].quantization}))
    source = Source.open("test", str(tmp_path))
    with raises(CheckpointError, "x.qzeros", "gptq_v2"):
        source.load(source.weights["x.weight"])


def test_scales_of_a_quantized_cache_are_no_weights(tmp_path: Path) -> None:
    scales = {f"model.layers.0.self_attn.{part}.{part[0]}_scale": torch.ones(1) for part in ("k_proj", "v_proj")}
    save_file({"model.norm.weight": torch.ones(4), **scales}, tmp_path / "model.safetensors")
    assert list(Source.open("test", str(tmp_path)).weights) == ["model.norm.weight"]


def test_everyday_names_are_parts_only_beside_their_anchor(tmp_path: Path) -> None:
    """`scale` and `shape` belong to HQQ's `W_q`; another module's parameter of that name is its own."""
    save_file({"norm.scale": torch.ones(4), "block.zero": torch.ones(2)}, tmp_path / "model.safetensors")
    assert set(Source.open("test", str(tmp_path)).weights) == {"norm.scale", "block.zero"}


@pytest.mark.parametrize("method", ["tensor", "row", "block"])
def test_scales_that_divide(method: str, tmp_path: Path) -> None:
    """GPTQModel stores 448 / amax under the name of DeepSeek's factor."""
    values = torch.randn(64, 128).to(torch.float8_e4m3fn)
    scale = torch.rand({"tensor": (), "row": (64,), "block": (2, 4)}[method]) * 50 + 10
    config = {"quant_method": "fp8", "weight_scale_method": method, "weight_scale_semantics": "inverse"}
    config |= {"weight_block_size": [32, 32]} if method == "block" else {}
    save_file({"x.weight": values, "x.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    source = Source.open("test", str(tmp_path))
    each = {"tensor": scale, "row": scale[:, None] if method == "row" else scale}.get(method)
    if each is None:
        each = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    torch.testing.assert_close(
        source.load(source.weights["x.weight"]).dequantize(), values.float() / each, rtol=1e-6, atol=0
    )

    save_file({"x.weight": values, "x.weight_scale_inv": torch.zeros_like(scale)}, tmp_path / "model.safetensors")
    source = Source.open("test", str(tmp_path))
    with raises(CheckpointError, "x.weight_scale_inv"):
        source.load(source.weights["x.weight"])


def test_a_rotations_matrix_beside_a_weight_is_refused(tmp_path: Path) -> None:
    """Even where the declaration was lost: what stands beside a weight has a meaning."""
    tensors = {f"m.x.{suffix}": tensor for suffix, tensor in LAYOUTS["int4"].make(64, 128).items()}
    save_file({**tensors, "m.x.spinquant_r4_type": torch.tensor(0, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": LAYOUTS["int4"].quantization}))
    with raises(CheckpointError, "m.x.spinquant_r4_type"):
        Source.open("test", str(tmp_path))
