"""What carries a state along each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from amalgam.kernels.backends.reference.operators.elementwise import softplus
from amalgam.kernels.step import SequenceState, StepSequence


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


def _state_of(sequence: StepSequence) -> SequenceState:
    if sequence.state is None:
        raise ValueError("a sequence without a state, and a layer that has one")
    return sequence.state
