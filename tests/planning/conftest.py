"""The demo model's first two layers, and what planning needs of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.evaluation.texts import Document, Sample, sample_of
from amalgam.formats.grid import QuantizeOptions
from amalgam.planning.problem import Problem, problem_of
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO, made_once

SOURCES = {"int3": QuantizeOptions(128), "int4": QuantizeOptions(32), "int8": QuantizeOptions(128)}
LINES = (
    "The captain looked at the sea, and the wind was cold in the morning.",
    "def main(argv):\n    return [len(item) for item in argv]",
    "She said that she had never seen the old house on the hill before.",
    "import os\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path",
)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and a checkpoint in each precision."""
    return made_once(tmp_path_factory, "small", make_small)


def make_small(folder: Path) -> None:
    base = folder / "base"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, base / name)
    config = json.loads((DEMO / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    tensors = load_file(DEMO / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < 2}
    save_file(kept, base / "model.safetensors")
    for name, options in SOURCES.items():
        quantize_checkpoint(str(base), folder / name, name, options)


@pytest.fixture(scope="session")
def loader(small: Path) -> ModelLoader:
    mixed = MixedPrecisionSettings(sources={name: str(small / name) for name in SOURCES})
    model = ModelSettings(base_path=str(small / "base"), mixed_precision=mixed)
    return ModelLoader(model, InferenceSettings(dtype="float32"), torch.device("cpu"), 1)


@pytest.fixture(scope="session")
def problem(loader: ModelLoader) -> Problem:
    return problem_of(loader)


def texts(count: int, first: int = 0) -> list[str]:
    return [f"{number}. {LINES[number % len(LINES)]}" for number in range(first, first + count)]


@pytest.fixture(scope="session")
def sample(small: Path) -> Sample:
    documents = [Document("mixed", text) for text in texts(32)]
    return sample_of(documents, Tokenizer.load(small / "base"), window=64)
