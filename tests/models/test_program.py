"""A step in one call gives what its instructions give one by one; what the extension cannot take runs beside it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.settings import MixedPrecisionSettings
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.backends.cpu import encoders, extension, panels
from amalgam.kernels.backends.cpu.backend import CpuBackend
from amalgam.kernels.backends.cpu.encoders import Encoder
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.cpu.panels import PanelWeight
from amalgam.kernels.backends.cpu.products import prepare_experts
from amalgam.kernels.backends.cpu.program import CpuProgram
from amalgam.kernels.backends.cpu.workspace import Workspace
from amalgam.kernels.backends.reference import interpreter
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.layouts import SCALED8, dense
from amalgam.kernels.packed import PackedWeight
from amalgam.kernels.program import (
    Add,
    Attend,
    AttendLatent,
    Call,
    Embed,
    Emitter,
    Head,
    Instruction,
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
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.decoder import Decoder, emit
from amalgam.models.kv_cache import KV_TYPES, KVCache
from amalgam.models.registry import all_families
from amalgam.models.spec import LayerSpec
from amalgam.models.weights import BlockWeights, WeightVersion
from tests.errors import raises
from tests.models.harness import Runner, interpreted, like, load_model
from tests.models.tiny import GEMMA4_MOE, save_tiny

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))

CPU = torch.device("cpu")
FAMILIES = {family.name: family for family in all_families()}
# Instructions that the interpreter computes with torch's functions, whose last bits are others.
ROUNDS_OTHERWISE = {
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "gemma2",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt2",
    "gpt_oss",
    "granitemoe",
    "lfm2",
    "lfm2_moe",
    "llama4",
    "minimax_m2",
    "mistral4",
    "mistral_large4",
    "phimoe",
    "qwen2_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "starcoder2",
}


MAMBA = {
    "architecture": "GraniteMoeHybridForCausalLM",
    "layer_types": ["linear_attention", "full_attention"],
    "shared_intermediate_size": 48,
    "mamba_n_heads": 4,
    "mamba_d_state": 24,
}


class Observer:
    """Keeps all routing."""

    def __init__(self, layer_ids: Sequence[int]) -> None:
        self.layer_ids = layer_ids  # those that have experts
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self.seen.append((layer_id, expert_ids.clone(), gate_weights.clone()))

    def observe_all(self, expert_ids: Tensor, gate_weights: Tensor) -> None:
        for index, (ids, weights) in enumerate(zip(expert_ids, gate_weights, strict=True)):
            self.observe(self.layer_ids[index], ids, weights)


def run(model: tuple[Decoder, WeightVersion]) -> tuple[list[Tensor], list[tuple[int, Tensor, Tensor]]]:
    """Logits and routing of a prompt, its second chunk beside another prompt, and a decoding step."""
    observer = Observer(model[0].spec.moe_layer_ids)
    runner = Runner(*model, observer=observer)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(3, 256, (60,), generator=generator).tolist()
    logits = [
        *runner.step({0: prompt[:23]}).values(),
        *runner.step({0: prompt[23:40], 3: prompt[40:]}).values(),
        *runner.step({0: [5], 3: [9]}).values(),
    ]
    return logits, observer.seen


def assert_same(decoder: Decoder, version: WeightVersion, *, is_exact: bool = True) -> None:
    logits, routing = run((decoder, version))
    expected, expected_routing = run((interpreted(decoder), version))
    tolerance = 0.0 if is_exact else 2e-4 if decoder.dtype is torch.float32 else 0.05
    assert len(routing) == len(expected_routing)
    pairs = zip(routing, expected_routing, strict=True)
    if not is_exact and decoder.dtype is torch.bfloat16 and not all(torch.equal(a[1], b[1]) for a, b in pairs):
        return  # another rounding before a router may choose another expert, and what follows is another answer
    for one, other in zip(logits, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.std()))
    for (layer, ids, weights), (expected_layer, expected_ids, expected_weights) in zip(
        routing, expected_routing, strict=True
    ):
        assert layer == expected_layer
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected_weights, rtol=0, atol=tolerance)


def is_one_call(decoder: Decoder, version: WeightVersion) -> bool:
    compiled = decoder.compile(version)
    assert isinstance(compiled, CpuProgram)
    return compiled.is_one_call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_runs_in_one_call(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(FAMILIES[family], tmp_path)
    decoder, version = load_model(tmp_path, dtype=dtype)
    assert is_one_call(decoder, version)
    runs = {name: who for name, who in decoder.compile(version).describe().items() if name != "choose"}
    assert set(runs.values()) == {f"native ({extension.isa()})"}
    assert_same(decoder, version, is_exact=family not in ROUNDS_OTHERWISE)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v2", {"q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
        ("deepseek_v2", {"routed_scaling_factor": 2.5, "attention_bias": True, "num_experts_per_tok": 3}),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "q_lora_rank": None}),
        ("deepseek_v32", {"index_topk": 16, "index_n_heads": 16}),
        ("glm_moe_dsa", {"index_topk": 45, "index_n_heads": 16}),
        ("olmoe", {"clip_qkv": 0.5}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("gpt_oss", {"num_experts_per_tok": 4}),
        ("bailing_hybrid", {"kda_safe_gate": False}),
        (
            "bailing_hybrid",
            {"expert_swiglu_limit_list": [0, 0.02, None], "share_expert_swiglu_limit_list": [0, 0, 0.03]},
        ),
        ("lfm2_moe", {"use_expert_bias": False, "conv_bias": True}),
        ("granitemoe", {**MAMBA, "mamba_n_groups": 2}),
        ("granitemoe", {**MAMBA, "num_local_experts": 0, "mamba_conv_bias": False, "mamba_proj_bias": True}),
        ("gemma2", {"attention_bias": True, "final_logit_softcapping": None}),
        ("gemma3", {"attention_bias": True}),
        ("gemma4", GEMMA4_MOE),
        ("ernie4_5", {"use_bias": True}),
        ("phi3", {"intermediate_size": 96, "num_key_value_heads": 4}),
    ],
)
def test_other_settings_of_a_family(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(FAMILIES[family], tmp_path, **changes)
    decoder, version = load_model(tmp_path)
    assert is_one_call(decoder, version)
    assert_same(decoder, version, is_exact=family not in ROUNDS_OTHERWISE and changes is not GEMMA4_MOE)


def test_float16_is_interpreted(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path, dtype=torch.float16)
    runs = decoder.compile(version).describe()
    assert {runs[name] for name in ("project", "mix", "head")} == {f"native operators ({extension.isa()})"}
    assert {runs[name] for name in ("embed", "normalize", "attend", "route")} == {"torch (cpu)"}
    wide, wide_version = load_model(tmp_path)
    for one, other in zip(run((decoder, version))[0], run((wide, wide_version))[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.05 * float(other.std()))


def test_mixed_precisions(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path / "base")
    for name in ("int4", "fp8"):
        options = QuantizeOptions(group_size=32) if name == "int4" else QuantizeOptions()
        quantize_checkpoint(str(tmp_path / "base"), tmp_path / name, name, options)
    mixed = MixedPrecisionSettings(
        sources={name: str(tmp_path / name) for name in ("int4", "fp8")},
        weight_mapping={"model.layers.*.mlp.experts.*": "int4", "model.layers.*.mlp.experts.{0-2}.*": "fp8"},
    )
    decoder, version = load_model(tmp_path / "base", dtype=torch.bfloat16, mixed=mixed)
    assert is_one_call(decoder, version)
    assert_same(decoder, version)


def step_logits(decoder: Decoder, version: WeightVersion, kv_type: torch.dtype | None = None) -> list[Tensor]:
    """Logits of steps that want them of all, some and none of their tokens, and of single tokens."""
    kv = KVCache.allocate(decoder.spec, 12, 4, kv_type or decoder.dtype, CPU)
    prompt = torch.randint(3, 250, (12,), generator=torch.Generator().manual_seed(2)).tolist()
    first, second = [7, 2, 9], (0, 11, 5, 3)
    steps = [
        [StepSequence(prompt[:5], 0, first, 0)],
        [StepSequence(prompt[5:10], 5, first, 2), StepSequence(prompt[:7], 0, second, 0)],
        [StepSequence(prompt[10:11], 10, first, 1), StepSequence(prompt[7:], 7, second, 9)],
        [StepSequence([4], 12, second, 1)],
        [StepSequence(prompt[11:], 11, first, 0), StepSequence([5], 13, second, 1)],
        [],
    ]
    with torch.inference_mode():
        logits = [decoder.forward(StepContext(step, kv), version).clone() for step in steps]
    assert [len(rows) for rows in logits] == [0, 2, 6, 1, 1, 0]
    return logits


def assert_same_logits(decoder: Decoder, version: WeightVersion) -> None:
    for one, other in zip(step_logits(decoder, version), step_logits(interpreted(decoder), version), strict=True):
        assert one.dtype is torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", KV_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "deepseek_v32", "gpt_oss"])
def test_every_type_of_cache(family: str, dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    """The whole step in one call gives the bits of its operators, and what the reference gives but for rounding."""
    save_tiny(FAMILIES[family], tmp_path)
    decoder, version = load_model(tmp_path, dtype=dtype)
    assert is_one_call(decoder, version)
    ours = step_logits(decoder, version, KV_TYPES[name])
    if family not in ROUNDS_OTHERWISE:
        for one, other in zip(ours, step_logits(interpreted(decoder), version, KV_TYPES[name]), strict=True):
            assert torch.equal(one, other)
    plain = step_logits(decoder, version)
    is_changed = any(not torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
    assert is_changed == (KV_TYPES[name] is not dtype)
    for one, other in zip(ours, plain, strict=True):
        if len(one):
            torch.testing.assert_close(one, other, rtol=0, atol=(0.4 if name == "fp8" else 0.1) * float(other.std()))


def with_slots(version: WeightVersion, **slots: PackedWeight) -> WeightVersion:
    weights = {slot: version[slot] for slot in version.origins}
    renamed = {name.replace("__", "."): weight for name, weight in slots.items()}
    return WeightVersion(2, weights | renamed, version.origins, version.keys)


def in_no_kernels_layout(values: Tensor) -> PackedWeight:
    """int8 with groups that panels cannot have."""
    rows, columns = values.shape
    scale = torch.full((rows, columns // 4), 0.01)
    parts = {"weight": (values / 0.01).round().clamp(-127, 127).to(torch.int8), "scale": scale}
    return PackedWeight(SCALED8, (rows, columns), parts, block=(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("vocab_size", [256, 250])
def test_what_stands_before_and_behind_the_layers(
    vocab_size: int, is_tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Embedding and head in every layout that they come in, some of which the extension does not read."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path, vocab_size=vocab_size, tie_word_embeddings=is_tied)
    decoder, version = load_model(tmp_path, dtype=dtype)
    values = version["embedding"].dequantize(torch.float32)
    embeddings = [dense(values.to(other)) for other in (torch.float32, torch.bfloat16, torch.float16)]
    embeddings += [panels.prepare(embedding) for embedding in embeddings]
    for embedding in (*embeddings, dense(values.double()), in_no_kernels_layout(values)):
        changed = with_slots(version, embedding=embedding)
        runs = decoder.compile(changed).describe()
        assert (runs["embed"] == "torch (cpu)") == (embedding not in embeddings)
        assert (runs["head"] == "torch (cpu)") == (is_tied and embedding not in embeddings[3:])
        assert_same_logits(decoder, changed)
    if not is_tied:
        changed = with_slots(version, head=in_no_kernels_layout(version["head"].dequantize(torch.float32)))
        assert decoder.compile(changed).describe()["head"] == "torch (cpu)"
        assert_same_logits(decoder, changed)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt2", "gpt_oss"])
def test_weights_outside_the_panels(family: str, tmp_path: Path) -> None:
    """Each weight in turn in a layout that no kernel knows: its instruction alone goes through the interpreter."""
    save_tiny(FAMILIES[family], tmp_path)
    decoder, version = load_model(tmp_path)
    in_layer = [slot for slot in version.origins if slot.startswith("layers.1.")]
    slots = [slot for slot in in_layer if isinstance(version[slot], PanelWeight)]
    by_block = {slot.replace(".experts.0.", ".experts.1."): slot for slot in slots if ".experts." not in slot}
    expert = next((slot for slot in slots if ".experts.1.down" in slot), None)
    for slot in [*by_block.values(), *([expert] if expert else [])]:
        plain = in_no_kernels_layout(version[slot].dequantize(torch.float32))
        changed = with_slots(version, **{slot.replace(".", "__"): plain})
        if slot.endswith("kv_b"):  # its heads are packed one by one, whatever the weight's own layout
            assert is_one_call(decoder, changed)
        else:
            runs = ",".join(decoder.compile(changed).describe().values())
            assert "torch" in runs and "native" in runs, slot
        for one, other in zip(run((decoder, changed))[0], run((interpreted(decoder), changed))[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-4 * float(other.std()))


def test_learned_positions_and_a_head_with_a_bias(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    decoder.spec = replace(decoder.spec, has_position_embedding=True, has_head_bias=True)
    generator = torch.Generator().manual_seed(1)
    positions = torch.randn(decoder.spec.max_positions, decoder.spec.hidden_size, generator=generator)
    bias = torch.randn(decoder.spec.vocab_size, generator=generator)
    changed = with_slots(version, positions=dense(positions), head_bias=dense(bias))
    assert is_one_call(decoder, changed)
    assert_same_logits(decoder, changed)


@dataclass(frozen=True)
class SquaredMlp(DenseMlp):
    """A block that no instruction fits: `down(silu(gate)² × up)`, its middle in torch."""

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        gate, up = step.project(x, (weights["gate"], None, "gate"), (weights["up"], None, "up"))
        joined = step.rows("joined", gate.width)

        def square(gate: Tensor, up: Tensor, context: StepContext) -> tuple[Tensor]:
            assert len(context.token_ids) == len(gate)
            return ((gate / (1 + torch.exp(-gate.float()))).square().to(up.dtype) * up,)

        step.add(Call(square, (gate, up), (joined,)))
        (delta,) = step.project(joined, (weights["down"], None, "delta"))
        return delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_into_python(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(FAMILIES["llama"], tmp_path)
    decoder, version = load_model(tmp_path, dtype=dtype)
    mlp = decoder.spec.layers[0].mlp
    assert isinstance(mlp, DenseMlp)
    plain = step_logits(decoder, version)
    changed = LayerSpec(decoder.spec.layers[0].attention, SquaredMlp(mlp.intermediate_size))
    decoder.spec = replace(decoder.spec, layers=(changed, *decoder.spec.layers[1:]))
    other = WeightVersion(3, {slot: version[slot] for slot in version.origins}, version.origins, version.keys)
    runs = decoder.compile(other).describe()
    assert runs["call"] == "torch (cpu)"
    assert {who for name, who in runs.items() if name != "call"} == {f"native ({extension.isa()})"}
    assert_same_logits(decoder, other)
    assert not torch.equal(step_logits(decoder, other)[1], plain[1])


def test_two_caches_in_turns(tmp_path: Path) -> None:
    """A backend keeps what it knows of a cache, which may be another at the next step."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    model = load_model(tmp_path)
    prompts = {0: [5, 6, 7, 8], 1: [9, 10, 11, 12]}
    alone = {key: Runner(*model).step({0: prompt})[0] for key, prompt in prompts.items()}
    runners = {key: Runner(*model) for key in prompts}
    halves = {key: [runners[key].step({0: prompts[key][:2]})[0]] for key in prompts}
    for key, runner in runners.items():
        halves[key].append(runner.step({0: prompts[key][2:]})[0])
        assert torch.equal(torch.cat(halves[key]), alone[key])


