"""Rotary position embeddings: frequencies of each variant, tables of cosines and sines.

In: sizes and factors. Out: a `Rope`, comparable and hashable, and its tables.
Must never know: requests. A table holds for every token of every request, whatever stands beside it in a step; where
the Hugging Face classes look at the longest sequence of the batch, we look at what the server was started with:

- *dynamic* changes nothing up to `max_position_embeddings`, and longer sequences are refused; so it equals the Hugging
  Face classes wherever it is used.
- *longrope* takes its long factors for all tokens if sequences above `original_max_position_embeddings` are served at
  all (`inference.max_seq_length`), else the short ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """A variant: a frozen dataclass of its parameters."""

    def __call__(self, rope: Rope, num_positions: int) -> tuple[Tensor, float]:
        """Frequencies float32 `[rotary_dim / 2]`, and what cosines and sines are multiplied by."""


@dataclass(frozen=True)
class Rope:
    """One rotary embedding (Su et al. 2021).

    Attributes:
        theta: base of the geometric series of frequencies.
        rotary_dim: how many dimensions of each head turn; even.
        scaling: None: the plain series.
    """

    theta: float
    rotary_dim: int
    scaling: Scaling | None = None

    def periods(self) -> Tensor:
        """Positions per radian without scaling, float32 `[rotary_dim / 2]`, computed as the Hugging Face classes do."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
        return torch.pow(self.theta, exponents)

    def tables(self, num_positions: int, device: torch.device, growth: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 `[num_positions, rotary_dim / 2]`.

        growth: `[rotary_dim / 2]`, whose exponentials multiply the frequencies.
        """
        frequencies, factor = 1.0 / self.periods(), 1.0
        if self.scaling is not None:
            frequencies, factor = self.scaling(self, num_positions)
        if growth is not None:
            frequencies = frequencies * growth.cpu().float().exp()
        angles = torch.outer(torch.arange(num_positions).float(), frequencies)
        return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


@dataclass(frozen=True)
class Linear:
    """All frequencies divided (Chen et al. 2023)."""

    factor: float

    def __call__(self, rope: Rope, num_positions: int) -> tuple[Tensor, float]:
        return 1.0 / rope.periods() / self.factor, 1.0


@dataclass(frozen=True)
class Llama3:
    """Low frequencies divided, high ones kept, a smooth passage between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: float

    def __call__(self, rope: Rope, num_positions: int) -> tuple[Tensor, float]:
        frequencies = 1.0 / rope.periods()
        wavelengths = 2 * math.pi / frequencies
        low, high, original = self.low_freq_factor, self.high_freq_factor, self.original_max_positions
        smooth = (original / wavelengths - low) / (high - low)
        between = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        slowed = torch.where(wavelengths > original / low, frequencies / self.factor, frequencies)
        is_between = (wavelengths <= original / low) & (wavelengths >= original / high)
        return torch.where(is_between, between, slowed), 1.0


@dataclass(frozen=True)
class Yarn:
    """Frequencies divided by a ramp over the dimensions, attention sharpened (Peng et al. 2023).

    A dimension that turns more than `beta_fast` times in the original length is kept, one that turns less than
    `beta_slow` times is divided by `factor`; `truncates` rounds the ends of the ramp to whole dimensions.
    """

    factor: float
    original_max_positions: float
    beta_fast: float
    beta_slow: float
    truncates: bool
    attention_factor: float

    def __call__(self, rope: Rope, num_positions: int) -> tuple[Tensor, float]:
        periods = rope.periods()
        low, high = self._dimension(rope, self.beta_fast), self._dimension(rope, self.beta_slow)
        if self.truncates:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.rotary_dim - 1)
        if low == high:
            high += 0.001
        kept = 1 - ((torch.arange(len(periods), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        frequencies = 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept
        return frequencies, self.attention_factor

    def _dimension(self, rope: Rope, turns: float) -> float:
        """The dimension, a fraction, that turns so many times in the original length."""
        ratio = self.original_max_positions / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(ratio) / (2 * math.log(rope.theta))


@dataclass(frozen=True)
class Proportional:
    """The first `num_turning` frequencies, divided by `factor`; the pairs of the others stand still (Gemma 4)."""

    num_turning: int
    factor: float

    def __call__(self, rope: Rope, num_positions: int) -> tuple[Tensor, float]:
        frequencies = 1.0 / rope.periods() / self.factor
        frequencies[self.num_turning :] = 0.0
        return frequencies, 1.0


@dataclass(frozen=True)
class LongRope:
    """A factor of its own for each frequency, one set for short and one for long contexts (Ding et al. 2024)."""

    original_max_positions: float
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    short_attention_factor: float
    long_attention_factor: float

    def __call__(self, rope: Rope, num_positions: int) -> tuple[Tensor, float]:
        is_long = num_positions > self.original_max_positions
        factors = torch.tensor(self.long_factors if is_long else self.short_factors, dtype=torch.float32)
        attention_factor = self.long_attention_factor if is_long else self.short_attention_factor
        return 1.0 / (factors * rope.periods()), attention_factor


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """How much YaRN sharpens attention: `0.1 × weight × ln(factor) + 1`."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
