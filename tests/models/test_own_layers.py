"""Layers that config.json gives sizes of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amalgam.errors import CheckpointError, UnsupportedError
from amalgam.models.registry import read_spec
from tests.conftest import DEMO
from tests.errors import raises

CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text())


def test_layers_are_read_as_those_of_a_model_in_which_all_are_so() -> None:
    own = {"1": {"num_local_experts": 12}, "03": {"num_experts": 7}, "4": {"moe_intermediate_size": 64}, "5": {}}
    _, spec = read_spec({**CONFIG, "per_layer_config": own}, "config.json")
    _, whole = read_spec(CONFIG, "config.json")
    assert spec.expert_counts == (16, 12, 16, 7, 16, 16) and spec.num_experts == 16
    assert [spec.layers[n] == whole.layers[n] for n in range(6)] == [True, False, True, False, False, True]
    assert spec.num_active_parameters < whole.num_active_parameters
    assert read_spec({**CONFIG, "per_layer_config": {}}, "config.json")[1] == whole


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"6": {"num_experts": 8}}, "6"),
        ({"x": {"num_experts": 8}}, "x"),
        ({"1": {"num_experts": 8}, "01": {"num_experts": 8}}, "01"),
        ({"1": {"num_experts": 3}}, "num_experts_per_tok"),
        ({"1": {"num_experts_per_tok": 2}}, "num_experts_per_tok"),
        ({"1": {"num_experts": 8, "unheard_of": 1}}, "unheard_of"),
        ({"1": {"hidden_size": 128}}, "hidden_size"),
        ({"1": {"skip": ["mlp"]}}, "skip"),
        ({"1": 8}, "8"),
        ([8], "per_layer_config"),
    ],
)
def test_what_cannot_be_is_refused_by_name(own: Any, named: str) -> None:
    with raises((CheckpointError, UnsupportedError), named):
        read_spec({**CONFIG, "per_layer_config": own}, "config.json")