def test_a_version_is_compiled_once_and_forgotten_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[weakref.ref[PackedWeight]] = []

    def latent_matrices(one: AttendLatent, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        packed.append(weakref.ref(one.expand))
        return interpreter.latent_matrices(one, dtype)

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


def test_a_head_is_not_touched_where_nobody_wants_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a prompt but the last: a head that no kernel reads would be expanded at each of them."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    version = with_slots(version, head=in_no_kernels_layout(version["head"].dequantize(torch.float32)))
    multiplied: list[int] = []
    linear = CpuOperators.linear

    def counted(x: Tensor, weight: PackedWeight, *rest: Any) -> Tensor:
        if weight is version["head"]:
            multiplied.append(len(x))
        return linear(x, weight, *rest)

    monkeypatch.setattr(CpuOperators, "linear", counted)
    for model in (decoder, interpreted(decoder)):
        multiplied.clear()
        kv = KVCache.allocate(decoder.spec, 4, 16, torch.float32, CPU)
        for wanted in (0, 1, 3):
            context = StepContext([StepSequence([5, 6, 7], 0, [0], wanted)], kv)
            assert model.forward(context, version).shape == (wanted, decoder.spec.vocab_size)
        assert multiplied == [1, 3]


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


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_reference_runs_the_same_program_and_shows_it(family: str, tmp_path: Path) -> None:
    """Plain torch, near to the compiled kernels; a watch sees every instruction before it runs, and its input."""
    save_tiny(FAMILIES[family], tmp_path)
    decoder, version = load_model(tmp_path)
    seen: list[tuple[str, tuple[int, ...]]] = []

    def watch(instruction: Instruction, frame: Frame) -> None:
        if isinstance(instruction, Project | Mix):
            seen.append((type(instruction).__name__, tuple(frame.get(instruction.x).shape)))
        if isinstance(instruction, Mix):
            assert frame.routing is not None and len(frame.routing[0]) == seen[-1][1][0]

    reference = like(decoder, lambda dtype, device: ReferenceBackend(dtype, device, watch))
    assert set(reference.compile(version).describe().values()) == {"torch (cpu)"}
    for one, other in zip(step_logits(decoder, version), step_logits(reference, version), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)
    program = emit(decoder.spec, version, tuple(decoder.ropes))
    kinds = [type(one).__name__ for one in program.instructions if isinstance(one, Project | Mix)]
    assert [kind for kind, _ in seen] == kinds * 5  # steps with tokens
    assert {shape for kind, shape in seen if kind == "Mix"} == {
        (tokens, decoder.spec.hidden_size) for tokens in (5, 12, 6, 1, 2)
    }


@pytest.mark.parametrize("path", ["compiled", "operator by operator", "reference"])
def test_logits_stay_while_what_the_step_left_is_read(path: str, tmp_path: Path) -> None:
    """They hold until the next step, and readers of prompts ask the head for others meanwhile."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    if path != "compiled":
        decoder = interpreted(decoder) if path != "reference" else like(decoder, ReferenceBackend)
    kv = KVCache.allocate(decoder.spec, 4, 4, decoder.dtype, torch.device("cpu"))
    tokens = [3, 1, 4, 1, 5]
    with torch.inference_mode():
        logits = decoder.forward(StepContext([StepSequence(tokens, 0, [2, 0], len(tokens))], kv), version)
        before, compiled = logits.clone(), decoder.compile(version)
        for hidden in (torch.ones_like(compiled.hidden()), compiled.hidden().clone()):
            again = compiled.head(hidden)
            assert torch.equal(logits, before)
        assert torch.equal(again, before)  # the same rows, the same bits


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt2"])
def test_a_step_is_the_same_on_any_number_of_threads(
    name: str, tmp_path: Path, use_threads: Callable[[int], None]
) -> None:
    save_tiny(FAMILIES[name], tmp_path)
    steps = []
    for threads in (1, 2, 3, 8, 64):
        use_threads(threads)
        steps.append(Runner(*load_model(tmp_path)).step({0: list(range(3, 43)), 1: [5]}))
    for step in steps[1:]:
        assert all(torch.equal(step[index], steps[0][index]) for index in (0, 1))
