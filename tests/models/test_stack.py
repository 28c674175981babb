"""A step in one call gives, bit for bit, what its operators give one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amalgam.config import MixedPrecisionSettings
from amalgam.kernels import native, ops
from amalgam.kernels.packed import PackedWeight
from amalgam.kernels.reference import unpack_scaled8
from amalgam.kernels.stack import MixtureLayer, Stack, StepSequence, fits
from amalgam.models import decoder as decoder_module
from amalgam.models.context import KVCache, StepContext
from amalgam.models.decoder import Decoder
from amalgam.models.spec import all_families
from amalgam.models.stack import stack_of
from amalgam.models.weights import WeightVersion
from amalgam.precision.format import QuantizeOptions
from amalgam.precision.formats.floating import dense
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
    assert (stack_of(decoder.spec, version, decoder._ropes) is not None) == (family in IN_ONE_CALL)
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
    assert stack_of(model[0].spec, model[1], model[0]._ropes) is not None
    assert_same(model, monkeypatch)


def step_logits(model: tuple[Decoder, WeightVersion]) -> list[Tensor]:
    """Logits of steps that want them of all, some and none of their tokens, and of single tokens."""
    decoder, version = model
    kv = KVCache.allocate(decoder.spec, 12, 4, decoder.dtype, torch.device("cpu"))
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


def assert_same_logits(model: tuple[Decoder, WeightVersion], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = step_logits(model)
    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "stack_of", lambda *_: None)
        expected = step_logits(model)
    for one, other in zip(logits, expected, strict=True):
        assert one.dtype is torch.float32
        assert torch.equal(one, other)


def with_slots(version: WeightVersion, **slots: PackedWeight) -> WeightVersion:
    weights = {slot: version[slot] for slot in version.origins}
    return WeightVersion(2, weights | slots, version.origins, version.keys)


def in_no_kernels_layout(values: Tensor) -> PackedWeight:
    """int8 with groups that panels cannot have."""
    rows, columns = values.shape
    scale = torch.full((rows, columns // 4), 0.01)
    parts = {"weight": (values / 0.01).round().clamp(-127, 127).to(torch.int8), "scale": scale}
    return PackedWeight("scaled8", (rows, columns), parts, unpack_scaled8, block=(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("vocab_size", [256, 250])
def test_what_stands_before_and_behind_the_layers(
    vocab_size: int, is_tied: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedding and head in every layout that they come in, some of which the extension does not read."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path, vocab_size=vocab_size, tie_word_embeddings=is_tied)
    decoder, version = load_model(tmp_path, dtype=dtype)
    values = version["embedding"].dequantize(torch.float32)
    embeddings = [dense(values.to(other)) for other in (torch.float32, torch.bfloat16, torch.float16)]
    embeddings += [ops.prepare(embedding) for embedding in embeddings]
    for embedding in (*embeddings, dense(values.double()), in_no_kernels_layout(values)):
        changed = with_slots(version, embedding=embedding)
        stack = stack_of(decoder.spec, changed, decoder._ropes)
        assert stack is not None
        assert stack.has_embedding == (embedding in embeddings)
        assert stack.has_head == (not is_tied or embedding in embeddings[3:])
        assert_same_logits((decoder, changed), monkeypatch)
    if not is_tied:
        head = in_no_kernels_layout(version["head"].dequantize(torch.float32))
        changed = with_slots(version, head=head)
        stack = stack_of(decoder.spec, changed, decoder._ropes)
        assert stack is not None
        assert not stack.has_head
        assert_same_logits((decoder, changed), monkeypatch)


def test_learned_positions_and_a_head_with_a_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    decoder.spec = replace(decoder.spec, has_position_embedding=True, has_head_bias=True)
    generator = torch.Generator().manual_seed(1)
    positions = torch.randn(decoder.spec.max_positions, decoder.spec.hidden_size, generator=generator)
    bias = torch.randn(decoder.spec.vocab_size, generator=generator)
    changed = with_slots(version, positions=dense(positions), head_bias=dense(bias))
    stack = stack_of(decoder.spec, changed, decoder._ropes)
    assert stack is not None
    assert stack.has_head
    assert not stack.has_embedding
    assert_same_logits((decoder, changed), monkeypatch)


def test_two_caches_in_turns(tmp_path: Path) -> None:
    """A stack keeps what it knows of a cache, which may be another at the next step."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    model = load_model(tmp_path)
    prompts = {0: [5, 6, 7, 8], 1: [9, 10, 11, 12]}
    alone = {key: Runner(*model).step({0: prompt})[0] for key, prompt in prompts.items()}
    runners = {key: Runner(*model) for key in prompts}
    halves = {key: [runners[key].step({0: prompts[key][:2]})[0]] for key in prompts}
    for key, runner in runners.items():
        halves[key].append(runner.step({0: prompts[key][2:]})[0])
        assert torch.equal(torch.cat(halves[key]), alone[key])


