"""A model with experts on two devices: the answers of one device, and experts that move while requests run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from amalgam.config.reading import load_settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason
from amalgam.errors import OutOfMemoryError, PlanError
from amalgam.runtime.changes import ChangeRequest, merged
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from amalgam.server.dashboard.mapping import configuration
from tests.conftest import write_demo_config
from tests.engine.running import wait_until
from tests.errors import raises

EXPERTS = "model.layers.*.mlp.experts.*"
HOT, COLD = "model.layers.*.mlp.experts.{0-7}.*", "model.layers.*.mlp.experts.{8-15}.*"
AWAY, HERE = {"device": "cpu:1"}, {"device": "cpu"}
PROMPTS = ("The old man looked at the sea. ", "Once upon a time", "def add(a, b):")


def opened(derived: Path, folder: Path, **overrides: Any) -> Deployment:
    settings = {"inference.max_seq_length": 256, "engine.rollback_answers": 0, "inference.devices": {"cpu:1": "12MB"}}
    return open_deployment(load_settings(write_demo_config(folder, derived), {**settings, **overrides}, {}))


@pytest.fixture(scope="module")
def shared(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    deployment = opened(derived, tmp_path_factory.mktemp("devices"))
    yield deployment
    deployment.close()


@pytest.fixture
def deployment(shared: Deployment) -> Iterator[Deployment]:
    """All experts where the model runs."""
    yield shared
    if shared.rules != shared.configured_rules:
        shared.change(ChangeRequest(rules=shared.configured_rules))


def answers(deployment: Deployment, num_tokens: int = 8) -> list[tuple[int, ...]]:
    prompts = [deployment.tokenizer.encode(prompt) for prompt in PROMPTS]
    params = SamplingParams(max_new_tokens=num_tokens, do_sample=False)
    return [generation.token_ids for generation in deployment.engine.generate(prompts, params)]


def place(deployment: Deployment, mapping: Mapping[str, Any]) -> Any:
    return deployment.update_weight_mapping(mapping)


def test_answers_and_statistics_are_those_of_one_device(deployment: Deployment) -> None:
    assert deployment.statistics is not None
    counted = deployment.statistics.tracker.activations
    start = counted()
    expected = answers(deployment)
    after_one = counted()
    result = place(deployment, {HOT: AWAY})
    assert result.num_loaded == len(result.changed) == 6 * 8 * 3
    assert {(change.device_before, change.device_after) for change in result.changed} == {(None, "cpu:1")}
    assert answers(deployment) == expected
    assert (counted() - after_one == after_one - start).all()
    kernels = deployment.engine.kernels
    assert "8 of 16" in kernels["mix"] and "cpu:1" in kernels["mix"]


def test_experts_move_while_requests_run(deployment: Deployment) -> None:
    """There and back, under streams: no request ends early, and no answer changes."""
    expected, stop, failed = answers(deployment, 16), threading.Event(), []

    def traffic() -> int:
        count = 0
        while not stop.is_set():
            prompt = count % len(PROMPTS)
            ids = deployment.tokenizer.encode(PROMPTS[prompt])
            [found] = deployment.engine.generate([ids], SamplingParams(max_new_tokens=16, do_sample=False))
            if found.token_ids != expected[prompt] or found.finish_reason is FinishReason.ERROR:
                failed.append(found)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(traffic) for _ in range(2)]
        try:
            moves: list[dict[str, Any]] = [
                {HOT: AWAY},
                {HOT: HERE, COLD: AWAY},
                {HOT: AWAY, COLD: HERE},
                {EXPERTS: HERE, HOT: HERE},
            ]
            for move in moves:
                before = deployment.version
                place(deployment, move)
                stays = [
                    slot for slot in before.keys if before.devices.get(slot) == deployment.version.devices.get(slot)
                ]
                assert all(deployment.version[slot] is before[slot] for slot in stays) and stays
                seen = deployment.engine.meter.read().finished.get(FinishReason.LENGTH, 0)
                while deployment.engine.meter.read().finished.get(FinishReason.LENGTH, 0) < seen + 2:
                    stop.wait(0.02)  # requests begin and end on each version
        finally:
            stop.set()
        assert not failed and all(future.result() > 0 for future in running)


def test_a_placement_is_looked_at_before_it_is_made(deployment: Deployment) -> None:
    one = "model.layers.0.mlp.experts.3.*"
    plan = deployment.plan_change(ChangeRequest({one: AWAY}))
    there = plan.devices["cpu:1"]
    assert list(plan.devices) == ["cpu", "cpu:1"] and (plan.devices["cpu"].new_bytes, there.used_bytes) == (0, 0)
    assert (there.limit_bytes, there.available_bytes, there.bytes) == (12_000_000, 12_000_000, there.new_bytes)
    assert plan.has_room and plan.load.num_weights == 3
    before = deployment.device_figures()["cpu:1"]
    place(deployment, {one: AWAY})
    figures = deployment.device_figures()
    after = figures["cpu:1"]
    assert (figures["cpu"].experts, before.experts, after.experts) == (95, 0, 1)
    assert after.used_bytes == after.uploaded_bytes - before.uploaded_bytes
    assert after.used_bytes == pytest.approx(there.new_bytes, rel=0.03)

    too_many = ChangeRequest({EXPERTS: {"source": "base", "device": "cpu:1"}})
    assert not deployment.plan_change(too_many).has_room
    version = deployment.version
    with raises(OutOfMemoryError, "cpu:1", 12_000_000):
        deployment.change(too_many)
    with raises(PlanError, "model.norm.weight", "cpu:1"):
        place(deployment, {"model.norm.weight": AWAY})
    assert deployment.version is version


def test_versions_that_are_kept_take_part_of_what_a_device_has(deployment: Deployment) -> None:
    place(deployment, {HOT: {"source": "base", **AWAY}})
    kept = deployment.versions.pin(deployment.version_id).version_id
    place(deployment, {HOT: {"source": "fp8", **AWAY}})
    used = deployment.device_figures()["cpu:1"].used_bytes
    there = deployment.model_info()["devices"]["cpu:1"]["bytes"]
    more = {COLD: {"source": "base", **AWAY}}
    with raises(OutOfMemoryError, "cpu:1", used, used - there, 12_000_000):
        place(deployment, more)
    deployment.versions.unpin(kept)
    place(deployment, more)


def test_a_change_waits_for_the_memory_of_a_version_that_drains(deployment: Deployment) -> None:
    place(deployment, {HOT: {"source": "base", **AWAY}})
    held = [deployment.version]  # as a request in flight does
    place(deployment, {HOT: HERE})
    assert deployment.device_figures()["cpu:1"].used_bytes > 6_000_000

    def let_go() -> None:
        wait_until(lambda: deployment.jobs.running is not None)
        held.clear()

    with ThreadPoolExecutor(1) as pool:
        gone = pool.submit(let_go)
        place(deployment, {COLD: {"source": "base", **AWAY}})
        gone.result()


def test_the_model_says_what_lies_where(deployment: Deployment) -> None:
    place(deployment, {HOT: AWAY})
    before = deployment.device_figures()["cpu:1"]
    answers(deployment, 2)
    info = deployment.model_info()
    assert info["device"] == "cpu" and list(info["devices"]) == ["cpu", "cpu:1"]
    there = info["devices"]["cpu:1"]
    assert there["bytes"] + info["devices"]["cpu"]["bytes"] == info["memory"]["weights_bytes"]
    assert there["experts"] == 48 and there["sent_bytes"] > before.sent_bytes and there["rows"] > before.rows
    hidden = 4 * deployment.spec.hidden_size
    assert there["returned_bytes"] == there["rows"] * hidden
    assert {"pattern": HOT, "device": "cpu:1"} in info["rules"]
    [version, *_] = deployment.describe_weights()["versions"]
    assert version["bytes_by_device"]["cpu:1"] == there["bytes"]
    found = {weight["slot"]: weight["device"] for weight in deployment.manifest()["weights"]}
    assert (found["layers.0.mlp.experts.7.up"], found["layers.0.mlp.experts.8.up"]) == ("cpu:1", None)
    assert {part["device"] for part in deployment.expert_info(0, 7)["projections"]} == {"cpu:1"}
    assert deployment.statistics is not None
    devices = deployment.statistics.precision_map()["devices"]
    assert devices == [["cpu:1"] * 8 + [None] * 8] * 6


def test_a_card_is_called_by_its_number(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in releases before there were several devices."""
    monkeypatch.setattr(deployment.loader, "device", torch.device("cuda", 0))
    assert deployment.model_info()["device"] == "cuda:0"


