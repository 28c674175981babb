"""The one generic decoder: token ids in, logits out, with the weight version that it is handed.

    token ids ─ embedding ─┬────────────────┬+──┬──────────┬+── … ── norm ─ hidden ─ head ─ logits
                           └ norm ─ attention┘  └ norm ─ mlp┘
                             (one layer; the blocks are chosen by ModelSpec.layers)

Must never know: requests, files, plans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.kernels import ops
from amalgam.kernels.stack import Stack
from amalgam.models.context import BlockContext, StepContext
from amalgam.models.spec import ModelSpec
from amalgam.models.stack import stack_of
from amalgam.models.weights import WeightVersion


class Decoder:
    """Stateless apart from the rotary tables; one instance serves every weight version."""

    def __init__(self, spec: ModelSpec, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        ropes = {layer.attention.rope for layer in spec.layers} - {None}
        self._rope_tables = {rope: rope.tables(max_positions, device) for rope in ropes if rope is not None}

    def forward(self, token_ids: Tensor, context: StepContext, weights: WeightVersion) -> Tensor:
        """Run one step: int64 `[tokens]` → hidden states `[tokens, hidden]` after the last norm.

        Writes the tokens' keys and values to the cache and shows the routing to the observer.
        """
        norm, outside = self.spec.norm, weights.block("")
        x = ops.embedding(token_ids, weights["embedding"], self.dtype)
        if self.spec.has_position_embedding:
            x = x + ops.embedding(context.positions, weights["positions"], self.dtype)
        normed = norm(x, outside, "layers.0.attention_norm")
        stack = stack_of(self.spec, weights, list(self._rope_tables))
        if stack is not None and stack.takes(x, context.kv.keys, context.kv.values):
            return self._run(stack, x, normed, context)
        rotary = {
            rope: (cos[context.positions], sin[context.positions]) for rope, (cos, sin) in self._rope_tables.items()
        }
        for layer_id, layer in enumerate(self.spec.layers):
            block = BlockContext(context, layer_id, rotary)
            prefix = f"layers.{layer_id}"
            delta = layer.attention(normed, weights.block(f"{prefix}.attention"), block)
            x, normed = norm.after(x, delta, outside, f"{prefix}.mlp_norm")
            delta = layer.mlp(normed, weights.block(f"{prefix}.mlp"), block)
            is_last = layer_id + 1 == len(self.spec.layers)
            x, normed = norm.after(x, delta, outside, "norm" if is_last else f"layers.{layer_id + 1}.attention_norm")
        return normed

    def _run(self, stack: Stack, x: Tensor, normed: Tensor, context: StepContext) -> Tensor:
        """The layers in one call."""
        expert_ids, gate_weights = stack.run(
            x,
            normed,
            positions=context.positions,
            tables=list(self._rope_tables.values()),
            keys=context.kv.keys,
            values=context.kv.values,
            slot_ids=context.slot_ids,
            batch=context.attention,
        )
        if context.observer is not None and len(expert_ids):
            context.observer.observe_all(expert_ids, gate_weights)
        return normed

    def logits(self, hidden: Tensor, weights: WeightVersion) -> Tensor:
        """`[rows, hidden]` → float32 `[rows, vocabulary]`; a tied head is the embedding."""
        head = weights["embedding"] if self.spec.has_tied_head else weights["head"]
        bias = weights["head_bias"].dense if self.spec.has_head_bias else None
        return ops.linear(hidden, head, bias, torch.float32)