def test_a_weight_outside_the_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert in a layout that no kernel knows, and the version is called block by block."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(native, "is_available", lambda: False)
        _, version = load_model(tmp_path)
    decoder, _ = load_model(tmp_path)
    assert stack_of(decoder.spec, version, decoder._ropes) is None


def test_a_head_is_not_touched_where_nobody_wants_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a prompt but the last: a head that no kernel reads would be expanded at each of them."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, weights = load_model(tmp_path)
    size = decoder.spec.vocab_size
    multiplied: list[int] = []

    def linear(x: Tensor, *_: object) -> Tensor:
        multiplied.append(len(x))
        return torch.zeros((len(x), size))

    monkeypatch.setattr(decoder_module, "stack_of", lambda *_: None)
    monkeypatch.setattr(Decoder, "_hidden", lambda *_: torch.zeros((3, decoder.spec.hidden_size)))
    monkeypatch.setattr(ops, "linear", linear)
    kv = KVCache.allocate(decoder.spec, 4, 16, torch.float32, torch.device("cpu"))
    for wanted in (0, 1, 3):
        context = StepContext([StepSequence([5, 6, 7], 0, [0], wanted)], kv)
        assert decoder.forward(context, weights).shape == (wanted, size)
    assert multiplied == [1, 3]


def test_what_does_not_agree_is_not_run(tmp_path: Path) -> None:
    """The extension is given addresses: sizes are looked at before."""
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    stack = stack_of(decoder.spec, version, decoder._ropes)
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
            Stack([one], 1e-6, layer.mlp_norm)
    assert not fits([])


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    decoder, version = load_model(tmp_path)
    stack = stack_of(decoder.spec, version, decoder._ropes)
    assert stack is not None
    kv = KVCache.allocate(decoder.spec, 2, 16, torch.float32, torch.device("cpu"))
    sequence = StepSequence([1, 2, 3], 0, [0], 1)
    good = {"keys": kv.keys, "values": kv.values, "block_size": 16, "tables": decoder._tables}
    stack.run([sequence], **good)
    (cos, sin), *_ = decoder._tables
    wrong = [
        {"tables": []},
        {"tables": [(cos, sin[:, :-1])]},
        {"tables": [(cos.double(), sin.double())]},
        {"tables": [(cos.repeat(1, 9), sin.repeat(1, 9))]},
        {"keys": kv.keys[:1]},
        {"values": tuple(value.bfloat16() for value in kv.values)},
        {"keys": tuple(key[:4] for key in kv.keys)},
        {"x": torch.zeros(2, decoder.spec.hidden_size)},
        {"x": torch.zeros(3, decoder.spec.hidden_size).bfloat16()},
        {"x": torch.zeros(decoder.spec.hidden_size, 3).T},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="cannot run"):
            stack.run([sequence], **{**good, **change})
    before = [tensor.clone() for tensor in (*kv.keys, *kv.values)]
    for change, message in (
        ({"first_position": len(cos) - 2, "block_ids": [0] * len(cos)}, "position"),
        ({"first_position": -1}, "position -1"),
        ({"first_position": 14}, "1 blocks for 17 tokens"),
        ({"block_ids": [2]}, "slot 32 of 32"),
        ({"block_ids": [-1]}, "block -1"),
        ({"block_ids": []}, "0 blocks"),
        ({"token_ids": [1, 2, decoder.spec.vocab_size]}, "token 256 of 256"),
        ({"token_ids": [-1, 2, 3]}, "token -1"),
    ):
        with pytest.raises((IndexError, ValueError), match=message):
            stack.run([sequence._replace(**change)], **good)
    with pytest.raises(ValueError, match="3 rows are wanted, 2 have a place"):
        stack.run([sequence._replace(num_logits=-1), sequence._replace(num_logits=3)], **good)
    for tensor, old in zip((*kv.keys, *kv.values), before, strict=True):
        assert torch.equal(tensor, old)
