"""Versions of the demo model: what a change asks for and would take, going back, names, pins, memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from weakref import ref

import pytest

from amalgam.composition import agreement
from amalgam.config.placement import Rule
from amalgam.config.reading import load_settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import RequestOutput
from amalgam.engine.runner import Runner
from amalgam.errors import ConflictError, OutOfMemoryError, PlanError, RequestError, VersionNotFoundError
from amalgam.runtime import remapper
from amalgam.runtime.changes import ChangeRequest, merged
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from tests.conftest import write_demo_config
from tests.engine.running import wait_until
from tests.errors import raises

EXPERTS = "model.layers.*.mlp.experts.*"
ONE = "model.layers.3.mlp.experts.9.up_proj.weight"
OTHER = "model.layers.2.mlp.experts.8.down_proj.weight"


@pytest.fixture(scope="module")
def opened(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    config = write_demo_config(tmp_path_factory.mktemp("changes"), derived)
    overrides = {"inference.max_seq_length": 256, "engine.rollback_answers": 0}  # nothing is kept to fall back to
    deployment = open_deployment(load_settings(config, overrides, {}))
    yield deployment
    deployment.close()


@pytest.fixture
def deployment(opened: Deployment) -> Iterator[Deployment]:
    """By the configured rules, and nothing beside the current version is kept."""
    yield opened
    for live in opened.versions.live():
        if "pinned" in live.states:
            opened.versions.unpin(live.served.version_id)
        for name in live.names:
            opened.versions.remove_name(name)
    if opened.rules != opened.configured_rules:
        opened.change(ChangeRequest(rules=opened.configured_rules))


def answer(deployment: Deployment, weights: str | int | None = None) -> tuple[tuple[int, ...], int]:
    """The tokens of one prompt, and the version that gave them."""
    prompt = deployment.tokenizer.encode("The old man looked at the sea. ")
    version = deployment.version_for(weights)
    [generation] = deployment.engine.generate(
        [prompt], SamplingParams(max_new_tokens=6, do_sample=False), version=version
    )
    return generation.token_ids, generation.usage.version


RULES = (Rule(pattern="a.*", source="int4"), Rule(pattern="b", source="fp8"))


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"c": "base"}, "a.*=int4 b=fp8 c=base"),
        ({"a.*": "base"}, "b=fp8 a.*=base"),
        ({"a.*": None}, "b=fp8"),
        ({"b": None, "a.*": None, "c": "fp8"}, "c=fp8"),
    ],
)
def test_a_mapping_adds_replaces_and_removes_rules(mapping: dict[str, str | None], expected: str) -> None:
    assert " ".join(f"{rule.pattern}={rule.source}" for rule in merged(RULES, mapping)) == expected


def test_what_a_change_asks_for_is_one_thing() -> None:
    with raises(PlanError, "nothing"):
        merged(RULES, {"nothing": None})
    with pytest.raises(PlanError):
        merged(RULES, {})
    with raises(RequestError, "weight_mapping", "reload"):
        ChangeRequest({"a": "base"}, is_reload=True)
    with pytest.raises(RequestError):
        ChangeRequest()
    assert ChangeRequest(rules=()).rules_after(RULES) == ()


def test_the_whole_set_of_rules_is_given_in_one_call(deployment: Deployment) -> None:
    deployment.change(ChangeRequest(rules=(Rule(pattern=ONE, source="fp8"),)))
    assert [origin.name for origin in deployment.version.origins.values() if origin.source != "base"] == [ONE]
    deployment.update_weight_mapping({ONE: None})
    assert deployment.rules == () and {origin.source for origin in deployment.version.origins.values()} == {"base"}


def test_a_dry_run_says_what_the_change_then_does(deployment: Deployment) -> None:
    before = deployment.version
    for request in (
        ChangeRequest({ONE: "fp8", OTHER: "base"}),
        ChangeRequest({EXPERTS: "fp8"}),
        ChangeRequest({ONE: "int4", EXPERTS: "int4"}),
        ChangeRequest(is_reload=True),
        ChangeRequest(version=before.version_id),
    ):
        current = deployment.version
        plan = deployment.plan_change(request)
        assert deployment.version is current
        result = deployment.change(request)
        assert (plan.fingerprint, plan.rules) == (result.fingerprint, deployment.rules)
        assert [change.name for change in plan.changed] == [change.name for change in result.changed]
        assert plan.load.num_weights == result.num_loaded
        assert plan.load.memory_bytes == pytest.approx(result.loaded_bytes, rel=0.03)
        assert plan.load.peak_bytes >= plan.load.new_bytes and plan.has_room
        assert (plan.load.read_bytes > 0) == (result.num_loaded > 0) and plan.seconds > 0


def test_sources_are_compared_once(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A re-map of one expert is not held up by what is known of the others."""
    deployment.plan_change(ChangeRequest({ONE: "fp8"}))
    monkeypatch.setattr(agreement, "sample", lambda *_: pytest.fail("a weight is read"))
    monkeypatch.setattr("amalgam.composition.source.Source.values", lambda *_: pytest.fail("a weight is read"))
    deployment.plan_change(ChangeRequest({ONE: "fp8"}))


