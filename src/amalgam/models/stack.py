"""Which models the extension can run in one call.

In: a spec and a weight version. Out: a `Stack`, or None where a block is of another kind, or a weight not in panels;
the decoder then calls block by block. Must never know: requests, files.
"""

from __future__ import annotations

from collections.abc import Sequence

from amalgam.kernels.stack import (
    AttentionLayer,
    DecoderLayer,
    DenseLayer,
    MixtureLayer,
    Projection,
    Stack,
    fits,
)
from amalgam.models.layers import Attention, DenseMlp, RmsNorm, SoftmaxRouter, SparseMoe
from amalgam.models.rope import Rope
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import BlockWeights, WeightVersion

_CACHE_KEY = "stack"


def stack_of(spec: ModelSpec, weights: WeightVersion, ropes: Sequence[Rope]) -> Stack | None:
    """The model of a version, made at its first step.

    Args:
        ropes: in the order in which `Stack.run` will be given their tables.
    """
    if _CACHE_KEY not in weights.cache:
        weights.cache[_CACHE_KEY] = _make(spec, weights, ropes)
    stack = weights.cache[_CACHE_KEY]
    assert stack is None or isinstance(stack, Stack)
    return stack


def _make(spec: ModelSpec, weights: WeightVersion, ropes: Sequence[Rope]) -> Stack | None:
    norm = spec.norm
    if type(norm) is not RmsNorm:
        return None
    outside = weights.block("")
    layers = []
    for layer_id, layer in enumerate(spec.layers):
        prefix = f"layers.{layer_id}"
        attention = _attention(layer.attention, weights.block(f"{prefix}.attention"), ropes)
        mlp = _mlp(layer.mlp, weights.block(f"{prefix}.mlp"))
        if attention is None or mlp is None:
            return None
        is_last = layer_id + 1 == spec.num_layers
        next_norm = outside["norm" if is_last else f"layers.{layer_id + 1}.attention_norm"]
        layers.append(DecoderLayer(attention, mlp, outside[f"{prefix}.mlp_norm"].dense, next_norm.dense))
    if not fits(layers):
        return None
    # Positions that are learned come on top of the embedding.
    embedding = None if spec.has_position_embedding else weights["embedding"]
    head = weights["embedding" if spec.has_tied_head else "head"], outside.vector("head_bias")
    return Stack(layers, norm.eps, outside["layers.0.attention_norm"].dense, embedding, head)


def _attention(block: object, weights: BlockWeights, ropes: Sequence[Rope]) -> AttentionLayer | None:
    # A family that projects in its own way does so with `project`; other differences are in the weights.
    if not isinstance(block, Attention) or type(block).project is not Attention.project:
        return None
    if type(block).__call__ is not Attention.__call__:
        return None
    query, key, value, out = (_projection(weights, name) for name in ("q", "k", "v", "o"))
    return AttentionLayer(
        projections=(query, key, value, out),
        head_norms=(weights["q_norm"].dense, weights["k_norm"].dense) if block.has_head_norm else None,
        head_norm_eps=block.norm_eps,
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        scale=block.head_dim**-0.5,
        window=block.window,
        sinks=weights.vector("sinks"),
        rope=None if block.rope is None else ropes.index(block.rope),
    )


def _mlp(block: object, weights: BlockWeights) -> DenseLayer | MixtureLayer | None:
    if type(block) is DenseMlp:
        return DenseLayer(*(_projection(weights, name) for name in ("gate", "up", "down")))
    if type(block) is not SparseMoe or block.shared_size or type(block.router) is not SoftmaxRouter:
        return None
    router = block.router
    return MixtureLayer(
        router=weights["router"],
        num_active=router.num_active_experts,
        normalises=router.normalises,
        sum_eps=router.sum_eps,
        experts=weights.experts,
        activation=block.activation,
    )


def _projection(weights: BlockWeights, name: str) -> Projection:
    return weights[name], weights.vector(f"{name}_bias")
