"""What is estimated is what a process then takes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from amalgam.base.sizes import human_bytes
from amalgam.checkpoint.store import TensorStore
from amalgam.cli import main
from amalgam.config.reading import load_settings
from amalgam.config.settings import Settings
from amalgam.planning.cards import parse_card
from amalgam.tools.estimate import estimate
from tests.conftest import DEMO, ROOT

FILL_THE_CACHE = """
import json, sys
from amalgam import LLM, SamplingParams
from amalgam.config.reading import load_settings
from amalgam.planning.cards import parse_card
from amalgam.tools.estimate import estimate
overrides = {"inference.max_batch_size": 16, "inference.max_seq_length": 1024, "engine.num_threads": 1}
found = estimate(load_settings(sys.argv[1], overrides))
with LLM(config=sys.argv[1], settings=overrides) as llm:
    prompts = [f"{index} " + "word " * 930 for index in range(16)]  # the first decodes until the last has come
    params = SamplingParams(max_new_tokens=1000, ignore_eos=True, do_sample=False, repetition_penalty=1.0)
    answers = llm.generate(prompts, params)
    assert all(a.usage.num_prompt_tokens + a.usage.num_new_tokens == 1024 for a in answers)
    peak = llm.model_info()["memory"]["process_peak_bytes"]
print(json.dumps({**found.as_json(), "peak_bytes": peak}))
"""


@pytest.fixture
def demo_config(demo_config: Path) -> Path:
    """Without a packed cache, which is pages of a file and no memory of the process's own."""
    demo_config.write_text(demo_config.read_text().partition("inference:")[0])
    return demo_config


def test_the_demo_takes_what_was_estimated(demo_config: Path) -> None:
    """What a process takes beyond one without a model, its whole KV cache filled, within 15%."""
    environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FILL_THE_CACHE, str(demo_config)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    parts = found["weights_bytes"], found["kv_bytes"], found["workspace_bytes"]
    assert found["total_bytes"] == sum(parts) + found["process_bytes"]
    taken = found["peak_bytes"] - found["process_bytes"]
    assert 0.85 * taken <= sum(parts) <= 1.15 * taken


def test_weights_are_exact_and_kv_grows_with_length_and_batch(demo_config: Path) -> None:
    settings = load_settings(demo_config, environ={})
    small, large = estimate(settings, 128, 1), estimate(settings, 256, 4)
    assert set(small.weights) == {"bf16", "fp8", "int4"}
    assert large.kv_bytes == 8 * small.kv_bytes == 8 * 128 * small.kv_bytes_per_token
    assert small.kv_bytes_per_token == 6 * 2 * 2 * 64 * 2
    coded = load_settings(demo_config, {"engine.kv_dtype": "int8"}, environ={})
    assert estimate(coded, 128, 1).kv_bytes_per_token == 6 * 2 * 2 * (64 + 4)
    sizes = {row.format: row.weights_bytes for row in small.uniform}
    assert sizes["fp32"] > sizes["bf16"] > sizes["int8"] > sizes["int4"]
    assert small.fits
    assert small.max_tokens_that_fit > 1000


def test_the_rule_of_thumb_is_explained_by_parts(demo_config: Path) -> None:
    """2 bytes × 1.2 × billions of parameters: how many there are, what each takes, what stands behind the fifth."""
    store = TensorStore.open(DEMO)
    names = [name for name in store if name != "lm_head.weight"]  # the same as the embeddings
    found = estimate(load_settings(demo_config, {"inference.bf16_coding": False}, {}), 128, 1)
    assert found.num_parameters == sum(math.prod(store[name].shape) for name in names)
    assert found.rule_bytes == round(2.4 * found.num_parameters)
    assert replace(found, num_parameters=25_800_000_000).rule_bytes == 61_920_000_000
    assert found.weights_bytes == sum(found.weights.values())
    assert found.bytes_per_parameter * found.num_parameters == pytest.approx(found.weights_bytes)
    beside = found.kv_bytes + found.state_bytes + found.draft_bytes + found.workspace_bytes + found.process_bytes
    assert found.total_bytes == found.weights_bytes + beside
    assert found.share_beside_weights == pytest.approx(beside / found.weights_bytes)
    wide = next(row for row in found.uniform if row.format == "bf16")
    assert wide.weights_bytes / found.num_parameters == pytest.approx(2, rel=0.01)  # routers have float32
    assert wide.total_bytes == wide.weights_bytes + beside


