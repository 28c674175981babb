"""Rotary position embeddings: frequencies of each variant, tables of cosines and sines.

In: a config.json's rope settings. Out: a `Rope`, comparable and hashable, and its tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from amalgam.models.spec import ConfigReader


@dataclass(frozen=True)
class Rope:
    """One rotary embedding (Su et al. 2021).

    Attributes:
        theta: base of the geometric series of frequencies.
        rotary_dim: how many dimensions of each head turn; even.
        kind: default, linear (all frequencies divided) or llama3 (low ones divided, a smooth passage between).
        parameters: what the kind needs, as sorted (key, value) pairs.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    parameters: tuple[tuple[str, float], ...] = ()

    def inverse_frequencies(self) -> Tensor:
        """float32 `[rotary_dim / 2]` on the CPU, computed as the Hugging Face classes do."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
        frequencies = 1.0 / (self.theta**exponents)
        parameters = dict(self.parameters)
        if self.kind == "linear":
            return frequencies / parameters["factor"]
        if self.kind == "llama3":
            return _llama3(frequencies, parameters)
        return frequencies

    def tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 `[num_positions, rotary_dim / 2]`."""
        angles = torch.outer(torch.arange(num_positions).float(), self.inverse_frequencies())
        return angles.cos().to(device), angles.sin().to(device)


def _llama3(frequencies: Tensor, parameters: dict[str, float]) -> Tensor:
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    slowed = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    is_between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(is_between, between, slowed)


_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(config: ConfigReader, head_dim: int, default_theta: float) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    Raises:
        UnsupportedError: an unknown rope type or a missing parameter.
    """
    settings = {**config.mapping("rope_scaling"), **config.mapping("rope_parameters")}
    kind = settings.get("rope_type", settings.get("type")) or "default"
    if kind not in _PARAMETERS:
        config.refuse("rope_type", kind, ", ".join(_PARAMETERS))
    theta = settings.get("rope_theta")
    fraction = settings.get("partial_rotary_factor", config.float("partial_rotary_factor", default=1.0))
    parameters = []
    for key in _PARAMETERS[kind]:
        value = settings.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            config.refuse(f"rope {key}", value, f"a number above 0 for rope type {kind}")
        parameters.append((key, float(value)))
    rotary_dim = int(head_dim * fraction)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        config.refuse("partial_rotary_factor", fraction, f"an even share of head_dim {head_dim}")
    return Rope(
        float(theta) if theta is not None else config.float("rope_theta", default=default_theta),
        rotary_dim,
        kind,
        tuple(sorted(parameters)),
    )
