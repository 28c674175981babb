"""Instructions that carry a state along each sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from amalgam.kernels.program.rows import Rows


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
