"""Which precision each projection of each expert has, and on which device each expert lies.

In: a weight version. Out: a `PrecisionMap` on the grid of the statistics. Must never know: counts.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amalgam.models.weights import WeightVersion

PROJECTIONS = ("gate", "up", "down")
CLEARLY = 0.75  # of the bits that something is compared with


@dataclass(frozen=True)
class PrecisionMap:
    """Nested lists are [layers][experts][projections]; empty names and 0 bytes where there is no such weight."""

    layer_ids: tuple[int, ...]
    num_experts: int
    names: list[list[list[str]]]  # logical names, to be used in a mapping
    formats: list[list[list[str]]]
    sources: list[list[list[str]]]
    devices: list[list[str | None]]  # [layers][experts]; None: with the rest of the model
    nbytes: npt.NDArray[np.int64]  # [layers, experts, projections]
    bits: npt.NDArray[np.float64]  # [layers, experts], per parameter, scales included

    @property
    def wide_bits(self) -> float:
        """Bits of the widest expert."""
        return float(self.bits.max(initial=0))

    @property
    def narrow_bits(self) -> float:
        """Bits of the narrowest expert."""
        return float(self.bits.min(initial=self.wide_bits, where=self.bits > 0))

    @property
    def is_narrow(self) -> npt.NDArray[np.bool_]:
        """Which experts are clearly narrower than the widest, [layers, experts]."""
        return (self.bits > 0) & (self.bits < CLEARLY * self.wide_bits)

    @property
    def is_wide(self) -> npt.NDArray[np.bool_]:
        """Which experts are clearly wider than the narrowest, [layers, experts]; of three widths, one can be both."""
        return CLEARLY * self.bits > self.narrow_bits

    def bytes_by_format(self) -> dict[str, int]:
        """Bytes of the experts in each format, the largest first."""
        result: dict[str, int] = {}
        flat = (name for layer in self.formats for expert in layer for name in expert)
        for name, size in zip(flat, self.nbytes.reshape(-1).tolist(), strict=True):
            if name:
                result[name] = result.get(name, 0) + size
        return dict(sorted(result.items(), key=lambda item: -item[1]))

    def activations_by_format(self, counts: npt.NDArray[np.integer]) -> dict[tuple[str, str], int]:
        """(projection, format) → the sum of `counts`, [layers, experts], over the experts that have it."""
        result: Counter[tuple[str, str]] = Counter()
        for formats, row in zip(self.formats, counts.tolist(), strict=True):
            for expert, count in zip(formats, row, strict=True):
                for pair in zip(PROJECTIONS, expert, strict=True):
                    result[pair] += count
        return {pair: result[pair] for pair in sorted(result) if pair[1]}

    def as_json(self) -> dict[str, Any]:
        return {
            "layer_ids": list(self.layer_ids),
            "num_experts": self.num_experts,
            "projections": list(PROJECTIONS),
            "names": self.names,
            "formats": self.formats,
            "sources": self.sources,
            "devices": self.devices,
            "bytes": self.nbytes.tolist(),
            "bits": self.bits.tolist(),
            "wide_bits": self.wide_bits,
            "narrow_bits": self.narrow_bits,
            "is_narrow": self.is_narrow.tolist(),
            "is_wide": self.is_wide.tolist(),
            "bytes_by_format": self.bytes_by_format(),
        }


_maps: weakref.WeakKeyDictionary[WeightVersion, PrecisionMap] = weakref.WeakKeyDictionary()  # versions never change


def precision_map(version: WeightVersion, layer_ids: Sequence[int], num_experts: int) -> PrecisionMap:
    """The map of a version; quick when asked again."""
    if version not in _maps:
        _maps[version] = _build(version, tuple(layer_ids), num_experts)
    return _maps[version]


def _build(version: WeightVersion, layer_ids: tuple[int, ...], num_experts: int) -> PrecisionMap:
    def column(layer_id: int, expert_id: int, field: str) -> list[str]:
        slots = (f"layers.{layer_id}.mlp.experts.{expert_id}.{projection}" for projection in PROJECTIONS)
        return [getattr(version.origins[slot], field) if slot in version.origins else "" for slot in slots]

    def names(field: str) -> list[list[list[str]]]:
        return [[column(layer, expert, field) for expert in range(num_experts)] for layer in layer_ids]

    nbytes = np.zeros((len(layer_ids), num_experts, len(PROJECTIONS)), np.int64)
    num_parameters = np.zeros_like(nbytes)
    for row, layer_id in enumerate(layer_ids):
        for expert_id in range(num_experts):
            for part, projection in enumerate(PROJECTIONS):
                slot = f"layers.{layer_id}.mlp.experts.{expert_id}.{projection}"
                origin = version.origins.get(slot)
                if origin is not None:
                    nbytes[row, expert_id, part] = version[slot].nbytes
                    num_parameters[row, expert_id, part] = math.prod(origin.shape)
    devices = [
        [version.devices.get(f"layers.{layer}.mlp.experts.{expert}.down") for expert in range(num_experts)]
        for layer in layer_ids
    ]
    bits = 8 * nbytes.sum(axis=-1) / np.maximum(num_parameters.sum(axis=-1), 1)
    return PrecisionMap(layer_ids, num_experts, names("name"), names("format"), names("source"), devices, nbytes, bits)