def test_the_command_shows_each_part(demo_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", "--config", str(demo_config), "--length", "256", "--batch", "4"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "It fits." in said
    shown = dict(line.split("\t") for line in said.splitlines() if line.count("\t") == 1)
    found = estimate(load_settings(demo_config, environ={}), 256, 4)
    parts = {f"weights in {name}": size for name, size in found.weights.items()}
    parts[f"KV cache ({human_bytes(found.kv_bytes_per_token)} per token)"] = found.kv_bytes
    parts["workspace of a step"] = found.workspace_bytes
    assert {name: shown[name] for name in parts} == {name: human_bytes(size) for name, size in parts.items()}
    rest = set(shown) - set(parts) - {"memory for"}
    assert rest == {"the program itself", "all", "available now"}  # which change from one moment to the next
    assert f"{found.num_parameters / 1e9:.3g} billion parameters, says {human_bytes(found.rule_bytes)}" in said
    assert f"take {found.bytes_per_parameter:.2f} bytes for each" in said
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["weights"] == found.weights and told["num_parameters"] == found.num_parameters
    assert told["total_bytes"] == sum(parts.values()) + told["process_bytes"]


def test_the_command_says_what_does_not_fit(demo_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--config", str(demo_config), "--batch", "100000000"]) == 0
    assert "does NOT fit" in capsys.readouterr().out


def test_a_card_that_is_not_here_is_asked_about(demo_config: Path) -> None:
    settings = load_settings(demo_config, environ={})
    here, there = estimate(settings, 128, 1), estimate(settings, 128, 1, parse_card("25MB@1000GB/s", "--gpu"))
    assert [each.name for each in here.devices] == ["cpu"] and here.devices[0].seconds is None
    [card] = there.devices
    assert card.name == "cuda" and there.available_bytes == 25 * 10**6 == card.available_bytes
    assert there.fits == card.fits == (there.total_bytes <= 25 * 10**6) and card.total_bytes == there.total_bytes
    # A quarter of the experts' weights, everything else but what is looked up; the head is the embedding.
    assert card.read_bytes == card.dense_bytes + card.expert_bytes // 4
    assert card.seconds == card.read_bytes / 1e12


def test_experts_elsewhere_count_there(demo_config: Path) -> None:
    rule = {"pattern": "model.layers.*.mlp.experts.{0-7}.*", "source": "int4"}

    def settings_with(rule: dict[str, str]) -> Settings:
        settings = load_settings(demo_config, environ={})
        mixed = settings.model.mixed_precision.model_dump() | {"rules": [rule]}
        return settings.replace(model={**settings.model.model_dump(), "mixed_precision": mixed})

    whole, settings = estimate(settings_with(rule), 128, 1), settings_with(rule | {"device": "cpu:1"})
    for limit, fits in (("100MB", True), ("1MB", False)):
        inference = {**settings.inference.model_dump(), "devices": {"cpu:1": limit}}
        split = estimate(settings.replace(inference=inference), 128, 1)
        near, far = split.devices
        assert (near.name, far.name, near.num_experts, far.num_experts) == ("cpu", "cpu:1", 48, 48)
        assert far.dense_bytes == far.other_bytes == 0 < far.expert_bytes
        assert near.expert_bytes + far.expert_bytes == whole.devices[0].expert_bytes
        assert split.weights_bytes == whole.weights_bytes and far.fits == split.fits == fits


@pytest.mark.parametrize("verb", [["estimate", "--model"], ["fit", "--no-measure", "--model"]])
def test_headers_are_enough(verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a checkpoint whose tokenizer was not downloaded."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / name, tmp_path)
    assert main([*verb, str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["has_tokenizer"] is False
    assert main([*verb, str(tmp_path)]) == 0
    assert "no tokenizer" in capsys.readouterr().err
    assert main([*verb, str(DEMO), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["has_tokenizer"] is True
    (tmp_path / "tokenizer.json").write_text("{")
    assert main([*verb, str(tmp_path)]) == 3
