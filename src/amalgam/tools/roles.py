"""What a weight is for, as far as its name tells: for models without a family.

In: a published name. Out: one of `ROLES`. Follows the customs of Hugging Face's model classes.
"""

from __future__ import annotations

import re
from functools import lru_cache

ROLES = (
    *("embedding", "attention", "linear_attention", "mlp", "expert", "shared_expert"),
    *("router", "indexer", "convolution", "norm", "bias", "head", "other"),
)
_ROUTERS = (  # modules
    *("gate", "wg", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba", "b_proj"),
    "per_layer_model_projection",
)
_CORRECTIONS = ("e_score_correction_bias", "expert_bias")  # tensors
_NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")


def template(name: str) -> str:
    """A name with `*` for its numbers: `model.layers.*.mlp.experts.*.up_proj.weight`."""
    return _NUMBER.sub("*", name)


def role_by_name(name: str) -> str:
    """One of `ROLES`; `other` where no custom applies."""
    return _role_of_template(template(name))


@lru_cache(4096)
def _role_of_template(name: str) -> str:
    *modules, leaf = name.split(".")
    last = next((part for part in reversed(modules) if part != "*"), leaf)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, part) for part in (*modules, leaf))

    # In order: a router's bias decides as the router does, and so does what tells a state what to forget; a norm or
    # bias is one wherever it stands; an expert is no MLP although its path says so. The tower of another modality is no
    # part of the decoder.
    customs = (
        ("other", has("visual|vision|audio")),
        ("router", last in _ROUTERS or leaf in _CORRECTIONS or has("router")),
        ("bias", leaf in ("bias", "sinks", "A_log", "D") or leaf.endswith("_bias")),
        ("convolution", bool(re.search(r"conv1d$|^conv$", last))),
        ("norm", bool(re.search(r"norm|^ln(_|\d|$)|^ssmax|^lerope$", last)) or leaf == "layer_scalar"),
        ("indexer", has("^indexer$")),
        ("shared_expert", has("^shared_(expert|mlp)")),
        ("expert", has("^experts$")),
        ("head", bool(re.search("lm_head|embed_out", last)) or name == "output.weight"),
        ("embedding", bool(re.search("embed|^w[tp]e$", last))),
        ("linear_attention", has("^linear_att|^mamba$|^conv$")),
        ("attention", has("attn|attention")),
        ("mlp", has("mlp|ffn|feed_forward|^per_layer_(input_gate|projection)$")),
    )
    return next((role for role, applies in customs if applies), "other")
