"""The demo model in three precisions: batch invariance, re-maps under load, reloads, and what they refuse."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.base.locks import FileLock
from amalgam.composition.loader import ModelLoader
from amalgam.composition.source import Source
from amalgam.config.reading import load_settings
from amalgam.config.settings import build_settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Generation
from amalgam.errors import CheckpointError, ConfigError, ConflictError, PlanError, UnavailableError
from amalgam.runtime.changes import ChangeRequest
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from tests.conftest import DEMO, write_demo_config
from tests.errors import raises

EXPERTS = "model.layers.*.mlp.experts.*"
PROMPTS = [
    text * (1 + index % 5)
    for index, text in enumerate(
        ["The old man looked at the sea. ", "明月几时有，把酒问青天。", "def main(argv):\n    ", "import os\n"] * 8
    )
]
PARAMS = [
    SamplingParams(max_new_tokens=4 + 3 * (index % 6), temperature=1.0, seed=index, do_sample=index % 2 == 0)
    for index in range(32)
]


@contextmanager
def opened(config: Path, **inference: object) -> Iterator[Deployment]:
    changes: dict[str, object] = {"engine.max_step_tokens": 64, "inference.max_seq_length": 512}
    changes |= {f"inference.{name}": value for name, value in inference.items()}
    deployment = open_deployment(load_settings(config, changes, {}))
    yield deployment
    deployment.close()


@pytest.fixture
def deployment(demo_config: Path) -> Iterator[Deployment]:
    with opened(demo_config) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def shared(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """For tests that change nothing of it."""
    with opened(write_demo_config(tmp_path_factory.mktemp("shared"), derived)) as deployment:
        yield deployment


def run(deployment: Deployment, indices: list[int]) -> list[Generation]:
    token_ids = [deployment.tokenizer.encode(PROMPTS[index]) for index in indices]
    return deployment.engine.generate(token_ids, [PARAMS[index] for index in indices])


def test_32_requests_together_get_what_each_gets_alone(shared: Deployment) -> None:
    alone = [run(shared, [index])[0].token_ids for index in range(32)]
    together = [answer.token_ids for answer in run(shared, list(range(32)))]
    assert together == alone
    assert len(set(alone)) > 16


def test_statistics_are_exact_under_load(deployment: Deployment) -> None:
    answers = run(deployment, list(range(32)))
    assert deployment.statistics is not None
    snapshot = deployment.statistics.saved_set()
    # The last token of an answer is never fed back: nobody computes it.
    usages = [answer.usage for answer in answers]
    tokens = sum(u.num_prompt_tokens + u.num_new_tokens - 1 - u.num_cached_tokens for u in usages)
    assert any(usage.num_cached_tokens for usage in usages)
    assert int(snapshot.total.counts.sum()) == tokens * 4 * 6
    assert snapshot.total.counts.sum(axis=(0, 2)).tolist() == [tokens * 4] * 6


def test_a_remap_under_load_gives_each_answer_one_mapping(deployment: Deployment) -> None:
    mappings = [{EXPERTS: "int4"}, {EXPERTS: "fp8"}, {EXPERTS: "base"}]
    before = [answer.token_ids for answer in run(deployment, list(range(32)))]
    expected = {1: before}
    answers: list[tuple[int, Generation]] = []
    stop = threading.Event()

    def traffic() -> None:
        while not stop.is_set():
            indices = list(range(32))
            answers.extend(zip(indices, run(deployment, indices), strict=True))

    def wait_for_answers_of(version: int) -> None:
        deadline = time.monotonic() + 60
        while not stop.is_set() and version not in {answer.usage.version for _, answer in list(answers)}:
            assert time.monotonic() < deadline, f"no answers of version {version}"
            time.sleep(0.05)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(traffic) for _ in range(2)]
        versions = []
        try:
            wait_for_answers_of(1)
            for mapping in mappings:
                versions.append(deployment.update_weight_mapping(mapping).version)
                wait_for_answers_of(versions[-1])
        finally:
            stop.set()
        for future in running:
            future.result()

    for mapping, version in zip(mappings, versions, strict=True):
        deployment.update_weight_mapping(mapping)
        expected[version] = [answer.token_ids for answer in run(deployment, list(range(32)))]
    assert {answer.usage.version for _, answer in answers} == {1, *versions}
    for index, answer in answers:
        assert answer.error is None
        assert answer.token_ids == expected[answer.usage.version][index]
    assert deployment.engine.status().versions == {deployment.version.version_id: 0}


def test_activations_are_counted_under_the_format_that_they_had(deployment: Deployment) -> None:
    statistics, few = deployment.statistics, "model.layers.*.mlp.experts.{0-3}.*"  # in fp8; the others are in int4
    assert statistics is not None
    run(deployment, [0])
    before = int(statistics.tracker.activations()[:, :4].sum())
    deployment.update_weight_mapping({few: "int4"})
    run(deployment, [1])
    deployment.update_weight_mapping({few: "fp8"})
    counts, total = statistics.activations_by_format(), int(statistics.tracker.activations().sum())
    assert 0 < before == counts["gate", "fp8"]
    assert counts["gate", "int4"] == total - before


def test_a_reader_sees_one_version_with_its_own_rules(deployment: Deployment) -> None:
    """What is served is replaced as a whole: no reader sees rules of one version beside weights of another."""
    has_begun, is_over = threading.Event(), threading.Event()

    def read() -> set[tuple[int, int, int]]:
        seen, is_last = set(), False
        while not is_last:
            time.sleep(0.002)
            is_last = is_over.is_set()
            info = deployment.model_info()
            bf16 = info["precisions"]["bf16"]["weights"]
            seen.add((info["weight_version"]["version"], len(info["rules"]), bf16))
            has_begun.set()
        return seen

    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(2)]
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        assert has_begun.wait(60)
        for name in names:
            deployment.update_weight_mapping({name: "base"})
        is_over.set()
        seen = reader.result()
    assert len({version for version, *_ in seen}) == len(seen) > 1


def test_a_remap_loads_only_what_changed(deployment: Deployment) -> None:
    first = deployment.version
    result = deployment.update_weight_mapping({"model.layers.3.mlp.experts.9.up_proj.weight": "fp8"})
    assert (result.version, result.previous_version, result.num_loaded) == (2, 1, 1)
    assert [(c.name, c.source_before, c.source_after) for c in result.changed] == [
        ("model.layers.3.mlp.experts.9.up_proj.weight", "int4", "fp8")
    ]
    shared = [slot for slot in first.origins if deployment.version[slot] is first[slot]]
    assert len(shared) == len(first.origins) - 1
    assert deployment.version.fingerprint != first.fingerprint
    back = deployment.update_weight_mapping({"model.layers.3.mlp.experts.9.up_proj.weight": "int4"})
    assert back.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        ({}, "weight_mapping"),
        ({EXPERTS: "int3"}, "int3"),
        ({EXPERTS: "../etc"}, "../etc"),
        ({"model.layers.7.*": "int4"}, "model.layers.7.*"),
        ({"": "int4"}, "''"),
        ({"model.layers.[": "int4"}, "model.layers.["),
    ],
)
def test_a_bad_mapping_changes_nothing(shared: Deployment, mapping: dict[str, str], named: str) -> None:
    before, rules = shared.version, shared.rules
    with raises((ConfigError, PlanError), named):
        shared.update_weight_mapping(mapping)
    assert shared.version is before
    assert shared.rules == rules
    assert len(run(shared, [1])[0].token_ids) > 0


def test_the_second_of_two_remaps_is_refused(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()
    build = ModelLoader.build

    def slow(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        leave.wait(60)
        return build(*args, **kwargs)

    monkeypatch.setattr(ModelLoader, "build", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(deployment.update_weight_mapping, {EXPERTS: "fp8"})
        entered.wait(60)
        with pytest.raises(ConflictError):
            deployment.reload_weights()
        leave.set()
        assert first.result().version == 2


def test_closing_ends_a_remap_under_way(demo_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = Source.load

    def closing(self: Source, stored: Any, *arguments: Any) -> Any:
        reads.append(stored.name)
        if len(reads) == 1:
            deployment.close()
        return read(self, stored, *arguments)

    with opened(demo_config, packed_cache="") as deployment:
        monkeypatch.setattr(Source, "load", closing)
        before = deployment.version
        with pytest.raises(UnavailableError):
            deployment.update_weight_mapping({EXPERTS: "fp8"})
        assert deployment.version is before
        reason = deployment.remaps[-1].error
        assert reason is not None and reason == deployment.jobs.read()[-1].error  # the same to all who ask
    assert len(reads) < 200  # of six hundred


def test_a_load_that_fails_lets_go_of_the_statistics_file(
    demo_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"statistics.file": str(tmp_path / "statistics.npz"), "inference.packed_cache": ""}
    settings = load_settings(demo_config, changes, {})

    def fail(*_: object) -> None:
        raise CheckpointError("The file model-2.safetensors is missing.")

    with monkeypatch.context() as patch:
        patch.setattr(Source, "load", fail)
        with raises(CheckpointError, "model-2.safetensors"):
            open_deployment(settings)
    with FileLock(tmp_path / "statistics.npz") as lock:
        assert lock.try_acquire()


def test_a_statistics_file_of_another_process_is_refused_before_weights_are_read(
    demo_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "statistics.npz"
    settings = load_settings(demo_config, {"statistics.file": str(path)}, {})
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("a weight is read"))
    with FileLock(path) as lock:
        assert lock.try_acquire()
        with raises(ConflictError, path):
            open_deployment(settings)


def test_reload_takes_the_files_as_they_are_now(derived: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "base")
    settings = build_settings({"model": {"base_path": str(tmp_path / "base")}, "inference": {"max_seq_length": 256}})
    deployment = open_deployment(settings)
    try:
        unchanged = deployment.reload_weights()
        assert (unchanged.changed, unchanged.num_loaded) == ([], 0)
        file = tmp_path / "base" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-2:] = b"\x80\x3f"  # the last element becomes 1.0
        replacement = tmp_path / "new"
        replacement.write_bytes(data)
        replacement.replace(file)
        before = deployment.version
        result = deployment.reload_weights()
        assert result.version == 3
        differing = [
            slot
            for slot in before.origins
            if not torch.equal(before[slot].dequantize(), deployment.version[slot].dequantize())
        ]
        assert len(differing) == 1

        file.write_bytes(data[: len(data) // 2])
        with raises(CheckpointError, "model.safetensors"):
            deployment.reload_weights()
        assert deployment.version.version_id == 3
        assert deployment.engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=2))[0].error is None
    finally:
        deployment.close()


def test_settings_that_cannot_be_met_are_refused_before_loading(derived: Path) -> None:
    def settings(**sections: object) -> object:
        return build_settings({"model": {"base_path": str(DEMO)}, **sections})

    with raises(ConfigError, "engine.kv_cache_bytes", 1000):
        open_deployment(settings(engine={"kv_cache_bytes": 1000}))  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with raises(ConfigError, "cuda:3"):
            open_deployment(settings(inference={"device_map": "cuda:3"}))  # type: ignore[arg-type]
    with raises(PlanError, "lm_head.weight"):
        rules = {"mixed_precision": {"fp8_path": str(derived / "fp8"), "weight_mapping": {"lm_head.weight": "fp8"}}}
        open_deployment(build_settings({"model": {"base_path": str(DEMO), **rules}}))


@pytest.mark.parametrize("flag", ["load_in_8bit", "load_in_4bit"])
def test_quantizing_while_loading_spares_what_rules_name(flag: str, derived: Path) -> None:
    named = "model.layers.0.mlp.experts.3.up_proj.weight"
    model = {
        "base_path": str(DEMO),
        "mixed_precision": {"fp8_path": str(derived / "fp8"), "weight_mapping": {named: "base"}},
    }
    deployment = open_deployment(build_settings({"model": model, "inference": {flag: True, "max_seq_length": 256}}))
    try:
        formats = {origin.name: origin.format for origin in deployment.version.origins.values()}
        target = "int8" if flag == "load_in_8bit" else "int4"
        assert formats.pop(named) == "bf16"
        assert formats["model.layers.0.mlp.experts.4.up_proj.weight"] == target
        assert formats["model.layers.0.mlp.gate.weight"] == "bf16"
        assert formats["model.embed_tokens.weight"] == "bf16"
        assert deployment.model_info()["precisions"][target]["weights"] == 6 * (4 + 48) - 1
    finally:
        deployment.close()


def test_digests_are_of_the_version_that_is_served_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder)
    deployment = open_deployment(build_settings({"model": {"base_path": str(folder)}}))
    try:
        assert deployment.manifest(sha256=True)["fingerprint"] == deployment.version.fingerprint
        for file in folder.glob("*.safetensors"):
            os.utime(file, ns=(1, 1))
        with raises(CheckpointError, "model.safetensors"):
            deployment.manifest(sha256=True)
        deployment.reload_weights()
        assert deployment.manifest(sha256=True)["version"] == 2
    finally:
        deployment.close()


def test_changes_of_the_mapping_are_taken_back_one_after_the_other(deployment: Deployment) -> None:
    rules, fingerprint = deployment.rules, deployment.version.fingerprint
    exact = "model.layers.3.mlp.experts.9.up_proj.weight"
    deployment.update_weight_mapping({exact: "fp8"})
    middle = deployment.version.fingerprint
    deployment.update_weight_mapping({EXPERTS: "fp8", exact: "base"})  # replaces two rules
    deployment.reload_weights()  # is no change of the mapping
    assert deployment.num_undoable == 2
    with pytest.raises(ConflictError):
        deployment.undo_weight_mapping(3)  # version 4 is in use
    assert deployment.undo_weight_mapping(4).version == 5
    assert deployment.version.fingerprint == middle
    deployment.undo_weight_mapping(5)
    assert (deployment.rules, deployment.version.fingerprint) == (rules, fingerprint)
    assert deployment.rules == deployment.configured_rules
    with pytest.raises(ConflictError):
        deployment.undo_weight_mapping(6)
    assert deployment.version.version_id == 6


def test_a_change_that_fails_is_not_there_to_be_taken_back(shared: Deployment) -> None:
    with pytest.raises(PlanError):
        shared.update_weight_mapping({"model.layers.99.*": "fp8"})
    assert shared.num_undoable == 0


def test_the_size_of_a_change_is_told_before_it_is_made(deployment: Deployment) -> None:
    """Also where no weight comes from that source yet, and of one that is coded in memory."""
    names = [f"model.layers.3.mlp.experts.{expert}.{part}_proj.weight" for expert in (7, 9) for part in ("up", "down")]
    for source in ("base", "fp8", "int4"):
        plan = deployment.plan_change(ChangeRequest(mapping=dict.fromkeys(names, source)))
        expected = sum(weight.bytes_after - weight.bytes_before for weight in plan.changed)
        total = deployment.version.nbytes
        deployment.update_weight_mapping(dict.fromkeys(names, source))
        changed = deployment.version.nbytes - total
        assert changed == pytest.approx(expected, rel=0.03)  # how well bf16 is coded is seen later
