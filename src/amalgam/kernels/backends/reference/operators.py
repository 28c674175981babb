"""Every operator in plain torch: the specification that all other backends are tested against.

In: activations and packed weights. Out: activations. Must never know: names, plans, requests.

**Batch invariance.** A row's result must have the same bits whatever other rows share the call. Matrix products of a
library change their order of accumulation with the number of rows, so here every product has a fixed shape: rows are
computed in tiles of `_TILE_ROWS`, the last one padded with zeros. Attention works in tiles of query positions against
tiles of keys, both aligned to absolute positions, so that neither the chunk a token came in nor its neighbours matter.
Activations are written with `exp` and division because torch's vectorised `silu` and `sigmoid` differ from their own
scalar tails in the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.kernels.backends.reference.routing import choose_experts
from amalgam.kernels.layouts import DENSE
from amalgam.kernels.packed import GEGLU, SWIGLU, Activation, ExpertTable, PackedWeight
from amalgam.kernels.program import Route
from amalgam.kernels.step import AttentionBatch, CachedAttention, LayerCache, SequenceState, StepSequence

# 8 rows: on a CPU a matrix product still runs near the memory's speed; a GPU needs more to be busy.
_TILE_ROWS = {"cpu": 8, "cuda": 64}
_QUERY_TILE = 8
_KEY_TILE = 64


def embedding(token_ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding: `[tokens]` → `[tokens, hidden]` in `dtype`."""
    if weight.layout is not DENSE and weight.has_own_rows:
        return weight.take_rows(token_ids).dequantize(dtype)
    return functional.embedding(token_ids, weight.dequantize()).to(dtype)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`x Wᵀ + b`: `[rows, in]` → `[rows, out]` in `out_dtype`, x's type if None.

    Quantized weights are expanded to x's type; a floating weight of another type is not rounded to x's type: the
    product is then computed in the wider of the two.
    """
    expanded = weight.dequantize(None if weight.is_floating else x.dtype)
    compute = torch.promote_types(x.dtype, expanded.dtype)
    result = _tiled_product(x.to(compute), expanded.to(compute))
    if bias is not None:
        result = result + bias.to(compute)
    return result.to(x.dtype if out_dtype is None else out_dtype)


def _tiled_product(x: Tensor, weight: Tensor) -> Tensor:
    tile = _TILE_ROWS[x.device.type]
    rows = x.shape[0]
    padding = -rows % tile
    if padding:
        x = functional.pad(x, (0, 0, 0, padding))
    if x.shape[0] == tile:
        return functional.linear(x, weight)[:rows]
    return torch.cat([functional.linear(part, weight) for part in x.split(tile)])[:rows]


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Every head times its own matrix: `[tokens, heads, in]` by `[heads, in, out]` → `[tokens, heads, out]`.

    In the wider of the two types, rounded to x's at the end.
    """
    compute = torch.promote_types(x.dtype, weight.dtype)
    tile, tokens = _TILE_ROWS[x.device.type], x.shape[0]
    padded = functional.pad(x.to(compute), (0, 0, 0, 0, 0, -tokens % tile)).transpose(0, 1)
    products = [torch.bmm(part.contiguous(), weight.to(compute)) for part in padded.split(tile, dim=1)]
    return torch.cat(products, dim=1).transpose(0, 1)[:tokens].to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), as Llama computes it.

    float32 inside, rounded to x's type before the multiplication with the weight.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + delta`, and that after `rms_norm`."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def route(x: Tensor, weight: PackedWeight, k: int, *, normalises: bool, sum_eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """The k experts of the largest softmax probability (Shazeer et al. 2017), the first choice first; in float32.

    Args:
        x: `[tokens, hidden]`.
        weight: of the router, `[experts, hidden]`.
        normalises: divide the k probabilities by their sum + `sum_eps`.

    Returns ids int64 and gate weights float32, both `[tokens, k]`.
    """
    scores = linear(x.float(), weight)
    gate_weights, expert_ids = torch.topk(torch.softmax(scores, dim=-1), k, dim=-1)
    if normalises:
        gate_weights = gate_weights / (gate_weights.sum(-1, keepdim=True) + sum_eps)
    return expert_ids, gate_weights


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension (Ba et al. 2016), in float32."""
    return functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) on the first r dimensions of each head, halves paired with each other.

    x: `[tokens, heads, head_dim]`; cos, sin: float32 `[tokens, r / 2]`.
    """
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def part_pairs(x: Tensor, width: int) -> Tensor:
    """The first `width` dimensions, rotary pairs of neighbours, as halves.

    Queries and keys are reordered alike, which no score notices.
    """
    return torch.cat((x[..., 0:width:2], x[..., 1:width:2], x[..., width:]), dim=-1)


def sigmoid(x: Tensor) -> Tensor:
    """Logistic function in float32, the same bits for a value wherever it stands in a tensor."""
    return 1.0 / (1.0 + torch.exp(-x.float()))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) × up` (Shazeer 2020), silu in float32."""
    wide = gate.float()
    return (wide / (1.0 + torch.exp(-wide))).to(gate.dtype) * up


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh approximation (Hendrycks & Gimpel 2016), of float32."""
    # (1 + tanh(a)) / 2 = sigmoid(2 a)
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """`cap × tanh(x / cap)`, of float32, the same bits for a value wherever it stands in a tensor."""
    return cap - 2.0 * cap / (1.0 + torch.exp(x * (2.0 / cap)))


def changed_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits as `Head` changes them."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else soft_cap(logits, softcap)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Gate and up projection joined as `Activation` says, in float32; plain SwiGLU and GEGLU as `swiglu` does it."""
    if activation == SWIGLU:
        return swiglu(gate, up)
    if activation == GEGLU:
        return gelu(gate.float()).to(gate.dtype) * up
    wide, factor = gate.float(), up.float()
    if activation.limit is not None:
        wide = wide if activation.limits_last else wide.clamp(max=activation.limit)
        factor = factor.clamp(-activation.limit, activation.limit)
    first = gelu(wide) if activation.is_gelu else wide / (1.0 + torch.exp(-activation.alpha * wide))
    if activation.limits_last:
        first = first.clamp(max=activation.limit)
    return (first * (factor + activation.offset)).to(gate.dtype)


