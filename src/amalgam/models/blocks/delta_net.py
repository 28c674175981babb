"""Gated delta nets: linear attention with a state instead of keys and values (Yang et al. 2024, "Gated Delta Networks:
Improving Mamba2 with Delta Rule"), as Qwen3-Next and Qwen3.5 have it; and Kimi Delta Attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.kernels.program import Convolve, DeltaRule, Emitter, Normalize, Rows, ScaleBySigmoid, Split, SwiGlu
from amalgam.models.blocks.recurrent import RecurrentBlock
from amalgam.models.spec import Slot, StateShape
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class DeltaNet(RecurrentBlock):
    """Queries, keys and values go through a short convolution and the gated delta rule; a norm and a gate follow.

    Attributes:
        kernel_size: rows that the convolution sees, the newest included.
        norm_eps: of the norm over what each value head gives.
        has_grouped_values: one projection gives queries, keys, values and gates in groups, one for each key head
            (Qwen3-Next). Otherwise one gives queries, keys and values, one kind after the other, and one the gates.
        has_grouped_rates: likewise strengths and decays, otherwise from a projection for each.
        is_tiled: of all weights, the first value head of each key head, then the second of each, and so on (GGUF), not
            all value heads of the first key head, then those of the second.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int
    norm_eps: float
    has_grouped_values: bool = False
    has_grouped_rates: bool = False
    is_tiled: bool = False

    @property
    def state_shape(self) -> StateShape:
        recurrent = self.num_value_heads, self.key_dim, self.value_dim
        return StateShape((self.kernel_size - 1, self._channels), recurrent)

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
        if self.has_grouped_values:
            yield Slot("qkvz", (self._channels + self._values, hidden_size), "linear_attention")
        else:
            yield Slot("qkv", (self._channels, hidden_size), "linear_attention")
            yield Slot("z", (self._values, hidden_size), "linear_attention")
        if self.has_grouped_rates:
            yield Slot("ba", (2 * self.num_value_heads, hidden_size), "router")
        else:
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
        step.add(Convolve(mixed, weights["convolution"].dense.flatten(1), seen, step.layer_id))
        value = seen.columns(2 * self._keys, self._values)
        rule = DeltaRule(
            seen.columns(0, self._keys),
            seen.columns(self._keys, self._keys),
            self._by_key_head(step, value, "value_heads"),
            self._by_key_head(step, decay, "decay_heads"),
            self._by_key_head(step, strength, "strength_heads"),
            step.rows("recalled_heads", self._values) if self.is_tiled else recalled,
            layer_id=step.layer_id,
            num_key_heads=self.num_key_heads,
            num_value_heads=self.num_value_heads,
            log_rate=self._vector(weights["log_rate"].dense),
            decay_bias=self._vector(weights["decay_bias"].dense),
        )
        step.add(rule)
        if self.is_tiled:
            width = self._values // self._heads_per_key
            tiles = tuple(recalled.columns(start, width) for start in range(0, self._values, width))
            step.add(Split(rule.out, self.num_key_heads, tiles))
        step.add(
            Normalize(recalled, weights["norm"].dense, recalled, self.norm_eps),
            SwiGlu(gate, recalled, gated),
        )
        (delta,) = step.project(gated, (weights["out"], None, "delta"))
        return delta

    @property
    def _heads_per_key(self) -> int:
        return self.num_value_heads // self.num_key_heads

    def _by_key_head(self, step: Emitter, x: Rows, buffer: str) -> Rows:
        """What the value heads have, those of the first key head first."""
        if not self.is_tiled:
            return x
        out, width = step.rows(buffer, x.width), x.width // self.num_key_heads
        parts = tuple(out.columns(start, width) for start in range(0, x.width, width))
        step.add(Split(x, self._heads_per_key, parts))
        return out

    def _vector(self, tiled: Tensor) -> Tensor:
        """One number for each value head, likewise."""
        return tiled.float().view(self._heads_per_key, -1).t().flatten() if self.is_tiled else tiled.float()

    def _project(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, Rows, Rows, Rows]:
        """Where queries, keys and values of all heads will be, one kind after the other; gates; strengths; decays."""
        values = (("qkvz", "grouped_values"),) if self.has_grouped_values else (("qkv", "mixed"), ("z", "output_gate"))
        rates = (("ba", "grouped_rates"),) if self.has_grouped_rates else (("b", "strength"), ("a", "decay"))
        rows = step.project(x, *((weights[name], None, buffer) for name, buffer in (*values, *rates)))
        mixed, gate = step.rows("mixed", self._channels), step.rows("output_gate", self._values)
        strength, decay = (step.rows(name, self.num_value_heads) for name in ("strength", "decay"))
        if self.has_grouped_values:
            query, key = mixed.columns(0, self._keys), mixed.columns(self._keys, self._keys)
            value = mixed.columns(2 * self._keys, self._values)
            step.add(Split(rows[0], self.num_key_heads, (query, key, value, gate)))
        if self.has_grouped_rates:
            step.add(Split(rows[-1], self.num_key_heads, (strength, decay)))
        return mixed, gate, strength, decay


