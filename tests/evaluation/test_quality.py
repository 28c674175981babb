"""Divergence, perplexity and agreement of the demo model, against their definitions computed in one piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.errors import CheckpointError
from amalgam.evaluation import quality, running
from amalgam.evaluation.quality import Reference, by_domain, remarks, summarise
from amalgam.evaluation.running import open_contestant, step_context
from amalgam.evaluation.texts import Document, Sample, Window, sample_of
from amalgam.kernels.weights import PackedWeight
from amalgam.models.weights import WeightVersion
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO
from tests.errors import raises

CPU = torch.device("cpu")
TEXT = "The captain looked at the sea, and the wind was cold. "


@pytest.fixture(scope="module")
def sample() -> Sample:
    documents = [Document("sea", f"{number} {TEXT}") for number in range(24)]
    documents.append(Document("code", "def main(argv):\n    return len(argv)\n" * 40))
    return sample_of(documents, Tokenizer.load(DEMO), window=24)


@pytest.fixture(scope="module")
def compared(derived: Path, sample: Sample) -> tuple[Reference, running.Contestant]:
    mixed = MixedPrecisionSettings(sources={"int4": str(derived / "int4")})
    model = ModelSettings(base_path=str(DEMO), mixed_precision=mixed)
    loader = ModelLoader(model, InferenceSettings(dtype="float32"), CPU, 1)
    base = open_contestant("base", loader, loader.plan(), torch.float32, 64)
    rules = loader.uniform("int4")
    return Reference(base, sample), base.with_plan("int4", loader.plan(rules))


def test_figures_are_those_of_the_whole_logits(
    compared: tuple[Reference, running.Contestant], sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, plan = compared
    monkeypatch.setattr(running, "STEP_TOKENS", 10**6)
    monkeypatch.setattr(quality, "rows_at_once", lambda vocab_size: 7)
    found = summarise(reference.figures(plan))
    base = reference.contestant
    logits = []
    with torch.inference_mode():
        for each in (base, plan):
            context = step_context(sample.windows, each.decoder, num_logits=64)
            logits.append(each.compiled.run(context).double().log_softmax(-1).clone())
    starts, targets = [], []
    row = 0
    for window in sample.windows:
        starts += range(row, row + len(window.token_ids) - 1)
        targets += window.token_ids[1:]
        row += len(window.token_ids)
    theirs, ours = (part[starts] for part in logits)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    assert found.divergence is not None and found.agreement is not None
    assert found.num_tokens == len(starts)
    assert abs(found.divergence.value - float(divergence.mean())) < 1e-6
    assert found.divergence.value > 1e-3
    assert found.agreement.value == float((theirs.argmax(-1) == ours.argmax(-1)).double().mean())
    loss = -ours[range(len(targets)), targets].mean()
    assert abs(found.perplexity.value / float(loss.exp()) - 1) < 1e-5


def test_a_plan_is_no_distance_from_itself(compared: tuple[Reference, running.Contestant]) -> None:
    reference, _ = compared
    found = summarise(reference.figures(reference.contestant))
    assert found.divergence is not None and found.divergence.value == 0
    assert found.agreement is not None and found.agreement.value == 1


def test_domains_are_told_apart(compared: tuple[Reference, running.Contestant], sample: Sample) -> None:
    reference, plan = compared
    figures = reference.figures(plan)
    domains = by_domain(figures, sample)
    assert list(domains) == ["sea", "code"]
    assert sum(item.num_tokens for item in domains.values()) == len(figures.loss)


def test_damaged_weights_are_told(compared: tuple[Reference, running.Contestant]) -> None:
    reference, plan = compared
    weights = {name: plan.version[name] for name in plan.version.origins}
    norm = weights["norm"]
    weights["norm"] = PackedWeight(norm.layout, norm.shape, {"weight": torch.full((256,), torch.nan)})
    version = WeightVersion(99, weights, plan.version.origins, plan.version.keys)
    with raises(CheckpointError, "sea"):
        reference.figures(running.Contestant("broken", plan.loader, plan.decoder, version))


def test_a_text_that_is_no_language_is_remarked(compared: tuple[Reference, running.Contestant]) -> None:
    """As the tokenizer of another model makes of any text."""
    reference, _ = compared
    generator = torch.Generator().manual_seed(0)
    windows = tuple(
        Window("noise", n, tuple(torch.randint(8192, (24,), generator=generator).tolist()), 1) for n in range(4)
    )
    noise = Reference(reference.contestant, Sample(windows, "windows"))
    found = remarks(summarise(noise.figures(), has_reference=False), noise.sample, 8192)
    assert len(found) == 2  # too few windows, and no language
