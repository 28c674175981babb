"""Checkpoints of one tiny model, and what is read of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.composition.source import Source
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.weights import PackedWeight
from amalgam.models.families.qwen3_moe import FAMILY
from tests.models.tiny import save_tiny


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny model in bf16, fp8, int8 and int4."""
    root = tmp_path_factory.mktemp("originals")
    save_tiny(FAMILY, root / "bf16", dtype=torch.bfloat16)
    for name, options in (
        ("fp8", QuantizeOptions(scale="block")),
        ("int8", QuantizeOptions()),
        ("int4", QuantizeOptions(group_size=16)),
    ):
        quantize_checkpoint(str(root / "bf16"), root / name, name, options)
    return root


@pytest.fixture
def folders(originals: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(originals, tmp_path / "checkpoints"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights that have been read from a source."""
    names: list[str] = []
    load = Source.load

    def counted(self: Source, stored: Any, *arguments: Any) -> PackedWeight:
        names.append(stored.name)
        return load(self, stored, *arguments)

    monkeypatch.setattr(Source, "load", counted)
    return names
