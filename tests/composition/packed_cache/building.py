"""A tiny model in four sources, built with a packed cache and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.models.weights import WeightVersion

CPU = torch.device("cpu")
SOURCES = ("fp8", "int8", "int4")
MAPPING = {f"model.layers.*.mlp.experts.{expert}.*": SOURCES[expert % 3] for expert in range(6)}


def loader(folders: Path, cache: Path | None, mapping: dict[str, str] | None = None, **inference: Any) -> ModelLoader:
    mixed = MixedPrecisionSettings(
        sources={name: str(folders / name) for name in SOURCES},
        weight_mapping=MAPPING if mapping is None else mapping,
    )
    settings = InferenceSettings(packed_cache="" if cache is None else str(cache), **inference)
    return ModelLoader(ModelSettings(base_path=str(folders / "bf16"), mixed_precision=mixed), settings, CPU, 2)


def build(folders: Path, cache: Path | None, **arguments: Any) -> WeightVersion:
    opened = loader(folders, cache, **arguments)
    return opened.build(opened.plan(), 1).version


def assert_same(found: WeightVersion, expected: WeightVersion) -> None:
    """The same layouts and the same bits."""
    assert found.keys == expected.keys
    for slot in expected.origins:
        one, other = found[slot], expected[slot]
        assert (one.layout, one.shape, one.block) == (other.layout, other.shape, other.block), slot
        assert one.parts.keys() == other.parts.keys()
        for name, part in other.parts.items():
            assert one.parts[name].dtype == part.dtype and one.parts[name].shape == part.shape
            assert torch.equal(one.parts[name].reshape(-1).view(torch.uint8), part.reshape(-1).view(torch.uint8))
