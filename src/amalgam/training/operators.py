"""The reference's operators with whole sequences in one step, so that gradients go back through all of them.

In: activations and float32 weights. Out: activations. Must never know: what is trained.

They give what `backends.reference` gives, but for the last bits: a product takes all rows at once, a sequence attends
to its own keys without a cache between, and nothing that a gradient needs is written over. Activations are
PyTorch's own: the reference's exponentials overflow far from 0, where a value is right and its gradient would be NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.calibration.frames import WholeProducts, linear
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.backends.reference.operators import convolve
from amalgam.kernels.program import Rows
from amalgam.kernels.step import AttentionBatch, CachedAttention, StepSequence
from amalgam.kernels.weights import SWIGLU, ExpertTable, GatedActivation, PackedWeight


class TrainingFrame(Frame):
    """A step in which no buffer is written over: a part of one makes a new one."""

    def put(self, rows: Rows, value: Tensor) -> None:
        buffer = self._buffers.get(rows.buffer)
        if not rows.is_whole and buffer is not None and buffer.shape == (len(value), rows.stride):
            self._buffers[rows.buffer] = buffer.clone()
        super().put(rows, value)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    return functional.softplus(x)


def gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def gated(gate: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
    if activation.limit is not None:
        gate = gate if activation.limits_last else gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    first = gelu(gate) if activation.is_gelu else gate * torch.sigmoid(activation.alpha * gate)
    if activation.limits_last:
        first = first.clamp(max=activation.limit)
    return first * (up + activation.offset)


class TrainingOperators(WholeProducts):
    """Operators for sequences that are whole: each begins at position 0 and ends in this step."""

    sigmoid = staticmethod(sigmoid)
    softplus = staticmethod(softplus)
    gelu = staticmethod(gelu)
    gated = staticmethod(gated)

    @staticmethod
    def convolve(
        x: Tensor,
        weight: Tensor,
        states: Tensor,
        sequences: Sequence[StepSequence],
        bias: Tensor | None = None,
        *,
        activates: bool = True,
    ) -> Tensor:
        found = convolve(x, weight, states, sequences, bias, activates=False)
        return functional.silu(found) if activates else found

    @staticmethod
    def decay(x: Tensor, log_rate: Tensor, bias: Tensor, bound: float | None = None) -> Tensor:
        wide = x.float() + bias.float()
        rate = torch.exp(log_rate.float()).repeat_interleave(x.shape[1] // len(log_rate))
        return torch.exp(-rate * softplus(wide) if bound is None else bound * torch.sigmoid(rate * wide))

    @staticmethod
    def route(
        x: Tensor, weight: PackedWeight, k: int, *, normalises: bool, sum_eps: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        gate_weights, expert_ids = torch.topk(torch.softmax(linear(x.float(), weight), dim=-1), k, dim=-1)
        if normalises:
            gate_weights = gate_weights / (gate_weights.sum(-1, keepdim=True) + sum_eps)
        return expert_ids, gate_weights

    @staticmethod
    def per_head(x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("thi,hio->tho", x, weight.to(x.dtype))

    @staticmethod
    def moe(
        x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: GatedActivation = SWIGLU
    ) -> Tensor:
        total = torch.zeros_like(x)
        for expert_id, expert in enumerate(experts.experts):
            rows, place = (expert_ids == expert_id).nonzero(as_tuple=True)
            if not len(rows):
                continue
            part = x[rows]
            gate = linear(part, expert.gate, expert.gate_bias)
            up = linear(part, expert.up, expert.up_bias)
            down = linear(gated(gate, up, activation), expert.down, expert.down_bias)
            total = total.index_add(0, rows, down * gate_weights[rows, place].unsqueeze(1))
        return total

    @classmethod
    def cached_attention(cls, query: Tensor, key: Tensor, value: Tensor, how: CachedAttention) -> Tensor:
        tokens, dim = query.shape[0], how.cache.keys.shape[2]
        queries, keys = query.view(tokens, -1, dim), key.view(tokens, -1, dim)
        for place in (cls._rotated, cls._normed) if how.norms_last else (cls._normed, cls._rotated):
            queries, keys = place(queries, keys, how)
        return _attended(queries, keys, value.view(tokens, keys.shape[1], -1), how).flatten(1)

    @staticmethod
    def delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        strength: Tensor,
        states: Tensor,
        sequences: Sequence[StepSequence],
    ) -> Tensor:
        shared = value.shape[1] // key.shape[1]

        def to_unit(x: Tensor) -> Tensor:
            return (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)).repeat_interleave(shared, dim=1)

        queries, keys = (to_unit(query) * query.shape[2] ** -0.5).unsqueeze(3), to_unit(key).unsqueeze(3)
        values, factors, strengths = value.unsqueeze(2), decay.unsqueeze(3), strength[:, :, None, None]

        def step(memory: Tensor, row: int) -> tuple[Tensor, Tensor]:
            memory = memory * factors[row]
            known = (memory * keys[row]).sum(1, keepdim=True)
            memory = memory + keys[row] * (strengths[row] * (values[row] - known))
            return memory, (memory * queries[row]).sum(1, keepdim=True)

        return _recurrent(step, states, sequences).squeeze(2)

    @staticmethod
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
        shared = x.shape[1] // write.shape[1]
        writes, reads = (part.repeat_interleave(shared, dim=1).unsqueeze(3) for part in (write, read))
        values = x.unsqueeze(2)
        factors, inputs = decay[:, :, None, None], step[:, :, None, None] * values

        def scan(memory: Tensor, row: int) -> tuple[Tensor, Tensor]:
            memory = memory * factors[row] + writes[row] * inputs[row]
            return memory, (memory * reads[row]).sum(1, keepdim=True)

        skipped = skip.float()[:, None, None] * values
        return (skipped + _recurrent(scan, states, sequences)).squeeze(2)


def _recurrent(
    step: Callable[[Tensor, int], tuple[Tensor, Tensor]], states: Tensor, sequences: Sequence[StepSequence]
) -> Tensor:
    """The results of all rows one after the other, each sequence from an empty memory.

    Args:
        step: a memory and a row → the memory behind it and its result.
        states: `[slots, …]`, for the shape of a memory.
    """
    results, row = [], 0
    for sequence in sequences:
        memory = states.new_zeros(states.shape[1:])
        for _ in sequence.token_ids:
            memory, result = step(memory, row)
            results.append(result)
            row += 1
    return torch.stack(results)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, how: CachedAttention) -> Tensor:
    """Causal attention within each sequence: `[tokens, heads, v]`; what it leaves out is said by `Attend`."""
    index, is_real = _places(how.batch, queries.device)
    shared, length = queries.shape[1] // keys.shape[1], index.shape[1]
    query = queries[index].unflatten(2, (keys.shape[1], shared))  # [sequences, length, kv_heads, shared, d]
    key, value = keys[index], values[index]
    scores = torch.einsum("sqhgd,skhd->shgqk", query, key) * how.scale
    if how.softcap is not None:
        scores = soft_cap(scores, how.softcap)
    scores = scores.masked_fill(~_visible(length, how, queries.device), -torch.inf)
    if how.sinks is not None:
        sinks = how.sinks.float().view(1, keys.shape[1], shared, 1, 1).expand(*scores.shape[:4], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    attended = torch.einsum("shgqk,skhv->sqhgv", weights, value).flatten(2, 3)
    return attended[is_real]


def _places(batch: AttentionBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of each sequence side by side, `[sequences, longest]`, and which of these places are a token's.

    Behind a shorter sequence its last row stands again, which none of its own tokens sees.
    """
    starts = batch.query_starts
    lengths = starts.diff().unsqueeze(1)
    place = torch.arange(int(lengths.max())).unsqueeze(0)
    index = starts[:-1].unsqueeze(1) + torch.minimum(place, lengths - 1)
    return index.to(device), (place < lengths).to(device)


def _visible(length: int, how: CachedAttention, device: torch.device) -> Tensor:
    """`[queries, keys]`: whether a position sees another one."""
    position = torch.arange(length, device=device)
    distance = position.unsqueeze(1) - position
    visible = distance >= 0
    if how.window is not None:
        visible &= distance < how.window
    if how.chunk is not None:
        visible &= (position // how.chunk * how.chunk).unsqueeze(1) <= position
    return visible
