"""What llama.cpp does not compute as the model does, although a file can say it.

In: an architecture, a model, the names of tensors. Out: sentences, or the error. Must never know: weights, metadata.

Found by running llama.cpp on exported models of every architecture (docs/log/gguf.md has the figures). What it does
not load, or computes otherwise for every text, is refused here by name; what is otherwise only for some texts is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NoReturn

from amalgam.errors import UnsupportedError
from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.delta_net import DeltaNet
from amalgam.models.rope import Yarn
from amalgam.tools.export.llama_cpp.metadata import Model, yarn_factor

# Biases that an architecture has no place for, by the tensors' names.
_NO_BIASES = {
    "ernie4_5": r".*\.bias",
    "lfm2": r".*\.shortconv\..*\.bias",
    "seed_oss": r".*\.(attn_output|ffn_\w+)\.bias",
}
_LEAST_INDEX_DIM = 64  # it turns their heads by a Hadamard matrix of their size, the smallest of which is 64 by 64
_NO_WINDOWS = ("llama", "mistral3", "phi3", "qwen2", "starcoder2")


def check_limits(architecture: str, model: Model, tensors: Iterable[str]) -> list[str]:
    """What users have to know, in sentences.

    Raises:
        UnsupportedError: llama.cpp would not load the file, or compute another model.
    """
    pattern = _NO_BIASES.get(architecture)
    bias = next((name for name in tensors if pattern is not None and re.fullmatch(pattern, name)), None)
    if bias is not None:
        _refuse(architecture, f"no place for {bias}")
    net = next(model.blocks(DeltaNet), None)
    if net is not None and net.key_dim != net.value_dim:
        _refuse(architecture, f"one size of keys and values in delta nets, not {net.key_dim} and {net.value_dim}")
    indexers = (getattr(layer.attention, "indexer", None) for layer in model.spec.layers)
    dims = {indexer.head_dim for indexer in indexers if indexer is not None}
    if any(dim < _LEAST_INDEX_DIM or dim & (dim - 1) for dim in dims):
        _refuse(architecture, f"indexers with heads of 64 numbers, 128, 256 and so on, not {min(dims)}")
    if getattr(model.attention, "clip", None) is not None:
        _refuse(architecture, "no limit of queries, keys and values (clip_qkv)")
    sparse = model.spec.moe_layer_ids
    if architecture == "ernie4_5-moe" and sparse and len(sparse) != model.spec.num_layers - sparse[0]:
        _refuse(architecture, "experts in every layer behind the dense ones")
    if architecture == "olmo2" and yarn_factor(model.rope) is not None:
        _refuse(architecture, "no attention_factor of YaRN but its default")
    return list(_notes(architecture, model))


def _notes(architecture: str, model: Model) -> Iterator[str]:
    window, longest = model.window, model.spec.max_positions
    if architecture in _NO_WINDOWS and window is not None and window < longest:
        yield (
            f"llama.cpp has no window in architecture {architecture!r}: it computes otherwise what is longer than "
            f"{window} tokens."
        )
    groups = getattr(getattr(model.moe, "router", None), "groups", None)
    if model.spec.family == "deepseek_v2" and groups is not None and groups.num_groups > 1:
        yield "llama.cpp chooses groups of experts by their two best, where DeepSeek-V2 goes by the best one."
    scaling = None if model.rope is None else model.rope.scaling
    if isinstance(scaling, Yarn) and not scaling.truncates and isinstance(model.attention, Attention):
        yield "llama.cpp rounds the ends of YaRN's ramp to whole dimensions, which this model does not."


def _refuse(architecture: str, what: str) -> NoReturn:
    raise UnsupportedError(
        f"llama.cpp's architecture {architecture!r} has {what}.", remedy="Export to another target: `--to hf`."
    )
