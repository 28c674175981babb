"""One layer on whole texts: what its instructions run in.

In: a model's spec, token ids. Out: a `Frame` whose sequences have a cache of their own. Must never know: files, what is
done with inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.kernels.backends.base import Tables
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.backends.reference.operators import Operators
from amalgam.kernels.step import LayerCache, LayerState, SequenceState, StepContext, StepSequence
from amalgam.kernels.weights import PackedWeight
from amalgam.models.kv_cache import KVCache
from amalgam.models.spec import ModelSpec

_BLOCK_SIZE = 16


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`[tokens, out]` in one call for all rows, which autograd can go back through."""
    result = functional.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    return result if out_dtype is None else result.to(out_dtype)


class WholeProducts(Operators):
    """Products of any number of rows in one call: nobody compares bits with a server's."""

    linear = staticmethod(linear)


def frame_of(spec: ModelSpec, sequences: Sequence[Sequence[int]], layer_id: int, tables: Tables) -> Frame:
    """A step of whole sequences in float32, with keys and values of one layer only.

    Args:
        tables: of the model's ropes, for the longest sequence.
    """
    source = getattr(spec.layers[layer_id].attention, "source", None)
    heads, key, value = spec.kv_shapes[layer_id if source is None else source]
    parts, first = [], 0
    for index, ids in enumerate(sequences):
        count = -(-len(ids) // _BLOCK_SIZE)
        parts.append(StepSequence(list(ids), 0, range(first, first + count), 0, SequenceState.of(index, 0)))
        first += count
    slots = first * _BLOCK_SIZE
    cache = LayerCache(torch.zeros(slots, heads, key), torch.zeros(slots, heads, value))
    shape = spec.state_shapes[layer_id]
    state = shape and LayerState(*(torch.zeros(len(parts), *part) for part in shape))
    dim = spec.index_dims[layer_id]
    index_keys = LayerCache(torch.zeros(slots, 1, dim), torch.zeros(slots, 1, 0)) if dim else None
    kv = KVCache([cache] * spec.num_layers, _BLOCK_SIZE, [state] * spec.num_layers, [index_keys] * spec.num_layers)
    return Frame(StepContext(parts, kv), torch.float32, tables, WholeProducts)


def in_chunks(token_ids: Sequence[Sequence[int]], num_tokens: int) -> list[list[list[int]]]:
    """Sequences in order, as many together as have `num_tokens` tokens; a longer one alone."""
    chunks: list[list[list[int]]] = []
    room = 0
    for ids in token_ids:
        if not chunks or room < len(ids):
            chunks.append([])
            room = num_tokens
        chunks[-1].append(list(ids))
        room -= len(ids)
    return chunks
