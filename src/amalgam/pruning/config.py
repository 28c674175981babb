"""What a config.json says of a model behind a cut.

In: a config.json and a `Cut`. Out: another one. Must never know: weights.

Families say their sizes under several keys and in several ways; what is written here is read again, and has to mean the
cut (`pruned.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amalgam.models.own_layers import EXPERT_COUNTS, KEY, TEXT, own_layers_of
from amalgam.models.spec import ModelSpec
from amalgam.pruning.cut import Cut

_LAYER_COUNTS = ("num_hidden_layers", "n_layer")
# An entry for each layer.
_BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
_LAYER_IDS = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
# How many of the first layers are of another kind.
_LEADING = (
    *("first_k_dense_replace", "first_last_k_dense_replace", "num_dense_layers", "max_window_layers"),
    "moe_layer_start_index",
)
_LAST_SPARSE = "moe_layer_end_index"  # -1: the last layer
_DRAFTS = "num_nextn_predict_layers"
_STEP, _ONLY_DENSE = "decoder_sparse_step", "mlp_only_layers"
_WIDTHS = (
    *("moe_intermediate_size", "intermediate_size", "intermediate_size_mlp", "n_inner"),
    *("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"),
)


def cut_config(
    config: Mapping[str, Any], spec: ModelSpec, cut: Cut, widths: Mapping[int, int] | None = None
) -> dict[str, Any]:
    """
    Args:
        spec: of the whole model.
        widths: width of an MLP → what remains of it.
    """
    text = config.get(TEXT)
    is_inside = isinstance(text, Mapping)
    part = dict(text) if isinstance(text, Mapping) else dict(config)
    own = {int(layer_id): dict(values) for layer_id, values in (own_layers_of(config) or {}).items()}
    part.pop(KEY, None)
    if len(cut.layers) < spec.num_layers:
        own = {new: own[old] for new, old in enumerate(cut.layers) if old in own}
        _cut_layers(part, spec, cut.layers)
    if cut.experts:
        counts = [len(cut.experts.get(old, ())) or spec.layers[old].mlp.num_experts for old in cut.layers]
        _cut_experts(part, own, counts)
    if widths:
        _cut_widths(part, spec, widths)
        for values in own.values():
            _cut_widths(values, spec, widths)
    if part.get(_DRAFTS):
        part[_DRAFTS] = 0  # they have experts and sizes of the whole model
    if any(own.values()):
        part[KEY] = {str(layer_id): own[layer_id] for layer_id in sorted(own) if own[layer_id]}
    if not is_inside:
        return part
    return {**{key: value for key, value in config.items() if key != KEY}, TEXT: part}


def _cut_layers(part: dict[str, Any], spec: ModelSpec, kept: Sequence[int]) -> None:
    def replace(keys: Sequence[str], change: Callable[[Any], Any]) -> None:
        for key in keys:
            if part.get(key) is not None:
                part[key] = change(part[key])

    replace(_LAYER_COUNTS, lambda count: len(kept))
    replace(_BY_LAYER, lambda values: [values[i] for i in kept] if len(values) == spec.num_layers else values)
    replace(_LAYER_IDS, lambda ids: [new for new, old in enumerate(kept) if old in ids])
    replace(_LEADING, lambda count: sum(old < count for old in kept))
    if (part.get(_LAST_SPARSE) or -1) >= 0:
        part[_LAST_SPARSE] = sum(old <= part[_LAST_SPARSE] for old in kept) - 1
    if (part.get(_STEP) or 1) > 1:
        part[_STEP] = 1
        part[_ONLY_DENSE] = [new for new, old in enumerate(kept) if not spec.layers[old].mlp.num_experts]


def _cut_experts(part: dict[str, Any], own: dict[int, dict[str, Any]], counts: Sequence[int]) -> None:
    """
    Args:
        counts: experts of each layer that remains; 0: it is dense.
    """
    keys = [key for key in EXPERT_COUNTS if part.get(key) is not None] or list(EXPERT_COUNTS[:1])
    widest = max(counts)
    part |= dict.fromkeys(keys, widest)
    for values in own.values():
        for key in EXPERT_COUNTS:
            values.pop(key, None)
    for layer_id, count in enumerate(counts):
        if count and count != widest:
            own.setdefault(layer_id, {})[keys[0]] = count


def _cut_widths(part: dict[str, Any], spec: ModelSpec, widths: Mapping[int, int]) -> None:
    for key in _WIDTHS:
        value = part.get(key)
        if isinstance(value, int) and value in widths:
            part[key] = widths[value]
    if "n_inner" in part and part["n_inner"] is None:  # four times the hidden size
        part["n_inner"] = widths.get(4 * spec.hidden_size)
