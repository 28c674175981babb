"""Attention over a paged cache, and the scores by which an indexer chooses of it."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from amalgam.kernels.backends.reference.operators.cache import read
from amalgam.kernels.backends.reference.operators.elementwise import soft_cap
from amalgam.kernels.step import AttentionBatch, AttentionOptions, LayerCache

_QUERY_TILE = 8
_KEY_TILE = 64


def paged_attention(query: Tensor, cache: LayerCache, batch: AttentionBatch, **how: Unpack[AttentionOptions]) -> Tensor:
    """Causal attention over a paged cache with an online softmax (Milakov & Gimelshein 2018; Kwon et al. 2023).

    query: `[tokens, heads, d]`. A token at position p sees the keys at `max(0, p - window + 1) .. p`. `softcap`: see
    `soft_cap`. Returns `[tokens, heads, v]` in query's type; float32 inside.
    """
    device = query.device
    window, sinks, softcap, chunk = how.get("window"), how.get("sinks"), how.get("softcap"), how.get("chunk")
    heads, kv_heads, value_dim = query.shape[1], cache.keys.shape[1], cache.values.shape[2]
    shared = heads // kv_heads

    # One tile per (sequence, position // tile); a token's row in its tile is position % tile.
    lengths = batch.query_starts.diff()
    first = batch.context_lengths - lengths
    first_tile, last_tile = first // _QUERY_TILE, (batch.context_lengths - 1) // _QUERY_TILE
    tiles_per_sequence = last_tile - first_tile + 1
    tile_starts = tiles_per_sequence.cumsum(0) - tiles_per_sequence
    sequence_of_token = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position = torch.arange(query.shape[0]) - batch.query_starts[:-1][sequence_of_token] + first[sequence_of_token]
    tile_of_token = (tile_starts - first_tile)[sequence_of_token] + position // _QUERY_TILE
    sequence_of_tile = torch.repeat_interleave(torch.arange(len(lengths)), tiles_per_sequence)
    num_tiles = len(sequence_of_tile)
    base_position = (
        torch.arange(num_tiles) - tile_starts[sequence_of_tile] + first_tile[sequence_of_tile]
    ) * _QUERY_TILE
    num_keys = torch.minimum(base_position + _QUERY_TILE, batch.context_lengths[sequence_of_tile])

    tile_index, row_index = tile_of_token.to(device), (position % _QUERY_TILE).to(device)
    tiles = query.new_zeros((num_tiles, _QUERY_TILE, heads, query.shape[2]), dtype=torch.float32)
    tiles[tile_index, row_index] = query.float() * how["scale"]
    # [tiles, kv_heads, rows × shared heads, d]: the heads that share a key stand together.
    tiles = tiles.view(num_tiles, _QUERY_TILE, kv_heads, shared, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
    row_position = (base_position[:, None] + torch.arange(_QUERY_TILE)).to(device)

    rows = _QUERY_TILE * shared
    if sinks is None:
        maximum = tiles.new_full((num_tiles, kv_heads, rows), -torch.inf)
        total = tiles.new_zeros((num_tiles, kv_heads, rows))
    else:
        per_row = sinks.float().view(1, kv_heads, 1, shared).expand(num_tiles, -1, _QUERY_TILE, -1)
        maximum = per_row.reshape(num_tiles, kv_heads, rows).clone()
        total = torch.ones_like(maximum)
    output = tiles.new_zeros((num_tiles, kv_heads, rows, value_dim))

    for key_start in range(0, int(num_keys.max()), _KEY_TILE):
        is_active = num_keys > key_start
        if window is not None:
            is_active &= base_position - window + 1 < key_start + _KEY_TILE
        active = is_active.nonzero().flatten()
        if len(active) == 0:
            continue
        key_position = torch.arange(key_start, key_start + _KEY_TILE)
        exists = key_position < batch.context_lengths[sequence_of_tile[active], None]
        block_index = (key_position // batch.block_size).clamp(max=batch.block_tables.shape[1] - 1).to(device)
        offset = (key_position % batch.block_size).to(device)
        sequences, exists, active = sequence_of_tile[active].to(device), exists.to(device), active.to(device)
        slots = batch.block_tables[sequences][:, block_index] * batch.block_size + offset
        key = read(cache.keys, cache.key_scales, slots).permute(0, 2, 3, 1)  # [active, kv_heads, d, key tile]
        # What lies beyond the sequence is another's: a zero weight would still spread its NaN.
        value = read(cache.values, cache.value_scales, slots)
        value = value.masked_fill(~exists[:, :, None, None], 0.0).permute(0, 2, 1, 3)

        distance = row_position[active][:, :, None] - key_position.to(device)
        visible = (distance >= 0) & exists[:, None, :]
        if window is not None:
            visible &= distance < window
        if chunk is not None:
            visible &= (row_position[active] // chunk * chunk)[:, :, None] <= key_position.to(device)
        visible = visible.repeat_interleave(shared, dim=1).unsqueeze(1)
        scores = _batched_product(tiles[active], key)
        if softcap is not None:
            scores = soft_cap(scores, softcap)
        scores = scores.masked_fill(~visible, -torch.inf)

        old_maximum = maximum[active]
        new_maximum = torch.maximum(old_maximum, scores.amax(-1))
        safe = new_maximum.masked_fill(new_maximum == -torch.inf, 0.0)  # a row that has seen nothing yet
        weights = torch.exp(scores - safe.unsqueeze(-1))
        correction = torch.exp(old_maximum - safe)
        total[active] = total[active] * correction + weights.sum(-1)
        output[active] = output[active] * correction.unsqueeze(-1) + _batched_product(weights, value)
        maximum[active] = new_maximum

    output = output / total.unsqueeze(-1)
    output = output.view(num_tiles, kv_heads, _QUERY_TILE, shared, value_dim).permute(0, 2, 1, 3, 4).flatten(2, 3)
    return output[tile_index, row_index].to(query.dtype)


def index_scores(query: Tensor, weights: Tensor, cache: LayerCache, batch: AttentionBatch) -> Tensor:
    """An indexer's scores of all positions up to each token's own; see `Choose`.

    query: `[tokens, heads, d]`, rotated; weights: float32 `[tokens, heads]`; cache: of one head. Returns float32
    `[tokens, positions]`, -∞ behind the token's own. Every product is of one token and one tile of keys.
    """
    longest = -(-int(batch.context_lengths.max()) // _KEY_TILE) * _KEY_TILE
    scores = torch.full((query.shape[0], longest), -torch.inf, device=query.device)
    of_heads = weights.float()[:, None, None, :]
    for index, (start, end) in enumerate(batch.query_starts.unfold(0, 2, 1).tolist()):
        context, queries = int(batch.context_lengths[index]), query[start:end].float().unsqueeze(1)
        if start == end:
            continue
        own = torch.arange(context - (end - start), context, device=query.device).unsqueeze(1)
        for first in range(0, context, _KEY_TILE):
            places = torch.arange(first, first + _KEY_TILE, device=query.device)
            block = (places // batch.block_size).clamp(max=batch.block_tables.shape[1] - 1)
            slots = batch.block_tables[index][block] * batch.block_size + places % batch.block_size
            keys = read(cache.keys, cache.key_scales, slots)[:, 0].t().expand(end - start, 1, -1, -1)
            tile = _batched_product(of_heads[start:end], _batched_product(queries, keys).relu())
            scores[start:end, first : first + _KEY_TILE] = tile[:, 0, 0].masked_fill(places > own, -torch.inf)
    return scores


def largest(scores: Tensor, k: int) -> Tensor:
    """The places of each row's k largest scores, ascending; of equal ones the first, and NaN counts as infinite.

    scores: float32 `[rows, n]`. Returns int64 `[rows, k]`.
    """
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
    least = scores.topk(k, dim=1).values[:, -1:]
    is_above, is_least = scores > least, scores == least
    room = k - is_above.sum(1, keepdim=True)
    is_chosen = is_above | (is_least & (is_least.cumsum(1, dtype=torch.int32) <= room))
    return is_chosen.nonzero()[:, 1].view(len(scores), k)


def _batched_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` over the two leading dimensions; contiguous operands, so that every product takes the same path."""
    shape = (*a.shape[:2], a.shape[2], b.shape[3])
    return torch.bmm(a.flatten(0, 1).contiguous(), b.flatten(0, 1).contiguous()).view(shape)
