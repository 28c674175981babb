"""What each instruction does, over the frame of a step: the specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amalgam.kernels.backends.base import OwnMixture
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.backends.reference.latent import (
    attention_of,
    latent_matrices,
    latent_query,
    normed_latent,
    rotated,
    shared_key,
)
from amalgam.kernels.backends.reference.operators import Operators, changed_logits, largest
from amalgam.kernels.program import (
    Add,
    Attend,
    AttendLatent,
    Call,
    Choose,
    Clamp,
    Convolve,
    DeltaRule,
    Embed,
    Gelu,
    Head,
    Instruction,
    KeepIndexKey,
    Mix,
    Normalize,
    Project,
    Route,
    Scale,
    ScaleByPosition,
    ScaleBySigmoid,
    ScaleHeads,
    ScanStates,
    Split,
    SwiGlu,
    WeighInput,
)
from amalgam.kernels.step import CachedAttention


def execute(instruction: Instruction, frame: Frame) -> None:
    """Run one instruction."""
    _HANDLERS[type(instruction)](instruction, frame)


def _embed(one: Embed, frame: Frame) -> None:
    ids = frame.step.positions if one.by_position else frame.step.token_ids
    rows = frame.operators.embedding(ids, one.weight, frame.dtype)
    frame.put(one.out, frame.get(one.out) + rows if one.adds else rows)


def _normalize(one: Normalize, frame: Frame) -> None:
    x, parts = frame.get(one.x), (-1, one.x.width // len(one.weight), len(one.weight))
    if one.delta is not None:
        delta = frame.get(one.delta)
        if one.bias is None and not one.rounds_last and parts[1] == 1:
            total, normed = frame.operators.add_rms_norm(x, delta, one.weight, one.eps)
            frame.put(one.x, total)
            frame.put(one.out, normed)
            return
        x = x + delta
        frame.put(one.x, x)
    x = x.reshape(parts)
    if one.bias is not None:
        normed = frame.operators.layer_norm(x, one.weight, one.bias, one.eps)
    elif one.rounds_last:
        normed = frame.operators.rms_norm(x.float(), one.weight, one.eps).to(x.dtype)
    else:
        normed = frame.operators.rms_norm(x, one.weight, one.eps)
    frame.put(one.out, normed.flatten(1))


def _project(one: Project, frame: Frame) -> None:
    x = frame.get(one.x)
    if one.widens:
        x = x.float()
    weights, biases = [p.weight for p in one.projections], [p.bias for p in one.projections]
    kind = torch.float32 if one.projections[0].out.is_wide else frame.dtype
    if kind is x.dtype:
        results = frame.operators.linears(x, weights, biases)
    else:
        results = [frame.operators.linear(x, weight, bias, kind) for weight, bias in zip(weights, biases, strict=True)]
    for projection, result in zip(one.projections, results, strict=True):
        frame.put(projection.out, result)


def _attend(one: Attend, frame: Frame) -> None:
    step = frame.step
    how = CachedAttention(
        cache=step.kv.layers[one.layer_id],
        slot_ids=step.slot_ids,
        batch=step.attention,
        scale=one.scale,
        norms=one.head_norms,
        norm_eps=one.head_norm_eps,
        rotary=None if one.rope is None else frame.rotary(one.rope),
        window=one.window,
        sinks=one.sinks,
        softcap=one.softcap,
        rounds_last=one.rounds_last,
        is_interleaved=one.is_interleaved,
        norms_last=one.norms_last,
        chunk=one.chunk,
    )
    query, key, value = frame.get(one.query), frame.get(one.key), frame.get(one.value)
    frame.put(one.out, frame.operators.cached_attention(query, key, value, how))


def _attend_latent(one: AttendLatent, frame: Frame) -> None:
    step, latent = frame.step, normed_latent(one, frame)
    query, query_rope = latent_query(one, frame)
    to_keys, to_values = latent_matrices(one, frame.dtype)
    query = torch.cat((frame.operators.per_head(query, to_keys), query_rope), dim=-1)
    key = torch.cat((latent.unsqueeze(1), shared_key(one, frame)), dim=-1)
    cache = step.kv.layers[one.layer_id]
    frame.operators.write_kv(cache, key, key[..., :0], step.slot_ids)
    latents = cache._replace(values=cache.keys[..., : one.latent_dim], value_scales=cache.key_scales)
    attended = frame.operators.paged_attention(query, latents, attention_of(one, frame), scale=one.scale)
    frame.put(one.out, frame.operators.per_head(attended, to_values.transpose(1, 2)).flatten(1))


def _keep_index_key(one: KeepIndexKey, frame: Frame) -> None:
    cache = frame.step.kv.indexes[one.layer_id]
    assert cache is not None
    key = rotated(frame.get(one.key).detach().unsqueeze(1), one.rope, one.is_interleaved, frame)
    frame.operators.write_kv(cache, key, key[..., :0], frame.step.slot_ids)


@torch.no_grad()
def _choose(one: Choose, frame: Frame) -> None:
    choice, cache = frame.choice(one.k), frame.step.kv.indexes[one.layer_id]
    assert cache is not None
    if choice is None:
        frame.chosen = None
        return
    queries, weights, positions = frame.get(one.query), frame.get(one.weights), []
    for part in choice.parts:
        query = queries[part.rows].unflatten(1, (one.num_heads, -1))
        query = rotated(query, one.rope, one.is_interleaved, frame, part.rows)
        scores = frame.operators.index_scores(query, weights[part.rows] * one.scale, cache, part.batch)
        positions.append(largest(scores, one.k))
    frame.chosen = choice.attention(torch.cat(positions))


def _route(one: Route, frame: Frame) -> None:
    x = frame.get(one.x)
    is_plain = one.scoring == "softmax" and one.num_groups == 1 and one.scaling == 1.0
    if is_plain and one.bias is None and one.correction is None and one.factors is None:
        frame.route(
            one.layer_id, *frame.operators.route(x, one.weight, one.k, normalises=one.normalises, sum_eps=one.sum_eps)
        )
        return
    scores = frame.operators.linear(x.float(), one.weight, one.bias)
    frame.route(one.layer_id, *frame.operators.choose_experts(scores, one))


def _mix(one: Mix, frame: Frame) -> None:
    assert frame.routing is not None
    expert_ids, gate_weights = frame.routing
    if not one.weighs:
        gate_weights = torch.ones_like(gate_weights)
    x, experts = frame.get(one.x), one.experts
    if isinstance(experts, OwnMixture):
        frame.put(one.out, experts.mix(x, expert_ids, gate_weights, one.activation))
    else:
        frame.put(one.out, frame.operators.moe(x, expert_ids, gate_weights, experts, one.activation))


def _weigh_input(one: WeighInput, frame: Frame) -> None:
    assert frame.routing is not None and frame.routing[1].shape[1] == 1
    x = frame.get(one.x)
    frame.put(one.out, (x.float() * frame.routing[1]).to(x.dtype))


def _swiglu(one: SwiGlu, frame: Frame) -> None:
    frame.put(one.out, frame.operators.gated(frame.get(one.gate), frame.get(one.up), one.activation))


def _gelu(one: Gelu, frame: Frame) -> None:
    x = frame.get(one.x)
    frame.put(one.x, frame.operators.gelu(x.float()).to(x.dtype))


def _clamp(one: Clamp, frame: Frame) -> None:
    frame.put(one.x, frame.get(one.x).clamp(-one.limit, one.limit))


def _scale(one: Scale, frame: Frame) -> None:
    x = frame.get(one.x)
    # A number, not a tensor: nothing has to be copied to the device.
    factor = torch.tensor(one.factor, dtype=x.dtype if one.rounds_factor else torch.float32).item()
    frame.put(one.x, (x.float() * factor).to(x.dtype))


def _scale_by_position(one: ScaleByPosition, frame: Frame) -> None:
    x = frame.get(one.x)
    turns = torch.floor((frame.step.positions.double() + one.offset) / one.length)
    factors = (1.0 + one.beta * torch.log1p(turns)).float().unsqueeze(1)
    frame.put(one.x, (x.float() * factors).to(x.dtype))


def _scale_by_sigmoid(one: ScaleBySigmoid, frame: Frame) -> None:
    x = frame.get(one.x)
    parts = x.unflatten(1, (one.gate.width, -1)).float()
    frame.put(one.x, (frame.operators.sigmoid(frame.get(one.gate)).unsqueeze(2) * parts).flatten(1).to(x.dtype))


def _scale_heads(one: ScaleHeads, frame: Frame) -> None:
    x = frame.get(one.x)
    logarithms = torch.log1p(frame.step.positions.double()).float().unsqueeze(1)
    factors = one.slopes.float() * logarithms + one.biases.float()
    parts = x.unflatten(1, (factors.shape[1], -1)).float()
    frame.put(one.x, (factors.unsqueeze(2) * parts).flatten(1).to(x.dtype))


def _split(one: Split, frame: Frame) -> None:
    groups = frame.get(one.x).unflatten(1, (one.num_groups, -1))
    parts = groups.split([out.width // one.num_groups for out in one.outs], dim=2)
    for out, part in zip(one.outs, parts, strict=True):
        frame.put(out, part.flatten(1))


def _convolve(one: Convolve, frame: Frame) -> None:
    state = frame.step.kv.states[one.layer_id]
    assert state is not None
    x = frame.get(one.x)
    rows = x if one.before is None else x.float() * frame.get(one.before).float()
    out = frame.operators.convolve(
        rows if one.behind is None else rows.float(),
        one.weight,
        state.convolution,
        frame.step.sequences,
        one.bias,
        activates=one.activates,
    )
    frame.put(one.out, (out if one.behind is None else out * frame.get(one.behind).float()).to(x.dtype))


def _delta_rule(one: DeltaRule, frame: Frame) -> None:
    state = frame.step.kv.states[one.layer_id]
    assert state is not None
    query, key = (frame.get(rows).unflatten(1, (one.num_key_heads, -1)) for rows in (one.query, one.key))
    value = frame.get(one.value).unflatten(1, (one.num_value_heads, -1))
    decay = frame.operators.decay(frame.get(one.decay), one.log_rate, one.decay_bias, one.bound)
    decay = decay.unflatten(1, (one.num_value_heads, -1))
    strength = frame.operators.sigmoid(frame.get(one.strength))
    out = frame.operators.delta_rule(query, key, value, decay, strength, state.recurrent, frame.step.sequences)
    frame.put(one.out, out.flatten(1))


def _scan_states(one: ScanStates, frame: Frame) -> None:
    state = frame.step.kv.states[one.layer_id]
    assert state is not None
    write, read = (frame.get(rows).unflatten(1, (one.num_groups, -1)) for rows in (one.write, one.read))
    x = frame.get(one.x).unflatten(1, (one.num_heads, -1))
    step = frame.operators.softplus(frame.get(one.step).float() + one.step_bias.float()).clamp(*one.limits)
    decay = torch.exp(-torch.exp(one.log_rate.float()) * step)
    out = frame.operators.scan_states(write, read, x, step, decay, one.skip, state.recurrent, frame.step.sequences)
    frame.put(one.out, out.flatten(1))


def _add(one: Add, frame: Frame) -> None:
    frame.put(one.x, frame.get(one.x) + frame.get(one.y))


def _call(one: Call, frame: Frame) -> None:
    for rows, value in zip(one.outputs, one.function(*map(frame.get, one.inputs), frame.step), strict=True):
        frame.put(rows, value)


def _head(one: Head, frame: Frame) -> None:
    x, rows = frame.get(one.x), frame.step.logit_rows
    if not len(rows):  # a head that no kernel reads would be expanded for nothing
        frame.logits = torch.empty((0, one.weight.shape[0]), dtype=torch.float32, device=x.device)
        return
    wanted = x if len(rows) == len(x) else x.index_select(0, rows)
    frame.logits = logits_of(one, wanted, frame.operators)


def logits_of(head: Head, hidden: Tensor, operators: type[Operators]) -> Tensor:
    """float32 logits `[rows, vocabulary]` of hidden states `[rows, hidden]`."""
    logits = operators.linear(hidden, head.weight, head.bias, torch.float32)
    return changed_logits(logits, head.scale, head.softcap)


_HANDLERS: dict[type[Instruction], Callable[[Any, Frame], None]] = {
    Add: _add,
    Attend: _attend,
    AttendLatent: _attend_latent,
    Call: _call,
    Choose: _choose,
    Clamp: _clamp,
    Convolve: _convolve,
    DeltaRule: _delta_rule,
    Embed: _embed,
    Gelu: _gelu,
    Head: _head,
    KeepIndexKey: _keep_index_key,
    Mix: _mix,
    Normalize: _normalize,
    Project: _project,
    Route: _route,
    Scale: _scale,
    ScaleByPosition: _scale_by_position,
    ScaleBySigmoid: _scale_by_sigmoid,
    ScaleHeads: _scale_heads,
    ScanStates: _scan_states,
    Split: _split,
    SwiGlu: _swiglu,
    WeighInput: _weigh_input,
}
