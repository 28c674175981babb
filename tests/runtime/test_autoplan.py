"""Weights that follow the traffic of the demo model: from verse to code, and what keeps them where they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch

from amalgam.base.machine import Machine
from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.settings import Settings, build_settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Generation
from amalgam.errors import ConfigError, OutOfMemoryError, RequestError
from amalgam.evaluation.confidence import Interval
from amalgam.evaluation.texts import Document, sample_of
from amalgam.models.weights import WeightVersion
from amalgam.planning.following import Decision, Shadowed
from amalgam.planning.problem import problem_of
from amalgam.planning.sensitivity import SensitivityStudy
from amalgam.planning.shadow import shadow
from amalgam.runtime.autoplan import Autoplan, open_proposer
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from amalgam.runtime.token_ring import TokenRing
from amalgam.text.tokenizer import Tokenizer
from tests.errors import raises
from tests.planning.conftest import small

__all__ = ["small"]

VERSE = ["明月几时有，把酒问青天。", "床前明月光，疑是地上霜。", "大江东去，浪淘尽，千古风流人物。"]
CODE = ["def main(argv):\n    return [", "import os\n\nclass Reader:\n    def ", "for item in range(10):\n    "]
OUTCOMES_OF_NOTHING = {"few_tokens", "few_requests", "no_drift"}


@pytest.fixture(scope="module")
def sensitivities(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with those of the two layers, on verse and code."""
    mixed = MixedPrecisionSettings(sources={"int3": str(small / "int3"), "int8": str(small / "int8")})
    model = ModelSettings(base_path=str(small / "base"), mixed_precision=mixed)
    loader = ModelLoader(model, InferenceSettings(), torch.device("cpu"), 1)
    documents = [Document("mixed", text * 4) for text in (VERSE + CODE) * 6]
    sample = sample_of(documents, Tokenizer.load(small / "base"), window=48)
    study = SensitivityStudy(loader, problem_of(loader), sample, tmp_path_factory.mktemp("kept"), draws=1)
    study.measure()
    return study.folder


def settings_of(small: Path, kept: Path, **autoplan: Any) -> Settings:
    """Half of the experts in 8 bits, the others in 3; looked at only when a test does."""
    sources = {"int3": str(small / "int3"), "int8": str(small / "int8")}
    mapping = {"model.layers.*.mlp.experts.*": "int3", "model.layers.*.mlp.experts.{0-7}.*": "int8"}
    wanted = {
        "enabled": True, "sensitivities": str(kept), "interval_seconds": 86400, "min_tokens": 256,
        "sampled_share": 1.0, "max_share": 1.0, "min_gain": 0.02, "short_minutes": 1000,
    } | autoplan  # fmt: skip
    return build_settings(
        {
            "model": {
                "base_path": str(small / "base"),
                "mixed_precision": {"sources": sources, "weight_mapping": mapping},
            },
            "inference": {"max_seq_length": 256, "max_batch_size": 16, "packed_cache": str(small / "packed")},
            "statistics": {"bucket_seconds": 60, "history_minutes": 1440},
            "planning": {"autoplan": wanted},
        }
    )


@pytest.fixture
def deployment(small: Path, sensitivities: Path) -> Iterator[Deployment]:
    deployment = open_deployment(settings_of(small, sensitivities))
    yield deployment
    deployment.close()


def ask(deployment: Deployment, texts: list[str], count: int = 24, first: int = 0) -> list[Generation]:
    prompts = [deployment.tokenizer.encode(texts[index % len(texts)] * 3) for index in range(count)]
    params = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=first + index) for index in range(count)]
    answers = deployment.engine.generate(prompts, params)
    assert all(answer.error is None for answer in answers)
    return answers


def autoplan_of(deployment: Deployment) -> Autoplan:
    assert deployment.autoplan is not None
    return deployment.autoplan


def cost_of(deployment: Deployment) -> float:
    """What the weights in force take, as plans count it."""
    proposer, origins = open_proposer(deployment.settings, deployment.loader), deployment.version.origins
    assert proposer is not None
    choice = [item.index_of(origins[item.slot].source) for item in proposer.problem.items]
    return proposer.cost([index for index in choice if index is not None], "memory")


