"""Every operator in plain torch: the specification that all other backends are tested against.

In: activations and packed weights. Out: activations. Must never know: names, plans, requests.

**Batch invariance.** A row's result must have the same bits whatever other rows share the call. Matrix products of a
library change their order of accumulation with the number of rows, so here every product has a fixed shape: rows are
computed in tiles of `_TILE_ROWS`, the last one padded with zeros. Attention works in tiles of query positions against
tiles of keys, both aligned to absolute positions, so that neither the chunk a token came in nor its neighbours matter.
Activations are written with `exp` and division because torch's vectorised `silu` and `sigmoid` differ from their own
scalar tails in the last bit.
"""

from amalgam.kernels.backends.reference.operators.attention import index_scores, largest, paged_attention
from amalgam.kernels.backends.reference.operators.cache import to_codes, write_kv
from amalgam.kernels.backends.reference.operators.elementwise import (
    add_rms_norm,
    changed_logits,
    gated,
    gelu,
    layer_norm,
    part_pairs,
    rms_norm,
    rotate,
    sigmoid,
    soft_cap,
    softplus,
    swiglu,
)
from amalgam.kernels.backends.reference.operators.experts import expert_outputs, moe, route, weighted_sum
from amalgam.kernels.backends.reference.operators.interface import Operators
from amalgam.kernels.backends.reference.operators.products import embedding, linear, per_head
from amalgam.kernels.backends.reference.operators.recurrent import convolve, decay, delta_rule, scan_states

__all__ = [
    "Operators",
    "add_rms_norm",
    "changed_logits",
    "convolve",
    "decay",
    "delta_rule",
    "embedding",
    "expert_outputs",
    "gated",
    "gelu",
    "index_scores",
    "largest",
    "layer_norm",
    "linear",
    "moe",
    "paged_attention",
    "part_pairs",
    "per_head",
    "rms_norm",
    "rotate",
    "route",
    "scan_states",
    "sigmoid",
    "soft_cap",
    "softplus",
    "swiglu",
    "to_codes",
    "weighted_sum",
    "write_kv",
]
