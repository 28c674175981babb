"""A step in one call gives what its instructions give one by one, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.model import MixedPrecisionSettings
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.backends.reference.frame import Frame
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.program import Instruction, Mix, Project
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.models.decoder import emit
from amalgam.models.kv_cache import KV_TYPES, KVCache
from tests.models.harness import Runner, interpreted, like, load_model
from tests.models.program.running import FAMILIES, ROUNDS_OTHERWISE, assert_same, is_one_call, run, step_logits
from tests.models.tiny import GEMMA4_MOE, save_tiny

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))

MAMBA = {
    "architecture": "GraniteMoeHybridForCausalLM",
    "layer_types": ["linear_attention", "full_attention"],
    "shared_intermediate_size": 48,
    "mamba_n_heads": 4,
    "mamba_d_state": 24,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_runs_in_one_call(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(FAMILIES[family], tmp_path)
    decoder, version = load_model(tmp_path, dtype=dtype)
    assert is_one_call(decoder, version)
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


@pytest.mark.parametrize(("family", "runs"), [("gpt2", "torch (cpu)"), ("qwen3", None)])
def test_a_norm_with_a_bias_has_no_compiled_operator(family: str, runs: str | None, tmp_path: Path) -> None:
    save_tiny(FAMILIES[family], tmp_path)
    decoder, version = load_model(tmp_path)
    said = interpreted(decoder).compile(version).describe()
    assert said["normalize"] == (runs or f"native operators ({extension.isa()})")


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