def moe(
    x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: Activation = SWIGLU
) -> Tensor:
    """Mixture of experts: `Σₖ gate_weights[t, k] × expert(expert_ids[t, k])(x[t])`, each expert a gated MLP.

    x: `[tokens, hidden]`; expert_ids: int64 and gate_weights: float, both `[tokens, k]`. Returns `[tokens, hidden]`.
    An id of -1 is no choice and adds nothing, whatever its gate weight. Loops over the active experts only; the sum
    over k has a fixed order.
    """
    outputs = x.new_empty((*expert_ids.shape, x.shape[1]), dtype=torch.float32)
    expert_outputs(x, expert_ids, experts, activation, outputs)
    return weighted_sum(outputs, expert_ids, gate_weights, x.dtype)


def expert_outputs(
    x: Tensor,
    expert_ids: Tensor,
    experts: ExpertTable,
    activation: Activation,
    out: Tensor,
    *,
    num_threads: int | None = None,
) -> None:
    """out[t, k] = expert(expert_ids[t, k])(x[t]), rounded to x's type, in float32 `[tokens, k, hidden]`.

    Left alone where an id is -1.

    Args:
        num_threads: of compiled operators; no matter here.
    """
    k, flat = expert_ids.shape[1], expert_ids.flatten()
    outputs = out.view(-1, out.shape[-1])
    order = torch.argsort(flat, stable=True)
    start, *counts = torch.bincount(flat + 1, minlength=len(experts) + 1).tolist()
    for expert_id, count in enumerate(counts):
        if count == 0:
            continue
        rows = order[start : start + count]
        start += count
        expert = experts[expert_id]
        inputs = x[rows // k]
        gate = linear(inputs, expert.gate, expert.gate_bias)
        up = linear(inputs, expert.up, expert.up_bias)
        outputs[rows] = linear(gated(gate, up, activation), expert.down, expert.down_bias).float()


def weighted_sum(outputs: Tensor, expert_ids: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`Σₖ gate_weights[t, k] × outputs[t, k]` in float32, in the order of k, but for those whose id is -1.

    outputs: float32 `[tokens, k, hidden]`; expert_ids, gate_weights: `[tokens, k]`. Returns `[tokens, hidden]` in
    `dtype`.
    """
    is_none = (expert_ids == -1).unsqueeze(-1)
    parts = (outputs * gate_weights.float().unsqueeze(-1)).masked_fill(is_none, 0.0)
    total = parts[:, 0]
    for slot in range(1, outputs.shape[1]):
        total = total + parts[:, slot]
    return total.to(dtype)


def convolve(
    x: Tensor,
    weight: Tensor,
    states: Tensor,
    sequences: Sequence[StepSequence],
    bias: Tensor | None = None,
    *,
    activates: bool = True,
) -> Tensor:
    """See `Convolve`.

    x: `[tokens, channels]`; weight: `[channels, n]`; states: float32 `[slots, n - 1, channels]`, read and written.
    Returns `[tokens, channels]` in x's type.
    """
    rows, columns = x.float(), weight.float().t()
    num_before = len(columns) - 1
    results = []
    start = 0
    for sequence in sequences:
        state, num_tokens = _state_of(sequence), len(sequence.token_ids)
        before = states.new_zeros(states.shape[1:]) if state.source is None else states[state.source]
        seen = torch.cat((before, rows[start : start + num_tokens]))
        total = seen[:num_tokens] * columns[0]
        for index in range(1, num_before + 1):
            total = total + seen[index : index + num_tokens] * columns[index]
        if bias is not None:
            total = total + bias.float()
        results.append(total / (1.0 + torch.exp(-total)) if activates else total)
        for count, slot in (*state.saves, (num_tokens, state.target)):
            states[slot] = seen[count : count + num_before]
        start += num_tokens
    return torch.cat(results).to(x.dtype)


def decay(x: Tensor, log_rate: Tensor, bias: Tensor, bound: float | None = None) -> Tensor:
    """exp(-exp(log_rate) × softplus(x + bias)) in float32, or with a bound exp(bound × sigmoid(exp(log_rate) × (x +
    bias))): `[tokens, n]` by `[heads]` and `[n]`, n a multiple of the heads."""
    wide = x.float() + bias.float()
    rate = torch.exp(log_rate.float()).repeat_interleave(x.shape[1] // len(log_rate))
    return torch.exp(-rate * softplus(wide) if bound is None else bound / (1.0 + torch.exp(-rate * wide)))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) of float32; for x > 20 it is x."""
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x)))


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    strength: Tensor,
    states: Tensor,
    sequences: Sequence[StepSequence],
) -> Tensor:
    """See `DeltaRule`.

    query, key: `[tokens, key_heads, d]`; value: `[tokens, value_heads, v]`; decay, the factor of the state: float32
    `[tokens, value_heads, d or 1]`; strength: float32 `[tokens, value_heads]`; states: float32
    `[slots, value_heads, d, v]`, read and written. Returns `[tokens, value_heads, v]` in value's type.
    """
    shared = value.shape[1] // key.shape[1]

    def to_unit(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + 1e-6)).repeat_interleave(shared, dim=1)

    # A trailing dimension for the one that a vector has not: [tokens, heads, d, 1], and [tokens, heads, 1, v].
    queries, keys = (to_unit(query) * query.shape[2] ** -0.5).unsqueeze(3), to_unit(key).unsqueeze(3)
    values = value.float().unsqueeze(2)
    factors, strengths = decay.unsqueeze(3), strength[:, :, None, None]
    out = torch.empty_like(values)
    for row, memory in _recurrence(states, sequences):
        memory *= factors[row]
        known = (memory * keys[row]).sum(1, keepdim=True)
        memory += keys[row] * (strengths[row] * (values[row] - known))
        out[row] = (memory * queries[row]).sum(1, keepdim=True)
    return out.squeeze(2).to(value.dtype)