@dataclass(frozen=True)
class KimiDeltaNet(RecurrentBlock):
    """A delta net that forgets each row of its state at a rate of its own (Kimi Team 2025, "Kimi Linear: An Expressive,
    Efficient Attention Architecture"), as Ling 3 has it: full projections for rates and gates.

    Attributes:
        head_dim: of queries, keys and values.
        kernel_size: rows that the convolutions see, the newest included.
        norm_eps: of the norm over what each head gives, which is multiplied by the sigmoid of a gate.
        bound: see `DeltaRule`.
    """

    num_heads: int
    head_dim: int
    kernel_size: int
    norm_eps: float
    bound: float | None

    @property
    def state_shape(self) -> StateShape:
        recurrent = self.num_heads, self.head_dim, self.head_dim
        return StateShape((self.kernel_size - 1, 3 * self._width), recurrent)

    @property
    def _width(self) -> int:
        return self.num_heads * self.head_dim

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        # Ling's latent attention has projections of the same names, by which rules for a role go.
        for part in ("q", "k", "v", "f", "g"):
            yield Slot(part, (self._width, hidden_size), "attention")
        for part in ("q", "k", "v"):
            yield Slot(f"{part}_convolution", (self._width, 1, self.kernel_size), "convolution")
        yield Slot("b", (self.num_heads, hidden_size), "router")  # as in `DeltaNet`
        yield Slot("log_rate", (self.num_heads,), "bias")
        yield Slot("decay_bias", (self._width,), "bias")
        yield Slot("norm", (self.head_dim,), "norm")
        yield Slot("out", (hidden_size, self._width), "attention")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        width = self._width
        parts = (
            ("q", "query"),
            ("k", "key"),
            ("v", "value"),
            ("f", "row_decay"),
            ("g", "output_gate"),
            ("b", "strength"),
        )
        *mixed, decay, gate, strength = step.project(x, *((weights[name], None, buffer) for name, buffer in parts))
        seen, recalled = step.rows("convolved", 3 * width), step.rows("recalled", width)
        query, key, value = (seen.columns(index * width, width) for index in range(3))
        together = step.rows("mixed", 3 * width)
        kernels = torch.cat([weights[f"{part}_convolution"].dense.flatten(1) for part in ("q", "k", "v")])
        step.add(
            *(Split(part, 1, (together.columns(index * width, width),)) for index, part in enumerate(mixed)),
            Convolve(together, kernels, seen, step.layer_id),
            DeltaRule(
                query,
                key,
                value,
                decay,
                strength,
                recalled,
                layer_id=step.layer_id,
                num_key_heads=self.num_heads,
                num_value_heads=self.num_heads,
                log_rate=weights["log_rate"].dense.float(),
                decay_bias=weights["decay_bias"].dense.float(),
                bound=self.bound,
            ),
            Normalize(recalled, weights["norm"].dense, recalled, self.norm_eps, rounds_last=True),
            ScaleBySigmoid(recalled, gate),
        )
        (delta,) = step.project(recalled, (weights["out"], None, "delta"))
        return delta
