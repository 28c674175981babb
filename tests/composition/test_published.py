"""What is made loads in transformers with compressed-tensors, and gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.composition.quantize import make_checkpoint
from amalgam.composition.quantizing.recipe import Recipe
from amalgam.formats.grid import QuantizeOptions
from amalgam.models.registry import all_families
from tests.errors import raises
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny

FAMILIES = {family.name: family for family in all_families()}
PROMPT = list(range(3, 40))
EXACT = [
    Recipe("int4", QuantizeOptions(group_size=32)),
    Recipe("int4", QuantizeOptions(scale="channel"), "search"),
    Recipe("int3", QuantizeOptions(group_size=32)),
    Recipe("int2", QuantizeOptions(group_size=32)),
    Recipe("int8"),
    Recipe("int8", QuantizeOptions(has_zero_points=True)),
    Recipe("int8-packed", QuantizeOptions(group_size=32)),
    Recipe("fp8", QuantizeOptions(scale="tensor")),
]
# transformers computes with rounded activations where they are declared; here they stay as they are.
ROUNDED = [Recipe("int8", activations="dynamic"), Recipe("fp8", activations="dynamic")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    save_tiny(FAMILIES["llama"], folder, torch.bfloat16)
    return folder


def name_of(recipe: Recipe) -> str:
    return f"{recipe.format_name}-{recipe.options.scale}-{recipe.options.has_zero_points}-{recipe.activations}"


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("recipe", [*EXACT, *ROUNDED], ids=name_of)
def test_transformers_gives_the_same_logits(recipe: Recipe, wide: Path, tmp_path: Path) -> None:
    make_checkpoint(str(wide), tmp_path / "out", recipe)
    with torch.inference_mode():
        theirs = load(tmp_path / "out")(torch.tensor([PROMPT])).logits[0].float()
    ours = Runner(*load_model(tmp_path / "out")).step({0: PROMPT})[0]
    assert float((ours - theirs).norm() / theirs.norm()) < (1e-5 if recipe.activations is None else 0.1)


def test_what_it_would_misread_it_refuses(wide: Path, tmp_path: Path) -> None:
    make_checkpoint(str(wide), tmp_path / "out", Recipe("fp8-e5m2"))
    with raises(ValueError, "float-quantized-e5m2"):
        load(tmp_path / "out")
    Runner(*load_model(tmp_path / "out")).step({0: PROMPT})
