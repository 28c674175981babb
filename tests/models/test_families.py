"""What families read from a config.json: the same defaults as the Hugging Face classes, and nothing guessed."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.errors import AmalgamError, CheckpointError, PlanError, UnsupportedError
from amalgam.models.registry import all_families, read_spec
from amalgam.models.spec import ModelSpec
from amalgam.tools.analyze import analyze_checkpoint
from tests.cases import each_case
from tests.errors import is_named, raises
from tests.models.harness import Runner, load_model
from tests.models.tiny import BASE_CONFIG, save_tiny, text_config_class, write_checkpoint

FAMILIES = {family.name: family for family in all_families()}
PROMPT = list(range(3, 40))


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A family's tiny config.json, as the Hugging Face class would save it."""
    import transformers

    family = FAMILIES[name]
    settings = deepcopy({**BASE_CONFIG, **family.tiny_config, **changes})
    if name == "xverse":
        return {**settings, "architectures": list(family.architectures)}
    config_class = text_config_class(getattr(transformers, family.architectures[0]))
    config: dict[str, Any] = config_class(**settings, architectures=list(family.architectures)).to_dict()
    return config


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return read_spec(config, "config.json")[1]


@pytest.mark.usefixtures("brief_configs")
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"xverse"}))
def test_a_missing_key_means_what_the_hugging_face_class_makes_of_it(name: str) -> None:
    """Or it is refused, or the weights would have other shapes, which loading refuses."""
    import transformers

    config_class = text_config_class(getattr(transformers, FAMILIES[name].architectures[0]))
    config = config_of(name)
    read = 0
    for key in config.keys() - {"architectures"}:
        reduced = {k: v for k, v in config.items() if k != key}
        try:
            completed = config_class.from_dict(json.loads(json.dumps(reduced))).to_dict()
            spec, expected = spec_of(reduced), spec_of({**completed, "architectures": config["architectures"]})
        except (AmalgamError, StrictDataclassError):
            continue  # refused, or a default that contradicts the tiny sizes
        if spec.slots == expected.slots:
            assert spec == expected, key
            read += 1
    assert read > 10


