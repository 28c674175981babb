"""Models whose compiled steps are compared with their instructions, run one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.backends.cpu.program import CpuProgram
from amalgam.kernels.layouts import SCALED8
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.registry import all_families
from amalgam.models.weights import WeightVersion
from tests.models.harness import Runner, interpreted

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
    """Whether the extension runs the whole step, if no token has positions to choose from."""
    compiled = decoder.compile(version)
    assert isinstance(compiled, CpuProgram)
    return {who for kind, who in compiled.describe().items() if kind != "choose"} == {f"native ({extension.isa()})"}


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