def test_named_weights_answer_beside_the_current_ones(deployment: Deployment) -> None:
    current = answer(deployment)
    named = deployment.change(ChangeRequest({EXPERTS: "base"}, name="wide"))
    again = deployment.change(ChangeRequest({EXPERTS: "base"}, name="wide_too"))
    assert again.num_loaded == 0  # those that another version has are not read again
    assert deployment.version_id == current[1] and named.version != current[1]
    wide = answer(deployment, "wide")
    assert wide[1] == named.version and wide[0] == answer(deployment, named.version)[0]
    assert answer(deployment) == current
    deployment.change(ChangeRequest(version="wide"))
    assert answer(deployment) == wide
    with raises(VersionNotFoundError, "narrow"):
        deployment.version_for("narrow")


def test_going_back_takes_the_version_itself_while_it_is_in_memory(deployment: Deployment) -> None:
    first, tokens = deployment.version, answer(deployment)
    deployment.versions.pin(first.version_id)
    second = deployment.update_weight_mapping({ONE: "fp8"})
    third = deployment.update_weight_mapping({EXPERTS: "fp8"})
    wait_until(lambda: second.version not in {version.version_id for version in deployment.live_versions})

    rebuilt = deployment.rollback()
    assert rebuilt.version > third.version and rebuilt.fingerprint == second.fingerprint
    back = deployment.rollback()
    assert deployment.version is first and (back.version, back.num_loaded) == (first.version_id, 0)
    assert answer(deployment) == tokens
    assert deployment.rollback(rebuilt.version).fingerprint == second.fingerprint
    with raises(VersionNotFoundError, 9999):
        deployment.rollback(9999)


def test_going_back_ends_where_it_began(deployment: Deployment) -> None:
    while True:
        try:
            deployment.rollback()
        except ConflictError:
            break
    assert deployment.rules == deployment.configured_rules


def test_the_difference_of_versions_that_are_in_memory_and_of_one_that_is_not(deployment: Deployment) -> None:
    first = deployment.version_id
    gone = deployment.update_weight_mapping({ONE: "fp8"}).version
    last = deployment.update_weight_mapping({OTHER: "fp8"}).version
    wait_until(lambda: gone not in {version.version_id for version in deployment.live_versions})
    found = deployment.difference(gone, "current")
    assert (found.before, found.after) == (gone, last)
    assert [(c.name, c.source_before, c.source_after) for c in found.changed] == [(OTHER, "int4", "fp8")]
    assert {change.name for change in deployment.difference(first, last).changed} == {ONE, OTHER}
    assert deployment.difference("current", last).changed == []


def test_what_does_not_fit_is_refused_before_anything_is_read(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(deployment)
    before, needed = deployment.version, deployment.plan_change(ChangeRequest({EXPERTS: "base"})).load.peak_bytes
    untouched = deployment.engine.untouched_bytes  # what the KV cache has not written yet, and will
    assert 0 < untouched < deployment.engine.kv_cache_bytes
    monkeypatch.setattr(remapper, "available_bytes", lambda device: untouched + needed - 1)
    monkeypatch.setattr("amalgam.composition.source.Source.load", lambda *_: pytest.fail("a weight is read"))
    assert not deployment.plan_change(ChangeRequest({EXPERTS: "base"})).has_room
    with raises(OutOfMemoryError, needed, needed - 1):
        deployment.update_weight_mapping({EXPERTS: "base"})
    assert deployment.version is before


def test_a_request_keeps_its_version_in_memory_and_nobody_else_does(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # what pytest keeps of other tests' errors
    may_go_on, slot = threading.Event(), "layers.3.mlp.experts.9.up"
    execute = Runner.execute
    monkeypatch.setattr(Runner, "execute", lambda *arguments: may_go_on.wait(60) and execute(*arguments))
    old, outputs = deployment.version_id, SimpleQueue[RequestOutput]()
    weight = ref(deployment.version[slot])
    deployment.engine.submit([5, 6, 7], SamplingParams(max_new_tokens=2), outputs.put, version=deployment.version)
    deployment.update_weight_mapping({ONE: "base"})
    assert deployment.describe_version(old).items() >= {"states": ["draining"], "requests": 1}.items()
    with raises(VersionNotFoundError, old):
        deployment.version_for(old)
    may_go_on.set()
    while not (output := outputs.get(timeout=60)).is_finished:
        pass
    assert output.usage is not None and output.usage.version == old
    wait_until(lambda: weight() is None, 60)
    assert [live.served.version_id for live in deployment.versions.live()] == [deployment.version_id]


def test_what_is_told_of_versions(deployment: Deployment) -> None:
    deployment.change(ChangeRequest({ONE: "base"}, name="plan"))
    told = deployment.describe_weights()
    current, named = told["versions"]
    assert told["current"] == current["version"] == deployment.version_id
    assert (current["states"], named["states"], named["names"]) == (["current"], ["named"], ["plan"])
    assert current["fingerprint"] == deployment.version.fingerprint
    assert sum(named["bytes_by_format"].values()) == named["bytes"]
    assert told["bytes"] == current["bytes"] + named["own_bytes"]
    assert named["rules"][-1] == {"pattern": ONE, "source": "base"}
    assert deployment.describe_version("plan")["version"] == named["version"]
    with raises(VersionNotFoundError, 9999):
        deployment.describe_version(9999)
    for asks, field in (
        (lambda: deployment.version_for("nobody"), "weights"),
        (lambda: deployment.describe_version("nobody"), None),
        (lambda: deployment.change(ChangeRequest(version="nobody")), None),
        (lambda: deployment.versions.pin(9999), None),
    ):
        with pytest.raises(VersionNotFoundError) as refused:
            asks()
        assert refused.value.param == field  # of the request, which is not always called so
