"""Whatever does not fit is refused by name before a byte of a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amalgam.checkpoint.store import TensorStore
from amalgam.checkpoint.writer import write_checkpoint
from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import activation_for
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.placement import Rule
from amalgam.errors import CheckpointError, PlanError, UnsupportedError
from amalgam.models.families.qwen3_moe import FAMILY
from amalgam.models.registry import all_families, read_spec
from amalgam.models.weights import WeightVersion
from amalgam.tools.analyze import analyze_checkpoint
from tests.conftest import DEMO
from tests.errors import raises
from tests.models.tiny import BASE_CONFIG, save_tiny

CPU = torch.device("cpu")
UP = "model.layers.0.mlp.experts.3.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(FAMILY, folder)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    store = TensorStore.open(folder)
    tensors = {name: store.read(name).clone() for name in store}
    change(tensors)
    for file in store.files:
        file.unlink()
    write_checkpoint(folder, tensors.items())


def build(base: Path, *rules: tuple[str, str], **sources: Path) -> WeightVersion:
    mixed = MixedPrecisionSettings(
        sources={name: str(path) for name, path in sources.items()},
        rules=tuple(Rule(pattern=pattern, source=source) for pattern, source in rules),
    )
    loader = ModelLoader(ModelSettings(base_path=str(base), mixed_precision=mixed), InferenceSettings(), CPU, 2)
    return loader.build(loader.plan(), 1).version


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"num_experts": "absent", "num_local_experts": "absent"}, "num_experts"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok = 99"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "quantum"}}, "rope_type = 'quantum'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor = -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
        ({"architectures": []}, "architectures"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"moe_intermediate_size": 48}, "[48, 64]"),
        ({"num_experts": 9, "num_local_experts": 9}, "model.layers.0.mlp"),
        ({"vocab_size": 300}, "[300, 64]"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers = 1073741824"),
        ({"num_hidden_layers": 10**6}, 1024),
        ({"num_experts": 2**30, "num_local_experts": 2**30}, 2147483648),
        ({"num_experts": 10**5, "num_local_experts": 10**5}, 65536),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rms_norm_eps": -1}, "rms_norm_eps = -1"),
    ],
)
def test_a_config_that_does_not_fit(copy: Path, changes: dict[str, Any], named: object) -> None:
    change_config(copy, **changes)
    with raises((CheckpointError, PlanError, UnsupportedError), named):
        build(copy)


def test_a_missing_tensor_and_a_leftover_one(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(4, 4)}))
    with raises(CheckpointError, "model.layers.0.mlp.extra.weight"):
        build(copy)
    change_tensors(copy, lambda tensors: [tensors.pop(name) for name in ("model.layers.0.mlp.extra.weight", UP)])
    with raises(PlanError, UP):
        build(copy)


def test_what_is_left_over_is_counted_in_words(copy: Path) -> None:
    change_config(copy, num_hidden_layers=1)
    with raises(CheckpointError, "If layer 1 predicts further tokens"):
        build(copy)
    change_config(copy, num_hidden_layers=2)
    change_tensors(copy, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(4, 4)}))
    with raises(CheckpointError, "holds 1 weight that"):
        build(copy)


def test_a_source_with_another_shape(tiny: Path, copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.update({UP: torch.ones(16, 64)}))
    with raises(PlanError, "[16, 64]", "[32, 64]"):
        build(tiny, (UP, "other"), other=copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite(copy: Path, value: float) -> None:
    change_tensors(copy, lambda tensors: tensors[NORM][7:8].fill_(value))
    with raises(CheckpointError, NORM):
        build(copy)


def test_a_source_of_another_model(tiny: Path, copy: Path) -> None:
    change_config(copy, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with raises(CheckpointError, "other", 500000.0):
        build(tiny, (UP, "other"), other=copy)


def test_a_source_with_another_number_of_layers(tiny: Path, copy: Path) -> None:
    change_config(copy, num_hidden_layers=3)
    with raises(CheckpointError, "it has 3 layers and not 2", copy / "config.json") as caught:
        build(tiny, (UP, "other"), other=copy)
    assert "Attention" not in str(caught.value)


def test_an_integer_norm(tiny: Path, copy: Path) -> None:
    quantized = {NORM: torch.ones(1, 64, dtype=torch.int8), NORM + "_scale": torch.ones(1)}
    change_tensors(copy, lambda tensors: tensors.update(quantized))
    with raises(PlanError, NORM):
        build(tiny, (NORM, "other"), other=copy)


def test_a_source_that_is_not_used_is_not_opened(tiny: Path) -> None:
    assert build(tiny, other=Path("/nowhere")).nbytes > 0
    with raises(CheckpointError, "/nowhere"):
        build(tiny, (UP, "other"), other=Path("/nowhere"))


def test_a_shard_that_vanishes_while_loading_leaves_nothing_behind(copy: Path) -> None:
    loader = ModelLoader(ModelSettings(base_path=str(copy)), InferenceSettings(), CPU, 2)
    planned = loader.plan()
    (copy / "model.safetensors").write_bytes(b"changed")
    with raises(CheckpointError, copy / "model.safetensors"):
        loader.build(planned, 1)


def test_a_bin_checkpoint_gives_the_same_model(tiny: Path, tmp_path: Path) -> None:
    store = TensorStore.open(tiny)
    torch.save({name: store.read(name).clone() for name in store}, tmp_path / "pytorch_model.bin")
    shutil.copy(tiny / "config.json", tmp_path)
    first, second = build(tiny), build(tmp_path)
    for slot in first.origins:
        assert torch.equal(first[slot].dequantize(), second[slot].dequantize())
    assert first.fingerprint != second.fingerprint


def test_the_manifest_says_where_every_byte_came_from(tiny: Path) -> None:
    version = build(tiny)
    for origin in version.origins.values():
        (part,) = origin.parts
        with open(part.file, "rb") as file:
            file.seek(part.offset or 0)
            raw = torch.frombuffer(bytearray(file.read(part.nbytes)), dtype=torch.float32)
        assert torch.equal(raw.view(origin.shape), version[origin.slot].dequantize())


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_every_slot_has_a_name_of_its_own(family: Any) -> None:
    config = {**BASE_CONFIG, **family.tiny_config, "architectures": [family.architectures[0]]}
    _, spec = read_spec(config, "tiny")
    names = [family.logical_name(slot) for slot in spec.slots]
    assert len(set(names)) == len(names) == len({slot.name for slot in spec.slots})


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with raises(UnsupportedError, "GPTNeoXForCausalLM", "Qwen3MoeForCausalLM"):
        read_spec({"architectures": ["GPTNeoXForCausalLM"]}, "config.json")


def add_biases(folder: Path, modules: list[str], value: float, width: int | None = None) -> None:
    """Biases beside projections that the model has none for, as GPTQ's tools write them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for module in modules:
            rows = width or tensors[f"{module}.weight"].shape[0]
            tensors[f"{module}.bias"] = torch.full((rows,), value, dtype=torch.float16)

    change_tensors(folder, change)


