"""dots.llm1 (`Dots1ForCausalLM`): Qwen3's attention, DeepSeek-V3's experts, windows in the upper layers if any."""

from __future__ import annotations

from amalgam.models.naming import ATTENTION, CORRECTED_EXPERTS, DECODER, FUSED_EXPERTS, HEAD_NORMS, MLP
from amalgam.models.reading.attention import read_normed_attention, read_window, with_upper_windows
from amalgam.models.reading.layers import read_corrected_router, read_model, read_moe_layers
from amalgam.models.spec import ConfigReader, Family, ModelSpec

WINDOW, FIRST_WINDOW = 4096, 62  # the configuration class's defaults, where a key is missing


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_normed_attention(config, default_kv_heads=32)
    window = read_window(config, default=WINDOW)
    attentions = with_upper_windows(config, attention, window, FIRST_WINDOW)
    # What the published files call noaux_tc is a sigmoid with a correction.
    router = read_corrected_router(config, default_normalises=False, scoring_names=("sigmoid", "noaux_tc"))
    layers = read_moe_layers(config, attentions, router, default_dense=0, default_shared=0)
    return read_model(config, "dots1", layers)


FAMILY = Family(
    name="dots1",
    architectures=("Dots1ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **HEAD_NORMS, **MLP, **CORRECTED_EXPERTS},
    fused=FUSED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
)
