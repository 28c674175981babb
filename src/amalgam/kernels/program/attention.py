"""Instructions of attention over the cache of a layer, and of which positions it goes over."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from amalgam.kernels.program.rows import Rows
from amalgam.kernels.weights import PackedWeight


@dataclass(frozen=True, eq=False)
class Attend:
    """Grouped-query attention over the layer's cache; see `Operators.cached_attention`.

    Attributes:
        head_norms: RMSNorm weights over each query and each key head, with `head_norm_eps`; None: no norm.
        rope: index into the step's rotary tables; None: no rotation.
        window: a token sees so many positions, itself included; None: all before it.
        chunk: a token sees no position before the last multiple of it (Llama 4); None: no such cut.
        sinks: one logit per head that takes part in the softmax without a value.
        softcap: scores become `softcap × tanh(score / softcap)` (Gemma Team 2024, "Gemma 2"); None: they stay.
        rounds_last: of the head norms, as in `Normalize`.
        is_interleaved: rotary pairs are neighbours, not halves apart.
        norms_last: the head norms come behind the rotation (Hunyuan); their weights are in the order that it leaves.
    """

    query: Rows
    key: Rows
    value: Rows
    out: Rows
    layer_id: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    head_norms: tuple[Tensor, Tensor] | None = None
    head_norm_eps: float = 0.0
    rope: int | None = None
    window: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    rounds_last: bool = False
    is_interleaved: bool = False
    norms_last: bool = False
    chunk: int | None = None


@dataclass(frozen=True, eq=False)
class AttendLatent:
    """Multi-head latent attention (DeepSeek-AI 2024, section 2.1), over cached latent vectors.

    Keys and values of all heads are projections of one normed latent vector per token, beside one rotated key that all
    heads share. The projection to keys is applied to the query and the one to values to the result:

        score of head h  =  (q_nope · Wₖ[h]) · latent  +  q_rope · k_rope
        output of head h =  Wᵥ[h] · Σ weight × latent

    Attributes:
        query: `[tokens, heads × (nope + rope)]`.
        compressed: `[tokens, latent + rope]`, before norm and rotation.
        expand: Wₖ and Wᵥ, `[heads × (nope + value), latent]`.
        norm: None: the latent vectors are normed already.
        rope: index into the step's rotary tables; None: there are no dimensions that turn.
        is_interleaved: rotary pairs are neighbours, not halves apart.
        is_indexed: over the positions that the last `Choose` has chosen.
    """

    query: Rows
    compressed: Rows
    out: Rows
    layer_id: int
    expand: PackedWeight
    norm: Tensor | None
    norm_eps: float
    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: int | None
    scale: float
    is_interleaved: bool
    is_indexed: bool = False

    @property
    def latent_dim(self) -> int:
        return self.compressed.width - self.rope_dim


@dataclass(frozen=True, eq=False)
class KeepIndexKey:
    """The keys that an indexer finds tokens by, rotated, go into the layer's cache of them, `Cache.indexes`.

    rope: None: no rotation.
    """

    key: Rows
    layer_id: int
    rope: int | None
    is_interleaved: bool


@dataclass(frozen=True, eq=False)
class Choose:
    """Which positions a token attends to, by a lightning indexer (DeepSeek-AI 2025, "DeepSeek-V3.2", section 2.1).

    Of the positions up to the token's own, the `k` with the largest scores; all of them where there are no more.

        score of a position = Σₕ scale × weights[h] × max(0, query[h] · key of the position)

    in float32. Of equal scores the earlier position is chosen, and a score that is not a number counts as infinite.

    Attributes:
        query: `[tokens, heads × dim]`, before the rotation.
        weights: float32 `[tokens, heads]`.
        k: how many positions.
        rope: None: no rotation.
        is_interleaved: rotary pairs are neighbours, not halves apart; of the keys likewise.
    """

    query: Rows
    weights: Rows
    layer_id: int
    num_heads: int
    k: int
    scale: float
    rope: int | None
    is_interleaved: bool
