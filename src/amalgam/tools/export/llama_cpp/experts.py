"""What models with experts are said to have, whichever attention stands beside them.

In: a model. Out: keys without the architecture's prefix. Must never know: weights, files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amalgam.models.blocks.mixture import SparseMoe
from amalgam.tools.export.llama_cpp.metadata import SIGMOID, SOFTMAX, Model


def moe_of(model: Model) -> SparseMoe:
    assert model.moe is not None
    return model.moe


def expert_size(model: Model) -> Mapping[str, Any]:
    return {"expert_feed_forward_length": moe_of(model).intermediate_size}


def shared_size(model: Model) -> Mapping[str, Any]:
    return {"expert_shared_feed_forward_length": moe_of(model).shared_size or None}


def normalising(model: Model) -> Mapping[str, Any]:
    return {"expert_weights_norm": bool(getattr(moe_of(model).router, "normalises", False))}


def grouped(model: Model) -> Mapping[str, Any]:
    """DeepSeek's experts: shared ones, dense layers first, groups, a factor."""
    moe = moe_of(model)
    router: Any = moe.router
    is_sigmoid = hasattr(router, "has_correction")
    groups = getattr(router, "groups", None)
    return {
        **expert_size(model),
        "leading_dense_block_count": model.num_dense,
        "expert_shared_count": moe.shared_size // moe.intermediate_size,
        "expert_weights_scale": float(router.scaling),
        "expert_weights_norm": bool(getattr(router, "normalises", False)),
        "expert_gating_func": SIGMOID if is_sigmoid else SOFTMAX,
        "expert_group_count": 1 if groups is None else groups.num_groups,
        "expert_group_used_count": 1 if groups is None else groups.num_kept,
    }


def corrected(model: Model) -> Mapping[str, Any]:
    moe = moe_of(model)
    router: Any = moe.router
    return {
        **expert_size(model),
        "expert_shared_count": moe.shared_size // moe.intermediate_size,
        "expert_weights_scale": float(router.scaling),
        "expert_weights_norm": bool(router.normalises),
        "expert_gating_func": SIGMOID,
        "leading_dense_block_count": model.num_dense,
    }
