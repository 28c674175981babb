"""What the extension cannot take runs beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension, panels
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.cpu.panels import PanelWeight
from amalgam.kernels.layouts import dense
from amalgam.kernels.program import Call, Emitter, Rows
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.kernels.weights import PackedWeight
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.kv_cache import KVCache
from amalgam.models.spec import LayerSpec
from amalgam.models.weights import BlockWeights, WeightVersion
from tests.models.harness import interpreted, load_model
from tests.models.program.running import (
    CPU,
    FAMILIES,
    assert_same_logits,
    in_no_kernels_layout,
    is_one_call,
    run,
    step_logits,
    with_slots,
)
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))


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
