"""What models with experts have in common: how many there are, and how a router weighs them."""

from __future__ import annotations

from amalgam.formats.gguf.config.metadata import Config, Metadata

# Numbers of llama.cpp.
UNSAID, SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 0, 1, 2, 3


def experts(metadata: Metadata) -> Config:
    """Counts; softmax over all experts without a factor, unless the family says otherwise."""
    count, used = metadata.num_experts(), metadata.int("expert_used_count")
    return {"num_experts": count, "num_local_experts": count, "num_experts_per_tok": used}


def softmax_experts(metadata: Metadata) -> Config:
    metadata.expect("expert_gating_func", UNSAID, SOFTMAX)
    metadata.expect("expert_weights_scale", 0.0, 1.0)
    return experts(metadata)


def grouped_experts(metadata: Metadata, groups: tuple[int, int] | None) -> Config:
    """DeepSeek's experts, with shared ones and dense layers first; `groups` where the file has no key for them."""
    used = metadata.int("expert_used_count")
    num_groups, num_used_groups = metadata.num_groups(groups)
    return {
        "n_routed_experts": metadata.num_experts(),
        "num_experts_per_tok": used,
        "moe_intermediate_size": metadata.width("expert_feed_forward_length", "ffn_gate_exps"),
        "n_shared_experts": metadata.int("expert_shared_count"),
        "first_k_dense_replace": metadata.int("leading_dense_block_count", default=0),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0) or 1.0,
        # llama.cpp's 0 means that there are none.
        "n_group": max(num_groups, 1),
        "topk_group": max(num_used_groups, 1),
        "num_nextn_predict_layers": metadata.int("nextn_predict_layers", default=0),
    }


def corrected_experts(metadata: Metadata) -> Config:
    """`grouped_experts` without groups, weighed by sigmoids."""
    metadata.expect("expert_gating_func", UNSAID, SIGMOID)
    normalises = metadata.bool("expert_weights_norm", default=True)
    return grouped_experts(metadata, (1, 1)) | {"norm_topk_prob": normalises}