def test_undo_and_a_saved_mapping_keep_devices(deployment: Deployment, tmp_path: Path) -> None:
    place(deployment, {HOT: AWAY})
    section = yaml.safe_load(configuration(deployment))
    (tmp_path / "saved.yaml").write_text(json.dumps(section))
    saved = load_settings(tmp_path / "saved.yaml", {}, {})
    assert saved.model.mixed_precision.all_rules == deployment.rules
    assert saved.inference.devices == {"cpu:1": "12MB"}
    place(deployment, {HOT: "fp8"})  # which moves nothing
    assert deployment.rules[-1].model_dump() == {"pattern": HOT, "source": "fp8", "device": "cpu:1"}
    assert deployment.undo_weight_mapping(deployment.version_id).num_loaded > 0
    assert deployment.rules[-1].model_dump() == {"pattern": HOT, "device": "cpu:1"}


def test_a_mapping_says_again_what_it_changes_only() -> None:
    rules: tuple[Any, ...] = ()
    for mapping, expected in (
        ({"a": "fp8"}, {"pattern": "a", "source": "fp8"}),
        ({"a": {"device": "cuda"}}, {"pattern": "a", "source": "fp8", "device": "cuda"}),
        ({"a": {"source": "int4"}}, {"pattern": "a", "source": "int4", "device": "cuda"}),
        ({"a": {"source": "fp8", "device": "cpu"}}, {"pattern": "a", "source": "fp8", "device": "cpu"}),
    ):
        rules = merged(rules, mapping)
        assert [rule.model_dump() for rule in rules] == [expected]
    assert merged(rules, {"a": None}) == ()


