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
        self._ropes = [rope for rope in ropes if rope is not None]
        self._tables = [rope.tables(max_positions, device) for rope in self._ropes]

    def forward(self, context: StepContext, weights: WeightVersion) -> Tensor:
        """Run one step: float32 logits `[rows, vocabulary]` of the rows that it wants, good until the next step.

        Writes the tokens' keys and values to the cache and shows the routing to the observer.
        """
        stack, kv = stack_of(self.spec, weights, self._ropes), context.kv
        if stack is not None and stack.takes(self.dtype, kv.keys, kv.values, kv.block_size, self._tables):
            return self._run(stack, context, weights)
        hidden, rows = self._hidden(context, weights), context.logit_rows
        return self._logits(hidden if len(rows) == len(hidden) else hidden.index_select(0, rows), weights)

    def _run(self, stack: Stack, context: StepContext, weights: WeightVersion) -> Tensor:
        """The step in one call."""
        observer, kv = context.observer, context.kv
        result, expert_ids, gate_weights = stack.run(
            context.sequences,
            keys=kv.keys,
            values=kv.values,
            block_size=kv.block_size,
            tables=self._tables,
            x=None if stack.has_embedding else self._embedded(context, weights),
            wants_routing=observer is not None,
        )
        if observer is not None and expert_ids is not None and gate_weights is not None and len(expert_ids):
            observer.observe_all(expert_ids, gate_weights)
        return result if stack.has_head else self._logits(result, weights)

    def _hidden(self, context: StepContext, weights: WeightVersion) -> Tensor:
        """Block by block: hidden states `[tokens, hidden]` after the last norm."""
        norm, outside = self.spec.norm, weights.block("")
        x = self._embedded(context, weights)
        normed = norm(x, outside, "layers.0.attention_norm")
        rotary = {
            rope: (cos[context.positions], sin[context.positions])
            for rope, (cos, sin) in zip(self._ropes, self._tables, strict=True)
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

    def _embedded(self, context: StepContext, weights: WeightVersion) -> Tensor:
        x = ops.embedding(context.token_ids, weights["embedding"], self.dtype)
        if self.spec.has_position_embedding:
            x = x + ops.embedding(context.positions, weights["positions"], self.dtype)
        return x

    def _logits(self, hidden: Tensor, weights: WeightVersion) -> Tensor:
        """`[rows, hidden]` → float32 `[rows, vocabulary]`; a tied head is the embedding."""
        if not len(hidden):  # a head that no kernel reads would be expanded for nothing
            return torch.empty((0, self.spec.vocab_size), dtype=torch.float32, device=hidden.device)
        head = weights["embedding"] if self.spec.has_tied_head else weights["head"]
        bias = weights["head_bias"].dense if self.spec.has_head_bias else None
        return ops.linear(hidden, head, bias, torch.float32)
