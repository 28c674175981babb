"""What the embedding and the head do to the output, by sensitivities and as it is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.evaluation.quality import Reference
from amalgam.evaluation.running import open_contestant
from amalgam.evaluation.texts import Sample
from amalgam.planning.problem import problem_of
from amalgam.planning.proof import Scale
from amalgam.planning.sensitivity import SensitivityStudy

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def noisy_loader(small: Path, folder: Path, *, is_tied: bool) -> ModelLoader:
    """The first two layers, and a source with an embedding and a head in float32 that are somewhat off."""
    base, noisy = folder / "base", folder / "noisy"
    shutil.copytree(small / "base", base)
    noisy.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": is_tied}
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    embedding = tensors[EMBEDDING]
    if not is_tied:
        tensors[HEAD] = embedding.clone()
        save_file(tensors, base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    names = [EMBEDDING] if is_tied else [EMBEDDING, HEAD]
    scale = 0.03 * embedding.float().std()
    noise = {name: embedding.float() + scale * torch.randn(embedding.shape, generator=generator) for name in names}
    save_file(noise, noisy / "model.safetensors")
    mixed = MixedPrecisionSettings(sources={"noisy": str(noisy)})
    model = ModelSettings(base_path=str(base), mixed_precision=mixed)
    return ModelLoader(model, InferenceSettings(dtype="float32"), torch.device("cpu"), 1)


@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_outside_of_the_layers_are_measured(small: Path, sample: Sample, tmp_path: Path, is_tied: bool) -> None:
    loader = noisy_loader(small, tmp_path, is_tied=is_tied)
    problem = problem_of(loader, compares=False)
    study = SensitivityStudy(loader, problem, sample, tmp_path / "kept", draws=8)
    found = study.measure()
    assert (
        {item.name for item in problem.items} == set(found.weights) == ({EMBEDDING} if is_tied else {EMBEDDING, HEAD})
    )
    assert study.cost().num_weights == 0 and study.measure() == found
    base = open_contestant("base", loader, loader.plan(()), torch.float32, 64)
    scale = Scale(problem, Reference(base, sample))
    uniform = problem.uniform("base")
    assert uniform is not None
    for row, item in enumerate(problem.items):
        options = found.weights[item.name].options
        assert options["base"].divergence == 0
        choice = list(uniform)
        choice[row] = item.index_of("noisy") or 0
        measured = scale.divergence(item.name, choice).value
        exact = item.name == HEAD
        assert (0.9 if exact else 0.5) < options["noisy"].divergence / measured < (1.1 if exact else 2.0), item.name
