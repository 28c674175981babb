"""A whole model of mixed precision on the Triton backend, and a re-map of it, against the reference."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.settings import InferenceSettings, MixedPrecisionSettings, ModelSettings, Rule
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.backends import choose_backend, why_no_triton
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.backends.split.experts import Splitter
from amalgam.kernels.program import Mix, Program
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.models.decoder import Decoder, emit
from amalgam.models.kv_cache import KVCache
from amalgam.models.registry import all_families
from amalgam.models.weights import WeightVersion
from tests.models.harness import Runner, like
from tests.models.tiny import save_tiny

pytest.importorskip("triton")

from amalgam.kernels.backends.triton.backend import TritonBackend
from amalgam.kernels.backends.triton.sharing import signature_of
from tests.kernels.triton.backend import Repeater, loading

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
    family = next(family for family in all_families() if family.name == "qwen3_moe")
    save_tiny(family, folder / "base", dtype=torch.bfloat16, num_hidden_layers=1)
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
    prompt = torch.randint(3, 250, (9,), generator=torch.Generator().manual_seed(2)).tolist()
    runner = Runner(decoder, version, num_sequences=2)
    parts = [runner.step({0: prompt[:6]}), runner.step({0: prompt[6:], 1: prompt[:5]})]
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


def test_a_remap_is_a_change_of_tables(loader: ModelLoader) -> None:
    """Versions run what was recorded once, and it keeps none of their experts."""
    repeater = Repeater()
    backend = TritonBackend(torch.bfloat16, CPU, repeater, sizes=(2,))
    decoder = Decoder(loader.spec, 64, torch.bfloat16, CPU, lambda dtype, device: backend)
    plain, cache = like(decoder, TritonBackend), KVCache.allocate(loader.spec, 4, 4, torch.bfloat16, CPU)
    first = loader.build(loader.plan(), 1).version
    second = loader.build(loader.plan(AFTER), 2, first).version
    expected = {one: step(plain, one, cache) for one in (first, second)}
    for one in (first, second, first):
        assert torch.equal(step(decoder, one, cache), expected[one])
    assert len(repeater.recordings) == 1
    assert decoder.compile(first).describe()["steps"].startswith("CUDA graphs")

    left = [weakref.ref(first[slot]) for slot in first.origins if first[slot] is not second[slot]]
    logits = expected.pop(second)
    del first, one, expected
    gc.collect()
    assert left and all(weight() is None for weight in left)
    assert torch.equal(step(decoder, second, cache), logits)
    assert len(repeater.recordings) == 1


def step(decoder: Decoder, version: WeightVersion, cache: KVCache) -> Tensor:
    """Logits of two sequences' first tokens."""
    sequences = [StepSequence([5], 0, [0], 1), StepSequence([9], 0, [2], 1)]
    return decoder.forward(StepContext(sequences, cache), version).clone()


def test_experts_on_two_devices(loader: ModelLoader, versions: tuple[WeightVersion, WeightVersion]) -> None:
    """The other device computes by the reference: Triton's interpreter runs one kernel at a time in a process."""
    backend = TritonBackend(torch.float32, CPU, Repeater())
    decoder = Decoder(loader.spec, 64, torch.float32, CPU, lambda dtype, device: backend)
    program = emit(loader.spec, versions[0], decoder.ropes)
    places = tuple("cpu:1" if expert % 3 else None for expert in range(len(mix_of(program).experts)))
    there = Program(
        tuple(
            replace(one, experts=replace(one.experts, devices=places)) if isinstance(one, Mix) else one
            for one in program.instructions
        )
    )
    splitter = Splitter(backend, lambda name: ReferenceBackend(torch.float32, CPU))
    context = StepContext([StepSequence([5, 9, 7], 0, [0], 3)], KVCache.allocate(loader.spec, 4, 4, torch.float32, CPU))
    tables = decoder.tables(versions[0])
    split = backend.compile(splitter.split(there), tables)
    logits = split.run(context)
    whole = ReferenceBackend(torch.float32, CPU).compile(program, tables).run(context)
    assert worst(logits, whole) < 2e-5
    assert splitter.traffic["cpu:1"].sent_bytes > 0
    said = split.describe()
    assert "cpu:1" in said["mix"] and said["steps"].startswith("not recorded")


def mix_of(program: Program) -> Mix:
    return next(one for one in program.instructions if isinstance(one, Mix))


def test_another_kind_of_weights_is_another_program(loader: ModelLoader) -> None:
    backend = TritonBackend(torch.bfloat16, CPU)
    ropes = Decoder(loader.spec, 64, torch.bfloat16, CPU, ReferenceBackend).ropes
    rules = (
        (Rule(pattern=EXPERTS, source="int4"),),
        (Rule(pattern=EXPERTS, source="fp8"),),
        (*BEFORE, Rule(pattern="model.layers.*.self_attn.q_proj.weight", source="int4")),
    )
    versions = [loader.build(loader.plan(of_it), number).version for number, of_it in enumerate(rules, 1)]
    first, second, third = (signature_of(backend.ready(emit(loader.spec, one, ropes))) for one in versions)
    assert len({first, second, third}) == 3


def test_what_ran_is_said(loader: ModelLoader, versions: tuple[WeightVersion, WeightVersion]) -> None:
    said = Decoder(loader.spec, 64, torch.bfloat16, CPU, TritonBackend).compile(versions[0]).describe()
    assert {said[name] for name in ("embed", "normalize", "project", "attend", "route", "mix", "head")} == {
        "triton (cpu)"
    }


def test_who_is_chosen() -> None:
    assert why_no_triton(CPU) is not None
    assert not isinstance(choose_backend(torch.bfloat16, CPU), TritonBackend)
