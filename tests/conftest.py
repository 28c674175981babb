"""What tests of several packages share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.formats.grid import QuantizeOptions

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"

CONFIG = """
model:
  name: demo
  base_path: {demo}
  mixed_precision:
    fp8_path: {derived}/fp8
    int4_path: {derived}/int4
    weight_mapping:
      "model.layers.*.mlp.experts.*": int4
      "model.layers.*.mlp.experts.{{0-3}}.*": fp8
      "model.layers.0.mlp.experts.0.down_proj.weight": base
"""


def pytest_configure() -> None:
    """The same everywhere: one thread computes, since several processes share the cores, and no terminal has a size."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads compute."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def derived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo model's fp8 and int4 checkpoints."""
    folder = tmp_path_factory.mktemp("derived")
    quantize_checkpoint(str(DEMO), folder / "fp8", "fp8", QuantizeOptions(scale="block"))
    quantize_checkpoint(str(DEMO), folder / "int4", "int4", QuantizeOptions())
    return folder


@pytest.fixture
def demo_config(derived: Path, tmp_path: Path) -> Path:
    """A configuration that maps the demo model across bf16, fp8 and int4."""
    path = tmp_path / "model_config.yaml"
    path.write_text(CONFIG.format(demo=DEMO, derived=derived))
    return path
