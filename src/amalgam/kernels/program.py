"""A step as instructions over named buffers.

In: the blocks of a model, which emit instructions when a weight version is built. Out: a `Program`, which a backend
compiles and runs (`amalgam.kernels.backends`). Must never know: families, checkpoints, requests, how it is run.

    token ids ─ Embed ─ x ─ Normalize ─ normed ─ Project ─ query, key, value ─ Attend ─ attended ─ Project ─ delta
                        x + delta ─ Normalize ─ normed ─ Route ─ Mix ─ delta ─ … ─ Head ─ logits

Every buffer has one row per token of the step. What an instruction does is said by its docstring and, exactly, by
`amalgam.kernels.backends.reference`. What no instruction says is a `Call` into Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from amalgam.kernels.packed import SWIGLU, Activation, ExpertTable, PackedWeight


@dataclass(frozen=True)
class Rows:
    """Where an instruction finds or leaves activations, `[tokens, width]`: columns of a buffer.

    Attributes:
        buffer: buffers of one name are one piece of memory, so that each layer uses what the one before has left.
        stride: elements from one token's row to the next.
        start, width: the columns.
        is_wide: float32, whatever the activations are.
    """

    buffer: str
    stride: int
    start: int
    width: int
    is_wide: bool = False

    def columns(self, start: int, width: int) -> Rows:
        """Some of these columns."""
        assert 0 <= start <= start + width <= self.width, (self, start, width)
        return replace(self, start=self.start + start, width=width)

    @property
    def is_whole(self) -> bool:
        """Whether the rows lie one behind the other without a gap."""
        return self.width == self.stride


@dataclass(frozen=True, eq=False)
class Embed:
    """out = the weight's rows of the tokens' ids or positions; or out += those."""

    weight: PackedWeight
    out: Rows
    by_position: bool = False
    adds: bool = False


@dataclass(frozen=True, eq=False)
class Normalize:
    """out = norm(x); with a `delta`, x += delta before.

    RMSNorm (Zhang & Sennrich 2019), or with a `bias` LayerNorm (Ba et al. 2016), over every `len(weight)` columns.
    RMSNorm is rounded to the activations' type before the multiplication with the weight, or with `rounds_last` after
    it. `x` and `out` may be the same.
    """

    x: Rows
    weight: Tensor
    out: Rows
    eps: float
    bias: Tensor | None = None
    delta: Rows | None = None
    rounds_last: bool = False


@dataclass(frozen=True, eq=False)
class Projection:
    """out = x Wᵀ + b."""

    weight: PackedWeight
    bias: Tensor | None
    out: Rows


@dataclass(frozen=True, eq=False)
class Project:
    """The same rows times several weights. `widens`: x is taken as float32, and no weight is rounded."""

    x: Rows
    projections: tuple[Projection, ...]
    widens: bool = False


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


Scoring = Literal["softmax", "sigmoid", "chosen", "apart", "mixer"]


@dataclass(frozen=True, eq=False)
class Route:
    """Each token's experts and their weights, in float32, the first choice first. Every token has `k` of them.

    The scores are x Wᵀ + b. By `scoring`,

        softmax  the k largest probabilities over all experts (Shazeer et al. 2017)
        sigmoid  sigmoid scores; `correction` takes part in the choice, not in the weights (DeepSeek-V3)
        chosen   the k largest scores, and a softmax over those alone (gpt-oss)
        apart    the k largest scores, and the sigmoid of each (Llama 4)
        mixer    the best, then the best of the others; each weighted by a softmax over the candidates within a
                 relative distance of `2 × jitter` of it (Liu et al. 2024, "GRIN: GRadient-INformed MoE")

    Attributes:
        num_groups, num_kept: experts are in groups of equal size, of which the best `num_kept` are taken. A group
            counts as its largest score, with `sigmoid` as the sum of its two largest.
        normalises: the weights are divided by their sum + `sum_eps`.
        scaling: multiplies the weights at the end.
        factors: of each expert, `[experts]`, multiply its weights at the end (Gemma 4).
    """

    x: Rows
    weight: PackedWeight
    layer_id: int
    k: int
    scoring: Scoring = "softmax"
    bias: Tensor | None = None
    correction: Tensor | None = None
    num_groups: int = 1
    num_kept: int = 1
    normalises: bool = False
    sum_eps: float = 0.0
    scaling: float = 1.0
    jitter: float = 0.0
    factors: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Mix:
    """out = Σₖ gate weight × expert(x), each expert a gated MLP, with the routing of the last `Route`.

    `weighs`: whether there is a gate weight; see `WeighInput`.
    """

    x: Rows
    experts: ExpertTable
    out: Rows
    activation: Activation = SWIGLU
    weighs: bool = True


@dataclass(frozen=True, eq=False)
class WeighInput:
    """out = x × the gate weight of the token's only expert, by the last `Route` (Llama 4)."""

    x: Rows
    out: Rows


@dataclass(frozen=True, eq=False)
class SwiGlu:
    """out = silu(gate) × up (Shazeer 2020), or as another `Activation` says."""

    gate: Rows
    up: Rows
    out: Rows
    activation: Activation = SWIGLU