def look_after(deployment: Deployment, texts: list[str]) -> Decision:
    """What comes of traffic of one kind alone: the other kind's has left the short window."""
    autoplan = autoplan_of(deployment)
    deployment.statistics.tracker.reset()  # type: ignore[union-attr]
    autoplan.ring = TokenRing(1.0, 8192)
    deployment.engine.on_ended = autoplan.note
    ask(deployment, texts)
    return autoplan.look()


def test_weights_follow_from_verse_to_code_and_nothing_is_dropped(deployment: Deployment) -> None:
    autoplan = autoplan_of(deployment)
    budget = autoplan.limits().budget_bytes
    failures: list[Exception | None] = []
    stopping = threading.Event()

    def traffic() -> None:
        first = 1000
        while not stopping.is_set():
            first += 4
            failures.extend(answer.error for answer in ask(deployment, CODE, 4, first))

    verse = look_after(deployment, VERSE)
    assert verse.outcome == "committed", verse.reason
    assert verse.drift.from_planned is None and verse.shadowed is not None and verse.version == 2
    assert verse.shadowed.candidate.value < verse.shadowed.now.value and verse.shadowed.difference.is_below_zero
    assert cost_of(deployment) <= budget
    again = autoplan.look()
    assert again.outcome == "no_drift" and again.drift.from_planned == 0

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        code = look_after(deployment, CODE)
    finally:
        stopping.set()
        thread.join()
    assert code.outcome == "committed", code.reason
    assert code.drift.from_planned is not None and code.drift.from_planned > 0.02
    assert not any(failures) and code.version == deployment.version_id == 3
    assert cost_of(deployment) <= budget
    assert [record.error for record in deployment.remaps] == [None, None] and deployment.num_undoable == 2

    told = autoplan.describe()
    assert told["swaps_in_last_hour"] == 2 and told["weight_version"] == 3
    assert [decision["outcome"] for decision in told["decisions"]] == ["committed", "no_drift", "committed"]
    assert len(told["points"]) == 3 and told["points"][-1]["divergence"] == code.shadowed.candidate.value  # type: ignore[union-attr]


def test_frozen_or_capped_it_proposes_and_changes_nothing(deployment: Deployment) -> None:
    autoplan = autoplan_of(deployment)
    autoplan.set_frozen(True)
    frozen = look_after(deployment, VERSE)
    assert frozen.outcome == "frozen" and frozen.is_proposal and frozen.num_changed
    autoplan.set_frozen(False)
    limits = autoplan.limits()
    for changes, outcome in (
        ({"max_swaps_per_hour": 0}, "swap_cap"),
        ({"memory_bytes": deployment.version.nbytes}, "no_memory"),
        ({"min_gain": 0.9999}, "small_expected_gain"),
    ):
        autoplan.limits = lambda changes=changes: replace(limits, **changes)  # type: ignore[method-assign,misc]
        assert autoplan.look().outcome == outcome
    assert deployment.version_id == 1 and not deployment.remaps