REFUSED: list[tuple[str, dict[str, Any]]] = [
    *((name, {"hidden_act": "gelu"}) for name in sorted(FAMILIES.keys() - {"gpt2", "gemma2", "gemma3", "gemma4"})),
    *((name, {"hidden_activation": "silu"}) for name in ("gemma2", "gemma3", "gemma4")),
    *((name, {"layer_types": ["full_attention", "linear_attention"]}) for name in ("gemma3", "olmo3", "smollm3")),
    *((name, {"rope_parameters": {"rope_type": "su"}}) for name in ("olmo2", "granite", "starcoder2")),
    ("gemma2", {"use_bidirectional_attention": True}),
    ("gemma3", {"attn_logit_softcapping": 30.0}),
    *(
        ("gemma4", changes)
        for changes in (
            {"layer_types": ["sliding_attention", "linear_attention"] * 2},
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            {"layer_types": ["sliding_attention", "full_attention"]},
            {"num_kv_shared_layers": 3},
            {"num_kv_shared_layers": 4},
            {"use_bidirectional_attention": "all"},
            {"vocab_size_per_layer_input": 200},
            {"rope_parameters": {}},
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            {"per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 64}}},
            {"per_layer_config": {"1": {"head_dim": 32}}},
            {"per_layer_config": {"1": {"sliding_window": 4}, "3": {"sliding_window": 4}}},
            {"enable_moe_block": True, "num_experts": 2, "moe_intermediate_size": 8, "top_k_experts": 3},
        )
    ),
    *((name, {"num_experts_per_tok": 0}) for name in ("mixtral", "olmoe", "deepseek_v2", "gpt_oss")),
    ("mixtral", {"num_experts_per_tok": 5}),
    ("xverse", {"moe_top_k": 9}),
    ("xverse", {"norm_topk_prob": False}),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}),
    ("gpt_oss", {"layer_types": ["full_attention", "linear_attention"]}),
    ("gpt_oss", {"rope_parameters": None}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"n_head": 5}),
    ("deepseek_v2", {"topk_method": "noaux_tc"}),
    ("deepseek_v2", {"scoring_func": "sigmoid"}),
    ("deepseek_v2", {"norm_topk_prob": True}),
    ("deepseek_v2", {"moe_layer_freq": 2}),
    ("deepseek_v2", {"mlp_bias": True}),
    ("deepseek_v2", {"num_key_value_heads": 2}),
    ("deepseek_v3", {"topk_method": "greedy"}),
    ("deepseek_v3", {"scoring_func": "softmax"}),
    ("deepseek_v3", {"n_group": 3}),
    ("deepseek_v3", {"n_group": 8}),
    ("deepseek_v3", {"topk_group": 5}),
    ("deepseek_v3", {"num_experts_per_tok": 5}),
    ("deepseek_v32", {"index_topk": 0}),
    ("deepseek_v32", {"index_head_dim": 4}),
    ("deepseek_v32", {"q_lora_rank": None}),
    ("deepseek_v32", {"layer_types": ["full_attention"] * 2}),
    ("glm_moe_dsa", {"indexer_types": ["full", "none"]}),
    ("glm_moe_dsa", {"indexer_types": ["full"]}),
    ("glm_moe_dsa", {"indexer_types": ["full", ["shared"]]}),
    ("glm_moe_dsa", {"indexer_types": ["shared", "full"]}),
    ("glm_moe_dsa", {"indexer_types": None, "index_topk_pattern": "FX"}),
    ("glm_moe_dsa", {"indexer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 0}),
    ("glm_moe_dsa", {"index_kpool": 4}),
    ("glm4_moe", {"scoring_func": "softmax"}),
    ("minimax_m2", {"scoring_func": "softmax"}),
    ("minimax_m2", {"use_qk_norm": False}),
    ("minimax_m2", {"attn_type_list": [1, 0]}),
    ("minimax_m2", {"shared_intermediate_size": 64}),
    ("dots1", {"scoring_func": "softmax"}),
    ("dots1", {"n_group": 3}),
    ("dots1", {"layer_types": ["full_attention", "chunked_attention"]}),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense", "linear"]}),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense", ["sparse"]]}),
    ("glm4_moe_lite", {"topk_method": "greedy"}),
    ("exaone_moe", {"mlp_layer_types": ["dense", "sparse"]}),
    ("exaone_moe", {"is_moe_layer": [True, True, True]}),
    ("exaone_moe", {"swiglu_limits": [None, 7.0, 7.0]}),
    ("exaone_moe", {"sliding_windows": [8, 8, 4]}),
    ("exaone_moe", {"layer_types": ["full_attention", "sliding_attention", "linear_attention"]}),
    ("ernie4_5_moe", {"moe_gate": "top2"}),
    ("ernie4_5_moe", {"use_bias": True}),
    ("ernie4_5_moe", {"moe_norm_min": 0.1}),
    ("ernie4_5_moe", {"moe_k": 9}),
    ("hunyuan_v1_moe", {"moe_topk": [2, 3]}),
    ("hunyuan_v1_moe", {"moe_topk": 9}),
    ("hunyuan_v1_moe", {"moe_intermediate_size": [64, 64]}),
    ("hunyuan_v1_moe", {"use_cla": True}),
    ("mistral4", {"n_group": 2}),
    ("mistral_large4", {"n_group": 2}),
    ("mistral_large4", {"q_lora_rank": 32}),
    ("mistral_large4", {"indexer_rope_interleave": False}),
    ("mistral_large4", {"no_rope_layers": [1, 0, 1]}),
    ("mistral_large4", {"no_rope_layers": [1, 0, 1, 2]}),
    ("mistral_large4", {"kv_source_layers": [0, 1]}),
    ("mistral_large4", {"kv_source_layers": [0, 0, 1, 3]}),
    ("mistral_large4", {"kv_source_layers": [1, 1, 2, 3]}),
    ("mistral_large4", {"kv_source_layers": [0, 1, 2, 1]}),  # the one turns, the other does not
    ("mistral4", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama4", {"num_experts_per_tok": 2}),
    ("llama4", {"layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"]}),
    ("llama4", {"no_rope_layers": [1]}),
    ("granitemoe", {"num_experts_per_tok": 9}),
    *(
        ("granitemoe", {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": types})
        for types in (["attention", "recurrent"], ["attention"], ["mamba", "mamba"])
    ),
    *(
        (
            "granitemoe",
            {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["attention", "mamba"], **changes},
        )
        for changes in (
            {"mamba_n_heads": 3},
            {"mamba_n_groups": 3},
            {"time_step_limit": [1.0, 0.5]},
            {"mamba_n_heads": 4, "time_step_limit": [0, 10**400]},
            {"mamba_n_heads": 4, "time_step_limit": [{"__float__": "Infinity"}] * 2},
        )
    ),
    *(("lfm2_moe", {"layer_types": types}) for types in (["conv", "full_attention", "linear_attention", "conv"], None)),
    ("lfm2", {"layer_types": ["conv"] * 3}),
    ("lfm2", {"conv_L_cache": 1}),
    *(("lfm2", {"block_ffn_dim_multiplier": factor}) for factor in (1e308, 0)),
    *((name, {"layer_types": [{}, [], None]}) for name in ("lfm2", "bailing_hybrid", "gemma3", "qwen3_next")),
    ("glm4_moe_lite", {"mlp_layer_types": [{}, "dense"]}),
    *(
        ("bailing_hybrid", changes)
        for changes in (
            {"layer_types": ["linear_attention", "full_attention", "conv"]},
            {"kda_lower_bound": 0.5},
            {"gated_attention_proj_granularity_type": "element_wise"},
            {"no_kda_lora": False},
            {"moe_shared_expert_intermediate_size": 33},
            {"partial_rotary_factor": 0.25},
            {"expert_swiglu_limit_list": [0, -1, 4.0]},
            {"share_expert_swiglu_limit_list": [4.0]},
        )
    ),
    ("granitemoe", {"logits_scaling": 0.0}),
    ("phimoe", {"num_experts_per_tok": 1}),
    *(
        ("qwen3_next", changes)
        for changes in (
            {"layer_types": ["linear_attention", "full_attention", "sparse_attention"]},
            {"layer_types": ["linear_attention", "full_attention"]},
            {"linear_num_value_heads": 3},
            {"linear_conv_kernel_dim": 1},
            {"attn_output_gate": False},
        )
    ),
    ("qwen3_5", {"layer_types": ["linear_attention", "linear_attention", "sliding_attention"]}),
    ("qwen3_5_moe", {"norm_topk_prob": False}),
    ("phimoe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
]


def test_values_that_are_not_understood_are_refused_by_name() -> None:
    with each_case() as case:
        for name, changes in REFUSED:
            with case(name, changes):
                with raises(UnsupportedError) as refused:
                    spec_of({**config_of(name), **changes})
                assert any(is_named(key, str(refused.value)) for key in ("rope_type", *changes))


def test_layers_for_multi_token_prediction_are_left_alone(tmp_path: Path) -> None:
    """As many as the config declares, and no other surplus layer."""
    save_tiny(FAMILIES["deepseek_v3"], tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    extra = {name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items() if "layers.1." in name}
    extra["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
    write_checkpoint(tmp_path, {**config, "num_nextn_predict_layers": 1}, {**tensors, **extra})
    load_model(tmp_path)

    write_checkpoint(tmp_path, {**config, "num_nextn_predict_layers": 0}, {**tensors, **extra})
    with raises(CheckpointError, "model.layers.2.eh_proj.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_part_of_a_multimodal_model_is_that_model(tmp_path: Path, name: str) -> None:
    """Under the names of published checkpoints: what sees images and what predicts further tokens is left out."""
    save_tiny(FAMILIES[name], tmp_path / "text")
    config, tensors = (
        json.loads((tmp_path / "text/config.json").read_text()),
        load_file(tmp_path / "text/model.safetensors"),
    )
    renamed = {re.sub(r"^model\.", "model.language_model.", key): tensor for key, tensor in tensors.items()}
    others = {"model.visual.blocks.0.attn.qkv.weight": torch.zeros(6, 2), "mtp.fc.weight": torch.zeros(4, 8)}
    architecture = FAMILIES[name].architectures[1]
    nested = {"architectures": [architecture], "text_config": config, "vision_config": {"depth": 1}}
    write_checkpoint(tmp_path / "whole", nested, {**renamed, **others})
    (decoder, version), whole = load_model(tmp_path / "text"), load_model(tmp_path / "whole")
    assert decoder.spec == whole[0].spec
    assert {origin.name for origin in version.origins.values()} == {o.name for o in whole[1].origins.values()}
    assert torch.equal(Runner(decoder, version).step({0: PROMPT})[0], Runner(*whole).step({0: PROMPT})[0])
    notes = " ".join(analyze_checkpoint(str(tmp_path / "whole")).notes)
    assert "the vision encoder" in notes and "predict further tokens" in notes and "has no place" not in notes

    write_checkpoint(tmp_path / "vision", nested, others)
    with raises(PlanError, "the vision encoder"):
        load_model(tmp_path / "vision")
    missing = "model.language_model.layers.0.linear_attn.conv1d.weight"
    write_checkpoint(tmp_path / "lacking", nested, {key: tensor for key, tensor in renamed.items() if key != missing})
    with raises(PlanError, missing):
        load_model(tmp_path / "lacking")


def test_gpt2_is_the_same_without_its_prefix(tmp_path: Path) -> None:
    """As `openai-community/gpt2` is published, with the causal masks of old checkpoints."""
    save_tiny(FAMILIES["gpt2"], tmp_path / "long")
    tensors = load_file(tmp_path / "long" / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    write_checkpoint(tmp_path / "short", config, short)
    expected, logits = (Runner(*load_model(tmp_path / folder)).step({0: PROMPT})[0] for folder in ("long", "short"))
    assert torch.equal(logits, expected)
    assert analyze_checkpoint(str(tmp_path / "short")).notes == analyze_checkpoint(str(tmp_path / "long")).notes == ()

    write_checkpoint(tmp_path / "short", config, {**short, "transformer.wte.weight": short["wte.weight"].clone()})
    with raises(CheckpointError, "wte.weight"):
        load_model(tmp_path / "short")


@pytest.mark.parametrize("target", ["int8", "int4"])
def test_quantized_gpt2_is_not_transposed(tmp_path: Path, target: str) -> None:
    """`Conv1D` weights are `(in, out)` unquantized only: scales belong to outputs."""
    reference = save_tiny(FAMILIES["gpt2"], tmp_path / "wide")
    quantize_checkpoint(str(tmp_path / "wide"), tmp_path / target, target)
    decoder, version = load_model(tmp_path / target)
    assert version["layers.0.mlp.up"].shape == (256, 64)
    logits, expected = Runner(decoder, version).step({0: PROMPT})[0], reference.logits(PROMPT)
    assert 0 < float((logits - expected).norm() / expected.norm()) < {"int8": 0.03, "int4": 0.3}[target]


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe", "xverse", "glm4_moe"),
        *("gemma2", "gemma3", "phi3", "olmo2", "granite", "starcoder2"),
    ],
)
@pytest.mark.parametrize("target", ["int8", "int4"])
def test_routers_and_biases_stay_wide(tmp_path: Path, name: str, target: str) -> None:
    """Quantizing leaves them alone, and the result runs near the original."""
    reference = save_tiny(FAMILIES[name], tmp_path / "wide")
    quantize_checkpoint(str(tmp_path / "wide"), tmp_path / target, target)
    decoder, version = load_model(tmp_path / target)
    for slot in decoder.spec.slots:
        is_quantized = version.origins[slot.name].format == target
        assert is_quantized == (slot.role in {"attention", "mlp", "expert", "shared_expert"}), slot
    logits, expected = Runner(decoder, version).step({0: PROMPT})[0], reference.logits(PROMPT)
    # A token near the edge between two experts may choose the other one: the median tells.
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < {"int8": 0.05, "int4": 0.6}[target]


def test_expert_names_are_the_published_ones() -> None:
    """One name for each weight, and every slot has one."""
    for name, family in FAMILIES.items():
        names = [family.logical_name(slot) for slot in spec_of(config_of(name)).slots]
        assert len(set(names)) == len(names)
        assert not any(re.search(r"[{}]", published) for published in names)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "llama4", "ministral3", "mistral4"])
def test_the_text_part_of_llavas_relatives(name: str, prefix: str, tmp_path: Path) -> None:
    """Under both names that it has had; the tower that sees images is named as left out."""
    save_tiny(FAMILIES[name], tmp_path / "text", tie_word_embeddings=False)
    config = json.loads((tmp_path / "text/config.json").read_text())
    tensors = load_file(tmp_path / "text/model.safetensors")
    head = "language_model.lm_head.weight" if prefix.startswith("language") else "lm_head.weight"
    renamed = {re.sub(r"^model\.", prefix, key): tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    renamed |= {head: tensors["lm_head.weight"], "vision_tower.patch_embedding.weight": torch.zeros(6, 2)}
    architecture = FAMILIES["ministral3" if name == "mistral4" else name].architectures[1]
    nested = {"architectures": [architecture], "text_config": config, "vision_config": {"depth": 1}}
    write_checkpoint(tmp_path / "whole", nested, renamed)
    (decoder, version), whole = load_model(tmp_path / "text"), load_model(tmp_path / "whole")
    assert decoder.spec == whole[0].spec
    assert torch.equal(Runner(decoder, version).step({0: PROMPT})[0], Runner(*whole).step({0: PROMPT})[0])
    assert any("the vision encoder" in note for note in analyze_checkpoint(str(tmp_path / "whole")).notes)


@pytest.mark.parametrize("changes", [{"model_type": "mistral5"}, {"layer_types": ["sliding_attention"] * 2}], ids=str)
def test_of_a_text_part_nothing_is_guessed(changes: dict[str, Any]) -> None:
    nested = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": config_of("mistral", sliding_window=None) | changes,
    }
    with raises(UnsupportedError, *(f"text_config.{key}" for key in changes)):
        spec_of(nested)


def test_limits_of_lings_experts(tmp_path: Path) -> None:
    """They are of silu(gate) and of up, in the layers that have them; the class passes them over."""
    limits = {"expert_swiglu_limit_list": [0, 0.02, None], "share_expert_swiglu_limit_list": [0, 0.0, 0.03]}
    family = FAMILIES["bailing_hybrid"]
    model = save_tiny(family, tmp_path, first_k_dense_replace=0).model  # type: ignore[attr-defined]
    plain = model(torch.tensor([PROMPT])).logits[0]

    class Limited:
        def __init__(self, first: torch.Tensor, limit: float) -> None:
            self.first, self.limit = first.clamp(max=limit), limit

        def __mul__(self, up: torch.Tensor) -> torch.Tensor:
            return self.first * up.clamp(-self.limit, self.limit)

    class Activation(torch.nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.limit = limit

        def forward(self, gate: torch.Tensor) -> Limited:
            return Limited(torch.nn.functional.silu(gate), self.limit)

    model.model.layers[1].mlp.experts.act_fn = Activation(0.02)
    model.model.layers[2].mlp.shared_experts.act_fn = Activation(0.03)
    expected = model(torch.tensor([PROMPT])).logits[0]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **limits}))
    logits = Runner(*load_model(tmp_path)).step({0: PROMPT})[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (plain - expected).abs().max() > 1e-3


def test_gemma_4_turns_whole_heads_in_plain_settings() -> None:
    """The class heeds a share of them with the type `proportional` alone."""
    config = config_of("gemma4")
    full = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    with raises(UnsupportedError, "partial_rotary_factor"):
        spec_of({**config, "rope_parameters": {**config["rope_parameters"], "full_attention": full}})


def test_gemma_4_as_it_is_published(tmp_path: Path) -> None:
    """Sizes of full layers in keys of their own; with the keys and values of layers that share those of others."""
    save_tiny(FAMILIES["gemma4"], tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    published = {key: value for key, value in config.items() if key != "per_layer_config"}
    published |= {
        "global_head_dim": 32,
        "num_global_key_value_heads": None,
        "rope_parameters": {**config["rope_parameters"]},
    }
    assert spec_of(published) == spec_of(config)
    tensors = load_file(tmp_path / "saved/model.safetensors")
    unused = {f"model.layers.3.self_attn.{part}.weight": torch.zeros(2, 2) for part in ("k_proj", "v_proj", "k_norm")}
    assert not unused.keys() & tensors.keys()
    write_checkpoint(tmp_path / "whole", published, tensors | unused)
    one, other = (Runner(*load_model(tmp_path / folder)).step({0: PROMPT})[0] for folder in ("saved", "whole"))
    assert torch.equal(one, other)
    (note,) = analyze_checkpoint(str(tmp_path / "whole")).notes
    assert "3 tensors" in note and "keys and values" in note
    write_checkpoint(tmp_path / "whole", published, tensors | {"model.layers.1.self_attn.v_bias": torch.zeros(2)})
    with raises(CheckpointError, "model.layers.1.self_attn.v_bias"):
        load_model(tmp_path / "whole")


def test_minimax_says_that_all_layers_attend_fully() -> None:
    config = config_of("minimax_m2")
    assert spec_of({**config, "attn_type_list": [1, 1]}) == spec_of(config)


def test_k_exaone_as_it_was_published_first() -> None:
    config = config_of("exaone_moe")
    early = {key: value for key, value in config.items() if key not in ("first_k_dense_replace", "mlp_layer_types")}
    early |= {"architectures": ["ExaoneMoEForCausalLM"], "first_last_k_dense_replace": 1}
    assert spec_of({**early, "is_moe_layer": [False, True, True]}) == spec_of(config)


def test_mistral_small_is_the_plain_text_part_of_mistral_3(tmp_path: Path) -> None:
    save_tiny(FAMILIES["mistral"], tmp_path / "text")
    config = json.loads((tmp_path / "text/config.json").read_text())
    tensors = load_file(tmp_path / "text/model.safetensors")
    del config["model_type"]  # which is what the class takes then
    nested = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": config}
    write_checkpoint(tmp_path / "whole", nested, {f"language_model.{key}": tensor for key, tensor in tensors.items()})
    one, other = (Runner(*load_model(tmp_path / folder)).step({0: PROMPT})[0] for folder in ("text", "whole"))
    assert torch.equal(one, other)
