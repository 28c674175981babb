"""Which device a weight lies on, what may lie apart, and how much room a device has."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.composition.loader import ModelLoader
from amalgam.composition.progress import LOADING
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.config.placement import Rule, build_rules
from amalgam.errors import ConfigError, OutOfMemoryError, PlanError
from tests.conftest import DEMO
from tests.errors import raises

EXPERT = "model.layers.1.mlp.experts.7"
OF_EXPERT = f"{EXPERT}.*"
EXPERTS = "model.layers.*.mlp.experts.*"


def opened(derived: Path, device: str = "cpu", **inference: Any) -> ModelLoader:
    mixed = {"fp8_path": str(derived / "fp8"), "int4_path": str(derived / "int4")}
    model = ModelSettings.model_validate({"base_path": str(DEMO), "mixed_precision": mixed})
    return ModelLoader(model, InferenceSettings(**inference), torch.device(device), 2)


@pytest.fixture(scope="module")
def loader(derived: Path) -> ModelLoader:
    return opened(derived, devices={"cpu:1": "2MB"})


def test_sources_and_devices_are_decided_apart(loader: ModelLoader) -> None:
    rules = build_rules({
        EXPERTS: "int4",
        "model.layers.1.mlp.experts.*": {"source": "fp8", "device": "cpu:1"},
        OF_EXPERT: {"device": "cpu"},  # where the model runs, and its source stays
        "model.layers.1.mlp.experts.8.*": "int4",  # which stays where it is
    })  # fmt: skip
    found = {weight.choice.name: weight for weight in loader.plan(rules)}

    def of(expert: str) -> tuple[str, str | None]:
        weight = found[f"model.layers.{expert}.up_proj.weight"]
        return weight.choice.source, weight.device

    assert of("0.mlp.experts.7") == ("int4", None)
    assert of("1.mlp.experts.0") == ("fp8", "cpu:1")
    assert of("1.mlp.experts.7") == ("fp8", None)
    assert of("1.mlp.experts.8") == ("int4", "cpu:1")
    assert found["model.norm.weight"].device is None
    explained = loader.choose(rules).explain(f"{EXPERT}.up_proj.weight")
    assert [rule.pattern for rule in explained.matching] == ["model.layers.1.mlp.experts.*", EXPERTS]
    assert [rule.device for rule in explained.placing] == ["cpu", "cpu:1"]


def test_a_device_alone_keeps_the_default_source_and_what_is_quantized_while_loading(derived: Path) -> None:
    loader = opened(derived, devices={"cpu:1": None}, load_in_8bit=True)
    planned = loader.plan(build_rules({OF_EXPERT: {"device": "cpu:1"}}))
    [moved, *_] = [weight for weight in planned if weight.device is not None]
    assert (moved.choice.source, moved.format.name) == ("base", "int8")


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"model.layers.1.self_attn.*": {"device": "cpu:1"}}, ["model.layers.1.self_attn.q_proj.weight", "cpu:1"]),
        ({"model.layers.1.*": {"device": "cpu:1"}}, ["model.layers.1.*", "cpu:1", "cpu"]),
        ({"*": {"source": "base", "device": "cpu:1"}}, ["'*'", "model.embed_tokens.weight"]),
        ({f"{EXPERT}.up_proj.weight": {"device": "cpu:1"}}, [f"{EXPERT}.up_proj.weight", "cpu:1"]),
        ({OF_EXPERT: {"device": "cpu:2"}}, [OF_EXPERT, "cpu:2", "cpu:1"]),
        ({"model.layers.9.*": {"device": "cpu:1"}}, ["model.layers.9.*"]),
    ],
)
def test_what_cannot_lie_apart_is_refused_by_name(loader: ModelLoader, rules: Any, named: list[str]) -> None:
    with raises(PlanError, *named):
        loader.plan(build_rules(rules))


def test_the_device_of_the_model_may_be_named_for_all(loader: ModelLoader) -> None:
    assert all(weight.device is None for weight in loader.plan(build_rules({"*": {"device": "cpu"}})))


def test_a_plan_for_a_card_needs_none_and_weights_do(loader: ModelLoader) -> None:
    """A plan for another machine can be looked at."""
    planned = loader.plan(build_rules({OF_EXPERT: {"device": "cuda:7"}}))
    assert {weight.device for weight in planned} == {None, "cuda:7"}
    with raises(ConfigError, "cuda:7", torch.cuda.device_count()):
        loader.build(planned, 1)


def test_a_device_has_the_room_that_it_is_given(loader: ModelLoader) -> None:
    few = build_rules({OF_EXPERT: {"device": "cpu:1"}})
    first = loader.build(loader.plan(few), 1)
    used = loader.devices.used_bytes("cpu:1")
    assert 0 < used == sum(first.version[slot].nbytes for slot in first.version.devices)
    assert loader.devices.room("cpu:1").available_bytes == 2_000_000 - used
    more = loader.plan((*few, Rule(pattern="model.layers.0.mlp.experts.*", device="cpu:1")))
    with raises(OutOfMemoryError, "cpu:1", 2_000_000, 2_000_000 - used):
        loader.build(more, 2, first.version)
    assert loader.devices.used_bytes("cpu:1") == used

    again = loader.build(loader.plan(few), 3, first.version)
    assert again.num_loaded == 0 and loader.devices.uploaded_bytes == {"cpu:1": used}
    back = loader.build(loader.plan(()), 4, again.version)
    assert (back.num_loaded, back.version.devices) == (3, {})
    del first, again
    gc.collect()
    assert loader.devices.used_bytes("cpu:1") == 0


def test_the_device_of_the_model_may_be_limited_too(derived: Path) -> None:
    loader = opened(derived, devices={"cpu": "1MB"})
    with raises(OutOfMemoryError, "cpu", 1_000_000):
        loader.build(loader.plan(()), 1)


def test_weights_elsewhere_are_no_pages_of_the_packed_cache(derived: Path, tmp_path: Path) -> None:
    loader = opened(derived, devices={"cpu:1": None}, packed_cache=str(tmp_path))
    if loader.cache_folder is None:
        pytest.skip("there are no native kernels")
    planned = loader.plan(build_rules({OF_EXPERT: {"device": "cpu:1"}}))
    said: list[tuple[str, int, int]] = []
    version = loader.build(planned, 1, progress=lambda *how_far: said.append(how_far)).version
    assert version.mapped_bytes > 0
    assert not any(version[slot].is_mapped for slot in version.devices) and len(version.devices) == 3
    total = sum(weight.stored.nbytes for weight in planned)
    done = [nbytes for _, nbytes, _ in said]
    assert {(what, of) for what, _, of in said} == {(LOADING, total)}, "one progress over all of them"
    assert done == sorted(done) and (len(done), done[-1]) == (len(planned), total)
