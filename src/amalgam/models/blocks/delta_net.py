"""Gated delta net: linear attention with a state instead of keys and values (Yang et al. 2024, "Gated Delta Networks:
Improving Mamba2 with Delta Rule"), as Qwen3-Next and Qwen3.5 have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amalgam.kernels.program import Convolve, DeltaRule, Emitter, Normalize, Rows, Split, SwiGlu
from amalgam.models.spec import Slot, StateShape
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class DeltaNet:
    """Queries, keys and values go through a short convolution and the gated delta rule; a norm and a gate follow.

    Attributes:
        kernel_size: rows that the convolution sees, the newest included.
        norm_eps: of the norm over what each value head gives.
        is_grouped: two projections give all that there is, in groups, one for each key head: query, key, values and
            gates of its value heads; strengths and decays of these (Qwen3-Next). Otherwise there are four: queries,
            keys and values, one kind after the other; gates; strengths; decays.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int
    norm_eps: float
    is_grouped: bool = False

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return 0, 0, 0

    @property
    def state_shape(self) -> StateShape:
        recurrent = self.num_value_heads, self.key_dim, self.value_dim
        return StateShape((self.kernel_size - 1, self._channels), recurrent)

    @property
    def rope(self) -> None:
        return None

    @property
    def _keys(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def _values(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def _channels(self) -> int:
        return 2 * self._keys + self._values

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        # Strengths and decays are to a state what a router is to experts: small, and what they decide stays decided.
        if self.is_grouped:
            yield Slot("qkvz", (self._channels + self._values, hidden_size), "linear_attention")
            yield Slot("ba", (2 * self.num_value_heads, hidden_size), "router")
        else:
            yield Slot("qkv", (self._channels, hidden_size), "linear_attention")
            yield Slot("z", (self._values, hidden_size), "linear_attention")
            yield Slot("b", (self.num_value_heads, hidden_size), "router")
            yield Slot("a", (self.num_value_heads, hidden_size), "router")
        yield Slot("convolution", (self._channels, 1, self.kernel_size), "convolution")
        yield Slot("log_rate", (self.num_value_heads,), "bias")
        yield Slot("decay_bias", (self.num_value_heads,), "bias")
        yield Slot("norm", (self.value_dim,), "norm")
        yield Slot("out", (hidden_size, self._values), "linear_attention")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        mixed, gate, strength, decay = self._project(step, x, weights)
        seen = step.rows("convolved", self._channels)
        recalled, gated = step.rows("recalled", self._values), step.rows("gated", self._values)
        step.add(
            Convolve(mixed, weights["convolution"].dense.flatten(1), seen, step.layer_id),
            DeltaRule(
                seen.columns(0, self._keys),
                seen.columns(self._keys, self._keys),
                seen.columns(2 * self._keys, self._values),
                decay,
                strength,
                recalled,
                layer_id=step.layer_id,
                num_key_heads=self.num_key_heads,
                num_value_heads=self.num_value_heads,
                log_rate=weights["log_rate"].dense.float(),
                decay_bias=weights["decay_bias"].dense.float(),
            ),
            Normalize(recalled, weights["norm"].dense, recalled, self.norm_eps),
            SwiGlu(gate, recalled, gated),
        )
        (delta,) = step.project(gated, (weights["out"], None, "delta"))
        return delta

    def _project(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, Rows, Rows, Rows]:
        """Where queries, keys and values of all heads will be, one kind after the other; gates; strengths; decays."""
        names = (("qkvz", "grouped"), ("ba", "rates")) if self.is_grouped else _APART
        rows = step.project(x, *((weights[name], None, buffer) for name, buffer in names))
        if not self.is_grouped:
            mixed, gate, strength, decay = rows
            return mixed, gate, strength, decay
        mixed, gate = step.rows("mixed", self._channels), step.rows("output_gate", self._values)
        strength, decay = (step.rows(name, self.num_value_heads) for name in ("strength", "decay"))
        query, key = mixed.columns(0, self._keys), mixed.columns(self._keys, self._keys)
        value = mixed.columns(2 * self._keys, self._values)
        step.add(
            Split(rows[0], self.num_key_heads, (query, key, value, gate)),
            Split(rows[1], self.num_key_heads, (strength, decay)),
        )
        return mixed, gate, strength, decay


_APART = ("qkv", "mixed"), ("z", "output_gate"), ("b", "strength"), ("a", "decay")