@dataclass(frozen=True, eq=False)
class Gelu:
    """x = gelu(x) with the tanh approximation (Hendrycks & Gimpel 2016)."""

    x: Rows


@dataclass(frozen=True, eq=False)
class Clamp:
    """x is kept within ±limit."""

    x: Rows
    limit: float


@dataclass(frozen=True, eq=False)
class Scale:
    """x ×= factor; with `rounds_factor` the factor is rounded to the activations' type before."""

    x: Rows
    factor: float
    rounds_factor: bool = False


@dataclass(frozen=True, eq=False)
class ScaleByPosition:
    """x ×= 1 + beta × ln(1 + ⌊(position + offset) / length⌋): attention that stays sharp in long contexts.

    Nakanishi 2025, "Scalable-Softmax Is Superior for Attention"; the logarithm with its steps is Llama 4's.
    """

    x: Rows
    beta: float
    length: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class ScaleHeads:
    """x ×= slope × ln(position + 1) + bias, with a slope and a bias for each of the equal parts of a row.

    Nakanishi 2025, "Scalable-Softmax Is Superior for Attention".

    Attributes:
        slopes, biases: `[heads]`.
    """

    x: Rows
    slopes: Tensor
    biases: Tensor


@dataclass(frozen=True, eq=False)
class ScaleBySigmoid:
    """x ×= sigmoid(gate): one factor for each of as many equal parts of a row as the gate has columns."""

    x: Rows
    gate: Rows


@dataclass(frozen=True, eq=False)
class Split:
    """Columns in equal groups become buffers of one part each: all queries, all keys, …

        x         group 0: part 0, part 1, …  |  group 1: part 0, part 1, …  |  …
        outs[i]   part i of group 0, part i of group 1, …

    Attributes:
        outs: none of them in x's buffer. A part is as wide as its `out` divided by `num_groups`; together they are as
            wide as x.
    """

    x: Rows
    num_groups: int
    outs: tuple[Rows, ...]


@dataclass(frozen=True, eq=False)
class Convolve:
    """Causal depthwise convolution along each sequence, and a SiLU: with w the weight, of n columns,

        out[t] = silu(w[:, 0] × x[t - n + 1] + w[:, 1] × x[t - n + 2] + … + w[:, n - 1] × x[t] + bias)

    in float32, in this order. Rows from before the step's tokens are in the layer's `LayerState.convolution`; those
    from before the sequence are 0. Which state a sequence starts from and leaves is said by its `SequenceState`.

    Attributes:
        x, out: `[tokens, channels]`, in different buffers.
        weight: `[channels, n]`.
        bias: `[channels]`; None: 0.
        before, behind: `[tokens, channels]`, what x and the result are multiplied by; None: nothing. The state holds
            the product.
        activates: whether there is a SiLU.
    """

    x: Rows
    weight: Tensor
    out: Rows
    layer_id: int
    bias: Tensor | None = None
    before: Rows | None = None
    behind: Rows | None = None
    activates: bool = True


@dataclass(frozen=True, eq=False)
class DeltaRule:
    """The gated delta rule (Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule").

    Each value head h has a matrix S `[key_dim, value_dim]` per sequence, in the layer's `LayerState.recurrent`. It
    reads query and key of head h // (num_value_heads / num_key_heads). Token by token, all in float32,

        q = query / √(Σ query² + 1e-6) / √key_dim        k = key / √(Σ key² + 1e-6)
        S = exp(-exp(log_rate) × softplus(decay + decay_bias)) × S
        S = S + k ⊗ (sigmoid(strength) × (value - Sᵀk))
        out = Sᵀq

    so that neither the step that a token came in nor its neighbours matter. softplus(x) = log(1 + exp(x)), for x > 20
    it is x. Which state a sequence starts from and leaves is said by its `SequenceState`.

    With a decay for each row of S it is Kimi Delta Attention (Kimi Team 2025, "Kimi Linear: An Expressive, Efficient
    Attention Architecture").

    Attributes:
        query, key: `[tokens, num_key_heads × key_dim]`.
        value, out: `[tokens, num_value_heads × value_dim]`; out is in no buffer that the instruction reads.
        decay: `[tokens, num_value_heads]`, or `[tokens, num_value_heads × key_dim]`.
        strength: `[tokens, num_value_heads]`.
        log_rate: float32 `[num_value_heads]`.
        decay_bias: float32, as wide as decay.
        bound: S is multiplied by exp(bound × sigmoid(exp(log_rate) × (decay + decay_bias))) instead; None: as above.
    """

    query: Rows
    key: Rows
    value: Rows
    decay: Rows
    strength: Rows
    out: Rows
    layer_id: int
    num_key_heads: int
    num_value_heads: int
    log_rate: Tensor
    decay_bias: Tensor
    bound: float | None = None

    @property
    def key_dim(self) -> int:
        return self.key.width // self.num_key_heads

    @property
    def value_dim(self) -> int:
        return self.value.width // self.num_value_heads


