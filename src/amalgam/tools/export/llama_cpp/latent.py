"""Latent attention as llama.cpp is told of it: DeepSeek's, and that of models that have something beside it.

In: a model. Out: keys without the architecture's prefix. Must never know: weights, files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from amalgam.errors import UnsupportedError
from amalgam.models.blocks.delta_net import KimiDeltaNet
from amalgam.models.blocks.latent_attention import LatentAttention
from amalgam.tools.export.llama_cpp.experts import grouped, shared_size
from amalgam.tools.export.llama_cpp.metadata import Model


def latent(model: Model) -> Mapping[str, Any]:
    """As attention runs on the latent vector: one KV head, keys and values of its size."""
    attention = model.attention
    assert isinstance(attention, LatentAttention)
    keys: dict[str, Any] = {
        **grouped(model),
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": attention.query_rank,
        "attention.kv_lora_rank": attention.latent_rank,
        "attention.key_length": attention.latent_rank + attention.rope_dim,
        "attention.value_length": attention.latent_rank,
        "attention.key_length_mla": attention.nope_dim + attention.rope_dim,
        "attention.value_length_mla": attention.value_dim,
        "rope.dimension_count": attention.rope_dim,
    }
    plain = (attention.nope_dim + attention.rope_dim) ** -0.5
    factor = getattr(getattr(attention.rope, "scaling", None), "factor", 1.0)
    if attention.scale != plain and factor > 1:
        # Scores are scaled by the square of YaRN's own factor, 0.1 mscale ln(factor) + 1; the key is 0.1 mscale.
        keys["rope.scaling.yarn_log_multiplier"] = ((attention.scale / plain) ** 0.5 - 1) / math.log(factor)
    return keys


def indexed(model: Model) -> Mapping[str, Any]:
    attentions = (layer.attention for layer in model.spec.layers)
    indexer: Any = next(found for one in attentions if (found := getattr(one, "indexer", None)) is not None)
    return {
        **latent(model),
        "attention.indexer.head_count": indexer.num_heads,
        "attention.indexer.key_length": indexer.head_dim,
        "attention.indexer.top_k": indexer.num_chosen,
    }


def glm_dsa(model: Model) -> Mapping[str, Any]:
    have_one = [getattr(layer.attention, "indexer", None) is not None for layer in model.spec.layers]
    return {**indexed(model), "attention.indexer.types": have_one}


def mistral4(model: Model) -> Mapping[str, Any]:
    attention: Any = model.attention
    return {
        **latent(model),
        "attention.temperature_scale": float(attention.sharpening[0]),
        "attention.temperature_length": int(attention.sharpening[1]),
    }


def bailing3(model: Model) -> Mapping[str, Any]:
    net = next(model.blocks(KimiDeltaNet), None)
    if net is None or net.bound is None:
        raise UnsupportedError(
            "llama.cpp's architecture 'bailingmoe3' has delta nets whose rates are bounded (kda_safe_gate).",
            remedy="Export to another target: `--to hf`.",
        )
    mlps = [layer.mlp for layer in model.spec.layers]
    limits = {
        key: [float(getattr(getattr(mlp, name, None), "limit", None) or 0) for mlp in mlps]
        for key, name in (("swiglu_clamp_exp", "activation"), ("swiglu_clamp_shexp", "shared_activation"))
    }
    return {
        **latent(model),
        **shared_size(model),
        **{key: values for key, values in limits.items() if any(values)},
        "attention.head_count_kv": [int(isinstance(one.attention, LatentAttention)) for one in model.spec.layers],
        "kda.head_dim": net.head_dim,
        "kda.safe_gate": True,
        "kda.gate_lower_bound": float(net.bound),
        "ssm.conv_kernel": net.kernel_size,
    }
