"""What is compiled, for how long, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import encoders, extension
from amalgam.kernels.backends.cpu.backend import CpuBackend
from amalgam.kernels.backends.cpu.encoders import Encoder
from amalgam.kernels.backends.cpu.products import prepare_experts
from amalgam.kernels.backends.cpu.workspace import Workspace
from amalgam.kernels.backends.reference import latent
from amalgam.kernels.layouts import dense
from amalgam.kernels.program import (
    Add,
    Attend,
    AttendLatent,
    Embed,
    Emitter,
    Head,
    Mix,
    Normalize,
    Program,
    Project,
    Projection,
    Route,
    Rows,
    ScaleBySigmoid,
    SwiGlu,
)
from amalgam.kernels.step import LayerCache, StepContext, StepSequence
from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import Decoder, emit
from amalgam.models.kv_cache import KVCache
from amalgam.models.weights import WeightVersion
from tests.errors import raises
from tests.models.harness import load_model
from tests.models.program.running import CPU, FAMILIES, step_logits, with_slots
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))


def test_a_version_is_compiled_once_and_forgotten_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[weakref.ref[PackedWeight]] = []

    def latent_matrices(one: AttendLatent, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        packed.append(weakref.ref(one.expand))
        return latent.latent_matrices(one, dtype)

    monkeypatch.setattr(encoders, "latent_matrices", latent_matrices)
    save_tiny(FAMILIES["deepseek_v3"], tmp_path)
    decoder, version = load_model(tmp_path)
    compiled = decoder.compile(version)
    step_logits(decoder, version)
    assert decoder.compile(version) is compiled
    assert isinstance(decoder.backend, CpuBackend)
    assert len(packed) == decoder.spec.num_layers
    shared = with_slots(version)
    decoder.compile(shared)  # the same weights: nothing is packed again
    assert len(packed) == decoder.spec.num_layers
    gone = weakref.ref(compiled)
    del compiled, version, shared
    gc.collect()
    assert gone() is None
    assert not any(weight() for weight in packed)


def some(program: Program, kind: type) -> Any:
    return next(one for one in program.instructions if isinstance(one, kind))


def wrong_instructions(program: Program) -> Iterator[Any]:
    """Instructions of a program, each with one thing that does not fit the rest."""
    normalize, project, attend = some(program, Normalize), some(program, Project), some(program, Attend)
    route, mix, embed, head = some(program, Route), some(program, Mix), some(program, Embed), some(program, Head)
    assert attend.head_norms is not None
    first = project.projections[0]
    yield replace(normalize, weight=normalize.weight[:-1])
    yield replace(normalize, bias=normalize.weight[:-1])
    yield replace(normalize, delta=replace(normalize.x, stride=8, width=8))
    yield replace(normalize, out=replace(normalize.out, width=normalize.out.width - 1))
    yield replace(project, x=replace(project.x, width=8, stride=8))
    yield replace(project, projections=(replace(first, bias=torch.zeros(1)),))
    yield replace(project, projections=(replace(first, out=replace(first.out, width=first.out.width - 16)),))
    yield replace(embed, out=replace(embed.out, width=8, stride=8))
    yield replace(head, bias=torch.zeros(3))
    yield replace(attend, num_kv_heads=3)
    yield replace(attend, head_dim=2 * attend.head_dim)
    yield replace(attend, window=-1)
    yield replace(attend, sinks=torch.zeros(attend.num_heads - 1))
    yield replace(attend, head_norms=(attend.head_norms[0], attend.head_norms[1][:-1]))
    yield replace(attend, key=replace(attend.key, start=8))
    yield replace(route, correction=torch.zeros(3))
    yield replace(route, num_groups=3)
    yield replace(route, num_groups=4, num_kept=5)
    yield replace(mix, x=replace(mix.x, width=8, stride=8))
    yield Add(mix.out, replace(mix.out, width=8, stride=8))
    yield SwiGlu(mix.out, mix.out, replace(mix.out, width=8, stride=8))
    yield ScaleBySigmoid(mix.out, mix.out.columns(0, 3))  # neither one gate, nor one for each head or element
    yield Normalize(Rows("nowhere", 64, 0, 64), normalize.weight, normalize.out, 1e-6)


def encoder_of(decoder: Decoder, version: WeightVersion) -> Encoder:
    """An encoder of a version's program, which may be given other instructions as well."""
    program = Program(
        tuple(
            replace(one, experts=prepare_experts(one.experts)) if isinstance(one, Mix) else one
            for one in emit(decoder.spec, version, tuple(decoder.ropes)).instructions
        )
    )
    return Encoder(program, decoder.dtype, weakref.WeakKeyDictionary())