def _recurrence(states: Tensor, sequences: Sequence[StepSequence]) -> Iterator[tuple[int, Tensor]]:
    """Each token's row, in order, and its sequence's state before it, which the caller moves on in place.

    The state is kept where the sequence says; states: `[slots, ...]`, read and written.
    """
    row = 0
    for sequence in sequences:
        state = _state_of(sequence)
        memory = states.new_zeros(states.shape[1:]) if state.source is None else states[state.source].clone()
        saves = dict(state.saves)
        for count in range(1, len(sequence.token_ids) + 1):
            yield row, memory
            if count in saves:
                states[saves[count]] = memory
            row += 1
        states[state.target] = memory


def scan_states(
    write: Tensor,
    read: Tensor,
    x: Tensor,
    step: Tensor,
    decay: Tensor,
    skip: Tensor,
    states: Tensor,
    sequences: Sequence[StepSequence],
) -> Tensor:
    """See `ScanStates`.

    write, read: `[tokens, groups, n]`; x: `[tokens, heads, p]`; step, dt, and decay, the factor of the state: float32
    `[tokens, heads]`; skip: `[heads]`; states: float32 `[slots, heads, n, p]`, read and written. Returns
    `[tokens, heads, p]` in x's type.
    """
    shared = x.shape[1] // write.shape[1]
    # A trailing dimension for the one that a vector has not: [tokens, heads, n, 1], and [tokens, heads, 1, p].
    writes, reads = (part.float().repeat_interleave(shared, dim=1).unsqueeze(3) for part in (write, read))
    values = x.float().unsqueeze(2)
    factors, inputs = decay[:, :, None, None], step[:, :, None, None] * values
    out = skip.float()[:, None, None] * values
    for row, memory in _recurrence(states, sequences):
        memory *= factors[row]
        memory += writes[row] * inputs[row]
        out[row] += (memory * reads[row]).sum(1, keepdim=True)
    return out.squeeze(2).to(x.dtype)


