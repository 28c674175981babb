"""K-EXAONE (`ExaoneMoeForCausalLM`, published as `ExaoneMoEForCausalLM`): windows with rotary positions and full layers
without, DeepSeek-V3's experts.

The block for multi-token prediction is not loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from amalgam.models.naming import ATTENTION, CORRECTED_EXPERTS, DECODER, FUSED_EXPERTS, HEAD_NORMS, MLP, renamed_tensor
from amalgam.models.reading.attention import by_layer_type, every_nth_full, read_attention, read_window
from amalgam.models.reading.layers import read_corrected_router, read_model, read_moe_layers
from amalgam.models.spec import DRAFT_LAYERS, ConfigReader, Family, LayerSpec, ModelSpec

NORM_EPS = 1e-5
WINDOW, PERIOD = 4096, 4  # the configuration class's defaults, where a key is missing


def _default_types(config: ConfigReader, has_windows: bool) -> list[str]:
    """Every `sliding_window_pattern`th layer is full; beside `layer_types` it may be a word and is not read."""
    says_types = config.get("layer_types") is not None
    return every_nth_full(
        config, config.int("sliding_window_pattern", default=PERIOD) if has_windows and not says_types else 1
    )


def _check_sparse_layers(config: ConfigReader, layers: Sequence[LayerSpec]) -> None:
    """Fail if `is_moe_layer`, which decided before there was `mlp_layer_types`, says something else."""
    expected = [bool(layer.mlp.num_experts) for layer in layers]
    flags = config.get("is_moe_layer", default=expected)
    if not isinstance(flags, list) or flags != expected:
        config.refuse("is_moe_layer", flags, f"{expected}, as the other keys say")


def _read_spec(config: ConfigReader) -> ModelSpec:
    # K-EXAONE 2's, by layer.
    config.expect("sliding_windows", None)
    config.expect("swiglu_limits", None)
    common = read_attention(config, default_eps=NORM_EPS, default_kv_heads=32)
    attention = replace(common, has_head_norm=True)
    window = read_window(config, default=WINDOW)
    full = attention if window is None else replace(attention, rope=None)
    attentions = by_layer_type(config, attention, window, _default_types(config, window is not None), full)
    router = read_corrected_router(config, default_scaling=2.5)
    layers = read_moe_layers(
        config, attentions, router, default_dense=1, default_shared=1, shared_key="num_shared_experts"
    )
    _check_sparse_layers(config, layers)
    return read_model(config, "exaone_moe", layers, default_eps=NORM_EPS)


_CORRECTION = "model.layers.{}.mlp.e_score_correction_bias"

FAMILY = Family(
    name="exaone_moe",
    architectures=("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        **HEAD_NORMS,
        **MLP,
        **CORRECTED_EXPERTS,
        "layers.{}.mlp.router_correction": _CORRECTION,
    },
    fused=(  # the last one as transformers 5 has it
        *FUSED_EXPERTS,
        renamed_tensor("model.layers.{}.mlp.gate.e_score_correction_bias", _CORRECTION),
    ),
    left_out={r"mtp\..*": DRAFT_LAYERS},
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
    },
)