@dataclass(frozen=True, eq=False)
class ScanStates:
    """The state space of Mamba-2 (Dao & Gu 2024, "Transformers are SSMs").

    Each head h has a matrix S `[state_dim, head_dim]` per sequence, in the layer's `LayerState.recurrent`. It reads B
    and C of group h // (num_heads / num_groups). Token by token, all in float32,

        dt = softplus(step + step_bias), within `limits`
        S = exp(-exp(log_rate) × dt) × S + B ⊗ (dt × x)
        out = SᵀC + skip × x

    with the softplus and the states of `DeltaRule`.

    Attributes:
        write, read: B and C, `[tokens, num_groups × state_dim]`.
        x, out: `[tokens, num_heads × head_dim]`; out is in no buffer that the instruction reads.
        step: `[tokens, num_heads]`.
        log_rate, step_bias, skip: float32 `[num_heads]`.
        limits: the least and the largest dt.
    """

    write: Rows
    read: Rows
    x: Rows
    step: Rows
    out: Rows
    layer_id: int
    num_groups: int
    num_heads: int
    log_rate: Tensor
    step_bias: Tensor
    skip: Tensor
    limits: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Add:
    """x += y."""

    x: Rows
    y: Rows


@dataclass(frozen=True, eq=False)
class Call:
    """outputs = function(*inputs, step): a block that no instruction fits, in torch.

    A row of the result must have the same bits whatever rows stand beside it (the reference's operators say how).

    Attributes:
        function: takes a tensor `[tokens, width]` per input, and the step; returns one per output.
    """

    function: Callable[..., Sequence[Tensor]]
    inputs: tuple[Rows, ...]
    outputs: tuple[Rows, ...]


@dataclass(frozen=True, eq=False)
class Head:
    """The step's result: float32 logits `[rows, vocabulary]` of the rows that are wanted.

    They are multiplied by `scale`; with a `softcap` they then become `softcap × tanh(logit / softcap)`.
    """

    x: Rows
    weight: PackedWeight
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None


Instruction = (
    Embed
    | Normalize
    | Project
    | Attend
    | AttendLatent
    | KeepIndexKey
    | Choose
    | Route
    | Mix
    | WeighInput
    | SwiGlu
    | Gelu
    | Clamp
    | Scale
    | ScaleByPosition
    | ScaleBySigmoid
    | ScaleHeads
    | Split
    | Convolve
    | DeltaRule
    | ScanStates
    | Add
    | Call
    | Head
)


@dataclass(frozen=True, eq=False)
class Program:
    """A model with one weight version; made once, run at every step.

    Attributes:
        instructions: in order; the last one is the head.
    """

    instructions: tuple[Instruction, ...]

    @cached_property
    def head(self) -> Head:
        head = self.instructions[-1]
        assert isinstance(head, Head)
        return head

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        return tuple(one for one in self.instructions if isinstance(one, Route))

    @cached_property
    def buffers(self) -> Mapping[str, tuple[int, bool]]:
        """Name → elements per token, and whether they are float32 whatever the activations are."""
        found: dict[str, tuple[int, bool]] = {}
        for instruction in self.instructions:
            for rows in rows_of(instruction):
                stride, is_wide = found.get(rows.buffer, (0, rows.is_wide))
                assert is_wide == rows.is_wide, rows
                found[rows.buffer] = max(stride, rows.stride), is_wide
        return found


def rows_of(instruction: Instruction) -> list[Rows]:
    """All rows that an instruction reads or leaves."""
    found: list[Rows] = []
    for value in vars(instruction).values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Rows):
                found.append(item)
            elif isinstance(item, Projection):
                found.append(item.out)
    return found


class Emitter:
    """What blocks emit their instructions to.

    Args:
        ropes: whatever rotations are told apart by, in the order of the tables that steps are run with.

    Attributes:
        layer_id: the layer whose blocks are emitting.
    """

    def __init__(self, ropes: Sequence[object] = ()) -> None:
        self._instructions: list[Instruction] = []
        self._ropes = tuple(ropes)
        self.layer_id = 0

    def rope(self, rope: object | None) -> int | None:
        """Index of a rotation; None for none."""
        return None if rope is None else self._ropes.index(rope)

    def rows(self, buffer: str, width: int, *, is_wide: bool = False) -> Rows:
        """A whole buffer of this width. The name is shared by all blocks, and so is what the buffer holds."""
        return Rows(buffer, width, 0, width, is_wide)

    def add(self, *instructions: Instruction) -> None:
        self._instructions += instructions

    def project(self, x: Rows, *projections: tuple[PackedWeight, Tensor | None, str]) -> tuple[Rows, ...]:
        """The same rows times several weights with their biases, each into a buffer as wide as the weight has rows."""
        outs = tuple(self.rows(buffer, weight.shape[0]) for weight, _, buffer in projections)
        parts = tuple(Projection(w, bias, out) for (w, bias, _), out in zip(projections, outs, strict=True))
        self.add(Project(x, parts))
        return outs

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """What has been added so far."""
        return tuple(self._instructions)

    def finish(self) -> Program:
        return Program(self.instructions)