def test_what_does_not_agree_is_not_compiled(tmp_path: Path) -> None:
    """The extension is given addresses: sizes are looked at before."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    encoder = encoder_of(decoder, version)
    for number, wrong in enumerate(wrong_instructions(encoder.program)):
        with pytest.raises((ValueError, KeyError)):
            encoder.add(wrong)
            pytest.fail(f"{number}: {wrong}")


def test_latent_attention_that_does_not_agree_is_not_compiled(tmp_path: Path) -> None:
    save_tiny(FAMILIES["deepseek_v3"], tmp_path)
    decoder, version = load_model(tmp_path)
    encoder = encoder_of(decoder, version)
    attend = some(encoder.program, AttendLatent)
    for change in (
        {"norm": attend.norm[:-1]},
        {"query": replace(attend.query, width=8, stride=8)},
        {"out": replace(attend.out, width=8, stride=8)},
        {"rope": -1},
    ):
        with raises(ValueError):
            encoder.add(replace(attend, **change))


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    kv = KVCache.allocate(decoder.spec, 2, 16, torch.float32, CPU)
    sequence = StepSequence([1, 2, 3], 0, [0], 1)
    decoder.forward(StepContext([sequence], kv), version)
    program = emit(decoder.spec, version, tuple(decoder.ropes))
    (cos, sin), *_ = decoder.tables(version)
    for tables in ([(cos, sin[:, :-1])], [(cos.double(), sin.double())]):
        with raises(ValueError):
            CpuBackend(torch.float32).compile(program, tables)
    for tables in ([], [(cos.repeat(1, 9), sin.repeat(1, 9))]):
        compiled = CpuBackend(torch.float32).compile(program, tables)
        with raises(ValueError, "layer 0"):
            compiled.run(StepContext([sequence], kv))
    scales = torch.ones(kv.layers[0].keys.shape[:2])
    for layers in (
        kv.layers[:1],
        [layer._replace(values=layer.values.bfloat16()) for layer in kv.layers],
        [layer._replace(keys=layer.keys[:4]) for layer in kv.layers],
        [layer._replace(keys=layer.keys.transpose(1, 2)) for layer in kv.layers],
        [layer._replace(keys=layer.keys[..., :4].contiguous()) for layer in kv.layers],
        [layer._replace(key_scales=scales) for layer in kv.layers],
        [layer._replace(keys=layer.keys.char(), values=layer.values.char()) for layer in kv.layers],
        [LayerCache(layer.keys.char(), layer.values.char(), scales, scales[1:]) for layer in kv.layers],
    ):
        with raises(ValueError):
            decoder.forward(StepContext([sequence], KVCache(layers, 16)), version)
    before = [tensor.clone() for layer in kv.layers for tensor in layer[:2]]
    for change, named in (
        ({"first_position": len(cos) - 2, "block_ids": [0] * len(cos)}, ("position", len(cos))),
        ({"first_position": -1}, ("position", -1)),
        ({"first_position": 14}, (1, 17)),
        ({"block_ids": [2]}, ("slot", 32)),
        ({"block_ids": [-1]}, ("block", -1)),
        ({"block_ids": []}, (0,)),
        ({"token_ids": [1, 2, decoder.spec.vocab_size]}, ("token", 256)),
        ({"token_ids": [-1, 2, 3]}, ("token", -1)),
    ):
        with raises((IndexError, ValueError), *named):
            decoder.forward(StepContext([sequence._replace(**change)], kv), version)
    wanted = [sequence._replace(num_logits=-1), sequence._replace(num_logits=3)]
    with raises(ValueError, 3, 2):
        decoder.forward(StepContext(wanted, kv), version)
    for tensor, old in zip((tensor for layer in kv.layers for tensor in layer[:2]), before, strict=True):
        assert torch.equal(tensor, old)


def test_buffers_of_one_name_are_one(tmp_path: Path) -> None:
    step = Emitter()
    wide, narrow = step.rows("a", 32), step.rows("a", 8)
    weight = dense(torch.zeros(4, 8))
    step.add(
        Add(wide, step.rows("b", 32)), Project(narrow, (Projection(weight, None, step.rows("c", 4, is_wide=True)),))
    )
    program = step.finish()
    assert program.buffers == {"a": (32, False), "b": (32, False), "c": (4, True)}
    assert wide.columns(8, 16).columns(4, 4) == Rows("a", 32, 12, 4)
    assert not wide.columns(8, 16).is_whole and wide.is_whole
    assert all(address % 64 == 0 for address in Workspace(torch.bfloat16).place(program.buffers, 3))