PROJECTIONS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.0.mlp.experts.3.down_proj",
    "model.layers.1.mlp.gate",
    "lm_head",
]


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_biases_of_zeros_are_passed_over(tiny: Path, copy: Path, value: float) -> None:
    """Whether of the base or of another source, and what they stand beside."""
    add_biases(copy, PROJECTIONS, value)
    analysis = analyze_checkpoint(str(copy))
    assert len(analysis.notes) == 1 and f"{len(PROJECTIONS)} biases" in analysis.notes[0]
    expected = build(tiny)
    for version in (build(copy), build(tiny, ("model.layers.*", "zeros"), zeros=copy)):
        assert version.origins.keys() == expected.origins.keys()
        for slot in expected.origins:
            assert torch.equal(version[slot].dequantize(), expected[slot].dequantize())


@pytest.mark.parametrize("module", PROJECTIONS)
def test_biases_that_the_model_has_no_place_for_are_refused(tiny: Path, copy: Path, module: str) -> None:
    """With a cure: nothing that changes the result is dropped."""
    add_biases(copy, PROJECTIONS, 0.0)
    add_biases(copy, [module], 1e-6)
    for refused in (lambda: build(copy), lambda: build(tiny, ("model.layers.*", "other"), other=copy)):
        with raises(CheckpointError, f"{module}.bias", "attention_bias"):
            refused()


@pytest.mark.parametrize("module", ["model.norm", "model.layers.0.self_attn.q_norm", "model.layers.0.mlp"])
def test_zeros_beside_what_is_no_projection_are_refused(copy: Path, module: str) -> None:
    """A norm with a bias is another norm."""
    add_biases(copy, [module], 0.0, width=64)
    with raises(CheckpointError, f"{module}.bias"):
        build(copy)


def test_zeros_of_another_size_are_refused(copy: Path) -> None:
    add_biases(copy, PROJECTIONS[:1], 0.0, width=3)
    with raises(CheckpointError, "model.layers.0.self_attn.q_proj.bias"):
        build(copy)


def test_a_declaration_that_changed_makes_other_weights(tmp_path: Path) -> None:
    """Neither a reload nor the packed cache takes a weight whose bytes are the same and now mean something else."""
    save_tiny(FAMILY, tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update(as_fp8(tensors)))
    declared = {"quant_method": "fp8", "weight_scale_method": "row"}
    change_config(tmp_path, quantization_config=declared)
    settings = InferenceSettings(packed_cache=str(tmp_path / "cache"))
    loader = ModelLoader(ModelSettings(base_path=str(tmp_path)), settings, CPU, 2)
    first = loader.build(loader.plan(), 1).version
    change_config(tmp_path, quantization_config={**declared, "weight_scale_semantics": "inverse"})
    loader = loader.reopen()
    second = loader.build(loader.plan(), 2, first).version
    slot = "layers.0.attention.q"  # scales of 2
    assert torch.equal(first[slot].dequantize(), 4 * second[slot].dequantize())
    assert first.fingerprint != second.fingerprint
    assert first["layers.0.attention_norm"] is second["layers.0.attention_norm"]


def as_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [name for name in tensors if name.endswith("_proj.weight")]
    values = {name: tensors[name].to(torch.float8_e4m3fn) for name in names}
    return values | {f"{name}_scale_inv": torch.full((len(tensors[name]),), 2.0) for name in names}


@pytest.mark.parametrize(
    ("num_experts", "num_parameters", "expected"),
    [(0, 135_000_000, "bf16"), (0, 8_000_000_000, "int8"), (4, 135_000_000, "int8"), (128, 235_000_000_000, "int8")],
)
def test_activations_stay_wide_in_small_dense_models(num_experts: int, num_parameters: int, expected: str) -> None:
    spec: Any = SimpleNamespace(num_experts=num_experts, num_parameters=num_parameters)
    assert activation_for(spec, InferenceSettings()) == expected


def test_the_type_of_activations_can_be_said() -> None:
    def of(**inference: Any) -> str:
        return ModelLoader(ModelSettings(base_path=str(DEMO)), InferenceSettings(**inference), CPU, 1).activation

    assert [of(), of(activation="int8"), of(activation="bf16")] == ["int8", "int8", "bf16"]
