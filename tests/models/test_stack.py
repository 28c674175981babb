"""The layers in one call give, bit for bit, what their operators give one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amalgam.config import MixedPrecisionSettings
from amalgam.kernels import native
from amalgam.kernels.packed import AttentionBatch
from amalgam.kernels.stack import MixtureLayer, Stack, fits
from amalgam.models import decoder as decoder_module
from amalgam.models.context import KVCache
from amalgam.models.decoder import Decoder
from amalgam.models.spec import all_families
from amalgam.models.stack import stack_of
from amalgam.precision.format import QuantizeOptions
from amalgam.tools.quantize import quantize_checkpoint
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.skipif(not native.is_available(), reason=str(native.why_unavailable()))

# What has blocks of its own kind is called block by block.
IN_ONE_CALL = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"}  # xverse too where it is dense
FAMILIES = {family.name: family for family in all_families()}


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


def run(model: tuple[Decoder, object]) -> tuple[list[Tensor], list[tuple[int, Tensor, Tensor]]]:
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


def assert_same(model: tuple[object, object], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, routing = run(model)
    monkeypatch.setattr(decoder_module, "stack_of", lambda *_: None)
    expected, expected_routing = run(model)
    for one, other in zip(logits, expected, strict=True):
        assert torch.equal(one, other)
    assert len(routing) == len(expected_routing)
    for (layer, ids, weights), (expected_layer, expected_ids, expected_weights) in zip(
        routing, expected_routing, strict=True
    ):
        assert layer == expected_layer
        assert torch.equal(ids, expected_ids)
        assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(FAMILIES[family], tmp_path)
    decoder, version = load_model(tmp_path, dtype=dtype)
    ropes = list(decoder._rope_tables)
    assert (stack_of(decoder.spec, version, ropes) is not None) == (family in IN_ONE_CALL)
    assert_same((decoder, version), monkeypatch)


def test_mixed_precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path / "base")
    for name in ("int4", "fp8"):
        options = QuantizeOptions(group_size=32) if name == "int4" else QuantizeOptions()
        quantize_checkpoint(str(tmp_path / "base"), tmp_path / name, name, options)
    mixed = MixedPrecisionSettings(
        sources={name: str(tmp_path / name) for name in ("int4", "fp8")},
        weight_mapping={"model.layers.*.mlp.experts.*": "int4", "model.layers.*.mlp.experts.{0-2}.*": "fp8"},
    )
    model = load_model(tmp_path / "base", dtype=torch.bfloat16, mixed=mixed)
    assert stack_of(model[0].spec, model[1], list(model[0]._rope_tables)) is not None
    assert_same(model, monkeypatch)


def test_a_weight_outside_the_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert in a layout that no kernel knows, and the version is called block by block."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(native, "is_available", lambda: False)
        _, version = load_model(tmp_path)
    decoder, _ = load_model(tmp_path)
    assert stack_of(decoder.spec, version, list(decoder._rope_tables)) is None


def test_what_does_not_agree_is_not_run(tmp_path: Path) -> None:
    """The extension is given addresses: sizes are looked at before."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    stack = stack_of(decoder.spec, version, list(decoder._rope_tables))
    assert stack is not None
    layer = stack._layers[0]
    part, mlp = layer.attention, layer.mlp
    assert isinstance(mlp, MixtureLayer)
    assert part.head_norms is not None
    assert fits([layer])
    query, *others = part.projections
    wrong = [
        replace(layer, mlp_norm=layer.mlp_norm[:-1]),
        replace(layer, next_norm=layer.next_norm.double()),
        replace(layer, mlp=replace(mlp, num_active=len(mlp.experts) + 1)),
        replace(layer, mlp=replace(mlp, router=query[0])),
        *(
            replace(layer, attention=replace(part, **change))
            for change in (
                {"num_kv_heads": 3},
                {"head_dim": 2 * part.head_dim},
                {"window": 0},
                {"sinks": torch.zeros(part.num_heads - 1)},
                {"head_norms": (part.head_norms[0], part.head_norms[1][:-1])},
                {"head_norms": (part.head_norms[0], part.head_norms[1].bfloat16())},
                {"projections": ((query[0], torch.zeros(1)), *others)},
                {"projections": (others[0], query, *others[1:])},
            )
        ),
    ]
    for one in wrong:
        assert not fits([one])
        with pytest.raises(ValueError, match="needs its weights"):
            Stack([one], 1e-6)
    assert not fits([])


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    stack = stack_of(decoder.spec, version, list(decoder._rope_tables))
    assert stack is not None
    spec = decoder.spec
    kv = KVCache.allocate(spec, 2, 16, torch.float32, torch.device("cpu"))
    x = torch.zeros(3, stack._layers[0].mlp_norm.shape[0])
    good = {
        "positions": torch.arange(3),
        "tables": list(decoder._rope_tables.values()),
        "keys": kv.keys,
        "values": kv.values,
        "slot_ids": torch.arange(3),
        "batch": AttentionBatch(torch.tensor([0, 3]), torch.tensor([3]), torch.tensor([[0]]), 16),
    }
    stack.run(x.clone(), x.clone(), **good)
    (cos, sin), *_ = good["tables"]
    wrong = [
        {"positions": torch.arange(4)},
        {"positions": torch.arange(3).int()},
        {"slot_ids": torch.arange(6)[::2]},
        {"tables": []},
        {"tables": [(cos, sin[:, :-1])]},
        {"tables": [(cos.double(), sin.double())]},
        {"tables": [(cos.repeat(1, 9), sin.repeat(1, 9))]},
        {"keys": kv.keys[:1]},
        {"values": tuple(value.bfloat16() for value in kv.values)},
        {"keys": tuple(key[:4] for key in kv.keys)},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="cannot run"):
            stack.run(x.clone(), x.clone(), **{**good, **change})
    for change in ({"positions": torch.tensor([0, 1, len(cos)])}, {"slot_ids": torch.tensor([0, 1, 32])}):
        with pytest.raises(IndexError):
            stack.run(x.clone(), x.clone(), **{**good, **change})
