"""A whole model of mixed precision on the Triton backend, and a re-map of it, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.placement import Rule
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.backends import choose_backend, why_no_triton
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.program import Attend, Program, Route
from amalgam.models.decoder import Decoder, emit
from amalgam.models.weights import WeightVersion
from tests.models.harness import Runner, like

pytest.importorskip("triton")

from amalgam.kernels.backends.triton import routing
from amalgam.kernels.backends.triton.backend import TritonBackend
from amalgam.kernels.backends.triton.operators import who_runs, why_not_recorded
from tests.kernels.triton.backend import Repeater, loading, save_random

CPU = torch.device("cpu")
EXPERTS = "model.layers.*.mlp.experts.*"
BEFORE = (
    Rule(pattern=EXPERTS, source="int4"),
    Rule(pattern="model.layers.*.mlp.experts.{0-2}.*", source="fp8"),
    Rule(pattern="model.layers.0.mlp.experts.1.down_proj.weight", source="base"),
)
AFTER = (
    Rule(pattern=EXPERTS, source="fp8"),
    Rule(pattern="model.layers.*.mlp.experts.{1-3}.*", source="int4"),
    Rule(pattern="model.layers.0.mlp.experts.0.down_proj.weight", source="base"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_random("qwen3_moe", folder / "base", torch.bfloat16)
    for name in ("int4", "fp8"):
        options = QuantizeOptions(group_size=32) if name == "int4" else QuantizeOptions()
        quantize_checkpoint(str(folder / "base"), folder / name, name, options)
    return folder


@pytest.fixture(scope="module")
def loader(folder: Path) -> ModelLoader:
    """Loads weights for the Triton backend."""
    sources = {name: str(folder / name) for name in ("int4", "fp8")}
    mixed = MixedPrecisionSettings(sources=sources, weight_mapping={rule.pattern: rule.source for rule in BEFORE})
    settings = ModelSettings(base_path=str(folder / "base"), mixed_precision=mixed)
    with loading():
        return ModelLoader(settings, InferenceSettings(), CPU, threads=1)


@pytest.fixture(scope="module")
def versions(loader: ModelLoader) -> tuple[WeightVersion, WeightVersion]:
    """Before and after a re-map."""
    version = loader.build(loader.plan(), 1).version
    return version, loader.build(loader.plan(AFTER), 2, version).version


def logits_of(decoder: Decoder, version: WeightVersion) -> Tensor:
    """A prompt, and the rest of it beside another one."""
    prompt = torch.randint(3, 250, (5,), generator=torch.Generator().manual_seed(2)).tolist()
    runner = Runner(decoder, version, num_sequences=2)
    parts = [runner.step({0: prompt[:3]}), runner.step({0: prompt[3:], 1: prompt[:2]})]
    return torch.cat([logits for step in parts for logits in step.values()])


def worst(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the logits' spread."""
    return float((logits - expected).abs().max() / expected.std())


def test_model_and_remap(loader: ModelLoader, versions: tuple[WeightVersion, WeightVersion]) -> None:
    """In float32 the sums' order is all that differs. In bfloat16 both are about as far from that."""
    version, other = versions
    narrow = Decoder(loader.spec, 64, torch.bfloat16, CPU, TritonBackend)
    wide = Decoder(loader.spec, 64, torch.float32, CPU, TritonBackend)
    assert worst(logits_of(wide, other), logits_of(like(wide, ReferenceBackend), other)) < 2e-5
    exact = logits_of(like(wide, ReferenceBackend), version)
    theirs = worst(logits_of(like(narrow, ReferenceBackend), version), exact)
    assert worst(logits_of(narrow, version), exact) < 1.5 * theirs


def test_what_ran_is_said(loader: ModelLoader, versions: tuple[WeightVersion, WeightVersion]) -> None:
    said = Decoder(loader.spec, 64, torch.bfloat16, CPU, TritonBackend).compile(versions[0]).describe()
    assert {said[name] for name in ("embed", "normalize", "project", "attend", "route", "mix", "head")} == {
        "triton (cpu)"
    }


def test_experts_are_chosen_by_the_kernel(
    loader: ModelLoader, versions: tuple[WeightVersion, WeightVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, chosen = Decoder(loader.spec, 64, torch.bfloat16, CPU, TritonBackend), []
    original = routing.choose_experts

    def choose_experts(scores: Tensor, one: Route) -> tuple[Tensor, Tensor]:
        chosen.append(scores.shape)
        return original(scores, one)

    monkeypatch.setattr(routing, "choose_experts", choose_experts)
    Runner(decoder, versions[0], num_sequences=1).step({0: [5, 6]})
    program = emit(loader.spec, versions[0], decoder.ropes)
    assert chosen == [(2, one.weight.shape[0]) for one in program.instructions if isinstance(one, Route)]


def test_heads_that_attention_does_not_take_are_not_recorded(
    loader: ModelLoader, versions: tuple[WeightVersion, WeightVersion]
) -> None:
    backend = TritonBackend(torch.bfloat16, CPU, Repeater())
    decoder = Decoder(loader.spec, 64, torch.bfloat16, CPU, lambda dtype, device: backend)
    program = backend.ready(emit(loader.spec, versions[0], decoder.ropes))
    assert why_not_recorded(program, torch.bfloat16) is None
    wide = [
        replace(one, value=replace(one.value, width=one.num_kv_heads * 513)) if isinstance(one, Attend) else one
        for one in program.instructions
    ]
    assert why_not_recorded(Program(tuple(wide)), torch.bfloat16) is not None
    assert {who_runs(one, torch.bfloat16, CPU) for one in wide if isinstance(one, Attend)} == {"torch (cpu)"}


def test_who_is_chosen() -> None:
    assert why_no_triton(CPU) is not None
    assert not isinstance(choose_backend(torch.bfloat16, CPU), TritonBackend)
