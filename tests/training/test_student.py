"""The path that gradients go back: the same logits as the decoder's, and slopes as differences have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amalgam.errors import ConfigError
from amalgam.kernels.backends.reference.operators import Operators
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import GEGLU, SWIGLU, GatedActivation
from amalgam.models.registry import all_families, read_spec
from amalgam.models.spec import Family
from amalgam.training.initial import Shape, drawn_matrices, initial_weights, layers_taken, smaller_config
from amalgam.training.operators import TrainingOperators
from amalgam.training.selection import LEARNING, Selection, trained_weights
from amalgam.training.student import Student
from tests.errors import raises
from tests.models.harness import Runner, load_model
from tests.models.tiny import BASE_CONFIG, save_tiny

# Experts; windows, caps, norms around; latent keys; a delta rule beside attention; short convolutions; sinks.
FAMILIES = ("qwen3_moe", "gemma2", "deepseek_v3", "qwen3_next", "lfm2_moe", "gpt_oss")
TEXTS = [list(range(3, 43)), list(range(90, 115)), [5, 6, 7]]
LABEL = 5
CPU = torch.device("cpu")


def family(name: str) -> Family:
    return next(each for each in all_families() if each.name == name)


def student_of(folder: Path) -> tuple[Student, Tensor]:
    """A student of which all learns, and the decoder's logits of the texts."""
    decoder, version = load_model(folder)
    weights = {slot: dense(version[slot].dequantize(torch.float32)) for slot in version.origins}
    trained = trained_weights(decoder.spec.slots, weights, {}, Selection(LEARNING), lambda slot: None, 0)
    logits = Runner(decoder, version).step(dict(enumerate(TEXTS)))
    return Student(decoder.spec, weights, trained, 64, CPU), torch.cat([logits[index] for index in range(len(TEXTS))])


def likelihood(student: Student) -> Tensor:
    weights = student.expanded()
    logits = student.logits(weights, student.hidden(weights, TEXTS))
    value = logits.double().log_softmax(-1)[:, LABEL].mean()
    value.backward()
    weights.backward()
    return value.detach()


@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_what_the_decoder_computes(name: str, tmp_path: Path) -> None:
    save_tiny(family(name), tmp_path)
    student, expected = student_of(tmp_path)
    weights = student.fixed()
    found = student.logits(weights, student.hidden(weights, TEXTS))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))

    before = float(likelihood(student))
    slopes = {key: leaf.grad.clone() for key, leaf in student.parameters.items() if leaf.grad is not None}
    silent = {key for key in student.parameters if key not in slopes and ".experts." not in key}
    assert not silent and all(bool(slope.isfinite().all()) for slope in slopes.values())
    gain = 1e-3
    step = gain / sum(float(slope.square().sum()) for slope in slopes.values())
    with torch.no_grad():
        for key, slope in slopes.items():
            student.parameters[key].add_(slope, alpha=step)
    assert float(likelihood(student)) - before == pytest.approx(gain, rel=0.2)


@pytest.mark.parametrize(("width", "layers"), [(0.5, None), (1.0, 1), (0.5, 1)])
def test_slices_of_a_teacher_make_a_model(width: float, layers: int | None, tmp_path: Path) -> None:
    save_tiny(family("qwen3_moe"), tmp_path)
    decoder, version = load_model(tmp_path)
    config = smaller_config(json.loads((tmp_path / "config.json").read_text()), Shape(width, layers))
    _, spec = read_spec(config, "here")
    assert spec.hidden_size == 64 * width and spec.num_layers == (layers or 2)
    assert spec.num_parameters < decoder.spec.num_parameters

    def value_of(slot: str) -> Tensor:
        return version[slot].dequantize(torch.float32)

    made = {slot.name: value for slot, value in initial_weights(spec, decoder.spec, value_of, "slices", None, 0)}
    assert {slot.name: slot.shape for slot in spec.slots} == {name: tuple(value.shape) for name, value in made.items()}
    rows, columns = made["layers.0.attention.o"].shape
    assert torch.equal(made["layers.0.attention.o"], value_of("layers.0.attention.o")[:rows, :columns])
    assert drawn_matrices(spec, decoder.spec) == []
    drawn = dict(initial_weights(spec, decoder.spec, value_of, "random", 0.5, 0))
    by_name = {slot.name: value for slot, value in drawn.items()}
    assert float(by_name["embedding"].std()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(by_name["norm"], torch.ones(spec.hidden_size))


def test_what_several_weights_in_one_have_no_slice_of_is_named() -> None:
    config = {**BASE_CONFIG, **family("phi3").tiny_config, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    (_, teacher), (_, narrow), (_, short) = (
        read_spec(smaller_config(config, shape), "here") for shape in (Shape(), Shape(0.5), Shape(1.0, 1))
    )
    assert {name.rpartition(".")[2] for name in drawn_matrices(narrow, teacher)} == {"qkv", "gate_up"}
    assert drawn_matrices(short, teacher) == []


def test_layers_are_taken_from_the_first_to_the_last() -> None:
    assert layers_taken(6, 3) == [0, 2, 5] and layers_taken(6, 1) == [0] and layers_taken(4, 4) == [0, 1, 2, 3]


def test_layers_with_sizes_of_their_own_are_renumbered_and_narrowed() -> None:
    own = {"3": {"num_experts": 5, "moe_intermediate_size": 64}, "1": {"num_experts": 6}}
    config = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": 4}
    made = smaller_config({**config, "per_layer_config": own}, Shape(0.5, 2))
    assert made["per_layer_config"] == {"1": {"num_experts": 5, "moe_intermediate_size": 32}}
    own["0"] = {"num_key_value_heads": 3}
    with raises(ConfigError, "num_key_value_heads", 3):
        smaller_config({**config, "per_layer_config": own}, Shape(0.5))


def activated(name: str, x: Tensor) -> Tensor:
    found = getattr(TrainingOperators, name)(x)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("value", [-1000.0, -100.0, -20.0, -1.0, 1.0, 100.0, 1000.0])
def test_gradients_far_from_0_are_finite(value: float) -> None:
    """And values are the reference's."""
    up = torch.ones(1)
    for activation in (SWIGLU, GEGLU, GatedActivation(alpha=1.702, offset=1.0, limit=2000.0)):
        gate = torch.tensor([value], requires_grad=True)
        found = TrainingOperators.gated(gate, up, activation)
        torch.testing.assert_close(found, Operators.gated(gate, up, activation), rtol=1e-4, atol=1e-6)
        found.sum().backward()
        assert gate.grad is not None and bool(gate.grad.isfinite().all())
    for name in ("sigmoid", "softplus", "gelu"):
        x = torch.tensor([value], requires_grad=True)
        activated(name, x).sum().backward()
        assert x.grad is not None and bool(x.grad.isfinite().all())
        torch.testing.assert_close(activated(name, x), getattr(Operators, name)(x), rtol=1e-4, atol=1e-6)