def test_a_change_by_somebody_else_is_not_taken_back(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    autoplan = autoplan_of(deployment)

    def overtaken(*arguments: Any) -> Any:
        deployment.update_weight_mapping({"model.layers.0.mlp.experts.0.*": "int3"})
        return shadow(*arguments)

    monkeypatch.setattr("amalgam.runtime.autoplan.shadow", overtaken)
    decision = look_after(deployment, VERSE)
    theirs = deployment.version_id
    assert decision.outcome == "overtaken" and theirs > 1
    assert decision.shadowed is not None and decision.is_proposal
    monkeypatch.undo()
    kept = autoplan.look()
    assert kept.outcome == "no_drift" and kept.drift.from_planned == 0 and deployment.version_id == theirs
    assert look_after(deployment, CODE).outcome not in OUTCOMES_OF_NOTHING


def test_a_mapping_sent_before_the_first_look_and_an_undo_stay_until_the_use_drifts(deployment: Deployment) -> None:
    deployment.update_weight_mapping({"model.layers.0.mlp.experts.0.*": "int3"})
    assert look_after(deployment, VERSE).outcome == "no_drift" and deployment.version_id == 2
    code = look_after(deployment, CODE)
    assert code.outcome == "committed" and deployment.version_id == 3, code.reason
    deployment.undo_weight_mapping(3)
    rules = deployment.rules
    assert autoplan_of(deployment).look().outcome == "no_drift"
    assert deployment.version_id == 4 and deployment.rules == rules


def test_another_mapping_while_a_plan_is_judged_is_not_taken_for_the_one_that_was(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remapped(*arguments: Any) -> Any:
        deployment.update_weight_mapping({"model.layers.0.mlp.experts.0.*": "int3"})
        measured = shadow(*arguments)
        return replace(measured, candidate=measured.now, difference=Interval(0.0, -0.1, 0.1))

    monkeypatch.setattr("amalgam.runtime.autoplan.shadow", remapped)
    assert look_after(deployment, VERSE).outcome == "not_better"
    assert [record.error for record in deployment.remaps] == [None]
    assert look_after(deployment, CODE).outcome == "no_drift"  # the other mapping has been chosen for this use


def test_files_with_other_weights_end_proposals(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    autoplan = autoplan_of(deployment)
    limits = replace(autoplan.limits(), drift=0.0)
    monkeypatch.setattr(autoplan, "limits", lambda: limits)
    autoplan.set_frozen(True)
    deployment.reload_weights()
    assert look_after(deployment, VERSE).outcome == "frozen"  # they are the same
    monkeypatch.setattr("amalgam.runtime.autoplan.digest_of_weights", lambda *_: "of others")
    assert autoplan.explain(0, 3)["use"]
    deployment.reload_weights()
    decision = autoplan.look()
    assert decision.outcome == "failed" and "other weights" in decision.reason and not decision.is_proposal
    with raises(RequestError, "other weights"):
        autoplan.explain(0, 3)


def test_nan_in_the_candidate_keeps_the_plan(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(loader: Any, dtype: Any, versions: Any, *others: Any) -> Any:
        (reference, now, candidate), slot = versions, "layers.0.attention_norm"
        weights = {slot: candidate[slot] for slot in candidate.keys}
        part = weights[slot].parts
        weights[slot] = replace(
            weights[slot], parts={name: torch.full_like(each, torch.nan) for name, each in part.items()}
        )
        broken = type(candidate)(9, weights, candidate.origins, candidate.keys)
        return shadow(loader, dtype, (reference, now, broken), *others)

    monkeypatch.setattr("amalgam.runtime.autoplan.shadow", damaged)
    decision = look_after(deployment, VERSE)
    assert decision.outcome == "failed" and "NaN" in decision.reason and deployment.version_id == 1
    assert decision.is_proposal and decision.num_changed


def test_a_candidate_that_fails_is_told_with_its_figures_and_not_tried_again(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    autoplan = autoplan_of(deployment)
    calls: list[int] = []

    def broken(*arguments: Any) -> Any:
        calls.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("amalgam.runtime.autoplan.shadow", broken)
    decision = look_after(deployment, VERSE)
    assert decision.outcome == "failed" and "out of memory" in decision.reason and decision.expected_gain
    assert autoplan.look().outcome == "no_drift" and len(calls) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "out of memory" in warnings[0] and deployment.version_id == 1


@pytest.mark.parametrize("outcome", ["not_better", "failed", "committed"])
def test_the_memory_of_weights_that_a_look_has_built_goes_back(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    """The reference's, and the candidate's if it is not taken: nothing holds them when that is told."""
    built: list[ref[WeightVersion]] = []
    alive: list[int] = []

    def judge(loader: Any, dtype: Any, versions: Any, *others: Any) -> Shadowed:
        built.extend(map(ref, (versions[0], versions[2])))
        if outcome == "failed":
            raise OutOfMemoryError("Too little memory.")
        measured = shadow(loader, dtype, versions, *others)
        difference = Interval(-0.1, -0.1, -0.1) if outcome == "committed" else Interval(0.0, -0.1, 0.1)
        return replace(measured, difference=difference)

    has_freed = deployment.versions.has_freed

    def note() -> None:
        alive.append(sum(version() is not None for version in built))
        has_freed()

    monkeypatch.setattr("amalgam.runtime.autoplan.shadow", judge)
    monkeypatch.setattr(deployment.versions, "has_freed", note)
    assert look_after(deployment, VERSE).outcome == outcome
    assert len(built) == 2 and alive == [outcome == "committed"]


def test_only_looks_without_an_event_are_told_as_one(deployment: Deployment) -> None:
    autoplan = autoplan_of(deployment)

    def told() -> list[str]:
        return [decision["outcome"] for decision in autoplan.describe()["decisions"]]

    for _ in range(3):
        assert autoplan.look().outcome == "few_tokens"
    autoplan.set_frozen(True)
    look_after(deployment, VERSE)
    autoplan.look()  # the same candidate
    assert told() == ["few_tokens", "frozen"]
    look_after(deployment, CODE)
    assert told() == ["few_tokens", "frozen", "frozen"]


def test_caches_that_are_not_written_yet_are_not_free(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("Some Xeon", 8, 1, 8, None, (), 10**10, None, 5 * 10**9)
    monkeypatch.setattr("amalgam.runtime.autoplan.detect_machine", lambda: machine)
    assert deployment.engine.kv_cache_bytes > 0
    room = int(5 * 10**9 - 0.15 * 10**10) - deployment.engine.kv_cache_bytes
    assert autoplan_of(deployment).limits().memory_bytes == pytest.approx(deployment.version.nbytes + room, abs=2)


def test_an_expert_is_explained(deployment: Deployment) -> None:
    autoplan = autoplan_of(deployment)
    with raises(RequestError):
        autoplan.explain(0, 3)
    ask(deployment, VERSE)
    found = autoplan.explain(0, 3)
    assert [projection["source"] for projection in found["projections"]] == ["int8"] * 3
    assert found["use"]["num_tokens"] > 256 and found["projections"][0]["step_down"]["bytes"] < 0
    for layer, expert in ((0, 99), (9, 0)):
        with raises(RequestError, expert):
            autoplan.explain(layer, expert)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sensitivities": "{small}"}, "{small}"),
        ({"budget": "30tok/s"}, "'30tok/s'"),
        ({"budget": "1MB"}, "1MB"),
        ({"budget": "5.9bpw"}, "5.9bpw"),
        ({"memory": "4bpw"}, "'4bpw'"),
    ],
)
def test_what_it_cannot_start_with_is_named(
    small: Path, sensitivities: Path, changes: dict[str, str], named: str
) -> None:
    changes = {key: value.format(small=small) for key, value in changes.items()}
    with raises(ConfigError, named.format(small=small)):
        open_deployment(settings_of(small, sensitivities, **changes)).close()


def test_sensitivities_of_other_weights_are_refused(small: Path, sensitivities: Path) -> None:
    settings = settings_of(small, sensitivities)
    mixed = settings.model.mixed_precision.model_dump() | {
        "sources": {"int4": str(small / "int4")},
        "weight_mapping": {},
    }
    other = settings.replace(model={**settings.model.model_dump(), "mixed_precision": mixed})
    with raises(ConfigError, sensitivities):
        open_deployment(other).close()


def test_the_ring_keeps_the_latest_within_its_size() -> None:
    ring = TokenRing(1.0, 300)
    for number in range(5):
        ring.add([number] * 100)
    ring.add([1])
    assert [ids[0] for ids in ring.read(60)] == [2, 3, 4] and ring.num_tokens == 300
    ring.add(list(range(1000)))
    assert [len(ids) for ids in ring.read(60)][-1] == 128 and ring.read(0) == []
    none = TokenRing(0.0, 300)
    none.add([1, 2])
    assert none.read(60) == []