def test_a_restart_goes_on_with_experts_where_they_were(derived: Path, tmp_path: Path) -> None:
    history = {"weights.history": str(tmp_path / "history.jsonl"), "weights.resume": True}
    first = opened(derived, tmp_path, **history)
    place(first, {HOT: AWAY})
    rules, expected = first.rules, answers(first, 4)
    first.close()
    second = opened(derived, tmp_path, **history)
    assert second.rules == rules and second.version.devices and answers(second, 4) == expected
    second.close()


def test_the_model_may_run_on_a_stand_in_and_guess_for_itself(derived: Path, tmp_path: Path) -> None:
    """Dense weights and some experts there, the others on the processors, and those of its draft beside them."""
    speculation = {"speculation.kind": "self", "speculation.source": "int4", "speculation.adaptive": False}
    rules = [{"pattern": COLD, "source": "fp8", "device": "cpu"}]
    placed = {"inference.device_map": "cpu:1", "inference.devices": {}, "model.mixed_precision.rules": rules}
    plain = opened(derived, tmp_path, **{"model.mixed_precision.rules": [{"pattern": COLD, "source": "fp8"}]})
    expected = answers(plain)
    plain.close()
    deployment = opened(derived, tmp_path, **placed, **speculation)
    assert answers(deployment) == expected
    assert list(deployment.device_figures()) == ["cpu:1", "cpu"]
    assert deployment.engine.speculator is not None and deployment.engine.speculator.counts.num_accepted > 0
    deployment.close()