def _state_of(sequence: StepSequence) -> SequenceState:
    if sequence.state is None:
        raise ValueError("a sequence without a state, and a layer that has one")
    return sequence.state


def write_kv(cache: LayerCache, key: Tensor, value: Tensor, slot_ids: Tensor) -> None:
    """Store this step's keys and values in the cache's type: `cache[slot_ids[t]] = new[t]`."""
    _write(cache.keys, cache.key_scales, key, slot_ids)
    _write(cache.values, cache.value_scales, value, slot_ids)


def _write(cache: Tensor, scales: Tensor | None, rows: Tensor, slot_ids: Tensor) -> None:
    if not rows.numel():
        return
    if scales is None:
        cache.index_copy_(0, slot_ids, rows.to(cache.dtype))
        return
    codes, found = to_codes(rows, cache.dtype)
    cache.view(torch.uint8).index_copy_(0, slot_ids, codes.view(torch.uint8))
    scales.index_copy_(0, slot_ids, found)


def to_codes(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest codes of int8 or float8_e4m3fn for rows `[..., n]`, and the float32 scale `[...]` of each row.

    The scale is the largest magnitude divided by the largest code: 0 if there is none, NaN where a value is not finite.
    """
    wide = rows.float()
    largest = 127.0 if dtype is torch.int8 else 448.0
    scales = wide.abs().amax(-1) / largest
    is_finite = scales.isfinite()
    # A scale that is no normal number may be so inexact that a code would not fit.
    codes = (wide / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)).clamp(-largest, largest)
    codes = torch.where(is_finite.unsqueeze(-1), codes, 0.0)
    if dtype is torch.int8:
        codes = codes.round()
    return codes.to(dtype), torch.where(is_finite, scales, torch.nan)


def _read(cache: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    """The values of some slots in float32."""
    if scales is None:
        return cache[slots].float()
    codes = cache.view(torch.uint8)[slots].view(cache.dtype).float()
    return codes * scales[slots].unsqueeze(-1)


def paged_attention(
    query: Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Causal attention over a paged cache with an online softmax (Milakov & Gimelshein 2018; Kwon et al. 2023).

    query: `[tokens, heads, d]`. A token at position p sees the keys at `max(0, p - window + 1) .. p`. `sinks`: one
    logit per head that takes part in the softmax without a value. `softcap`: see `soft_cap`. Returns
    `[tokens, heads, v]` in query's type; float32 inside.
    """
    device = query.device
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
    tiles[tile_index, row_index] = query.float() * scale
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
        key = _read(cache.keys, cache.key_scales, slots).permute(0, 2, 3, 1)  # [active, kv_heads, d, key tile]
        # What lies beyond the sequence is another's: a zero weight would still spread its NaN.
        value = _read(cache.values, cache.value_scales, slots)
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
            keys = _read(cache.keys, cache.key_scales, slots)[:, 0].t().expand(end - start, 1, -1, -1)
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


class Operators:
    """What the interpreter computes with: the functions above. A backend may put compiled ones in their place."""

    embedding = staticmethod(embedding)
    linear = staticmethod(linear)
    per_head = staticmethod(per_head)
    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    layer_norm = staticmethod(layer_norm)
    route = staticmethod(route)
    moe = staticmethod(moe)
    expert_outputs = staticmethod(expert_outputs)
    weighted_sum = staticmethod(weighted_sum)
    rotate = staticmethod(rotate)
    sigmoid = staticmethod(sigmoid)
    gelu = staticmethod(gelu)
    gated = staticmethod(gated)
    convolve = staticmethod(convolve)
    decay = staticmethod(decay)
    softplus = staticmethod(softplus)
    delta_rule = staticmethod(delta_rule)
    scan_states = staticmethod(scan_states)
    write_kv = staticmethod(write_kv)
    paged_attention = staticmethod(paged_attention)
    index_scores = staticmethod(index_scores)

    @classmethod
    def choose_experts(cls, scores: Tensor, one: Route) -> tuple[Tensor, Tensor]:
        """See `routing.choose_experts`."""
        return choose_experts(scores, one, cls.sigmoid)

    @classmethod
    def linears(
        cls, x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """`linear` of the same rows with several weights."""
        biases = (None,) * len(weights) if biases is None else biases
        return [cls.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    @classmethod
    def cached_attention(cls, query: Tensor, key: Tensor, value: Tensor, how: CachedAttention) -> Tensor:
        """Norm and rotate the heads, write keys and values to the cache, attend over it.

        query, key, value: projections, `[tokens, heads × d]`, `[tokens, kv_heads × d]` and `[tokens, kv_heads × v]`.
        Returns `[tokens, heads × v]` in query's type.
        """
        tokens, cache, dim = query.shape[0], how.cache, how.cache.keys.shape[2]
        queries, new_keys = query.view(tokens, -1, dim), key.view(tokens, -1, dim)
        for place in (cls._rotated, cls._normed) if how.norms_last else (cls._normed, cls._rotated):
            queries, new_keys = place(queries, new_keys, how)
        cls.write_kv(cache, new_keys, value.view(tokens, *cache.values.shape[1:]), how.slot_ids)
        attended = cls.paged_attention(
            queries,
            cache,
            how.batch,
            scale=how.scale,
            window=how.window,
            sinks=how.sinks,
            softcap=how.softcap,
            chunk=how.chunk,
        )
        return attended.flatten(1)

    @classmethod
    def _normed(cls, queries: Tensor, keys: Tensor, how: CachedAttention) -> tuple[Tensor, Tensor]:
        if how.norms is None:
            return queries, keys
        kind = torch.float32 if how.rounds_last else queries.dtype
        normed = (
            cls.rms_norm(x.to(kind), weight, how.norm_eps).to(x.dtype)
            for x, weight in zip((queries, keys), how.norms, strict=True)
        )
        return next(normed), next(normed)

    @classmethod
    def _rotated(cls, queries: Tensor, keys: Tensor, how: CachedAttention) -> tuple[Tensor, Tensor]:
        if how.rotary is None:
            return queries, keys
        if how.is_interleaved:
            width = 2 * how.rotary[0].shape[1]
            queries, keys = part_pairs(queries, width), part_pairs(keys, width)
        return cls.rotate(queries, *how.rotary), cls.rotate(keys, *how.rotary)
