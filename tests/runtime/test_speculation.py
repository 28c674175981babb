"""The demo model with guesses of each kind: the same answers, the same statistics, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from amalgam.composition.loader import ModelLoader
from amalgam.config.settings import Settings, build_settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Generation
from amalgam.engine.speculation.draft import DraftProposer
from amalgam.errors import ConfigError
from amalgam.models.weights import WeightVersion
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from amalgam.tools.estimate import estimate
from tests.errors import raises
from tests.planning.conftest import small

__all__ = ["small"]

EXPERTS = "model.layers.*.mlp.experts.*"
TEXTS = [
    "The old man looked at the sea. The old man looked at the boy. The old man looked",
    "明月几时有，把酒问青天。明月几时有，",
    "def main(argv):\n    return [item for item in argv]\n\ndef main(",
    "One, two, three, one, two, three, one,",
]
TOKEN_BYTES = 2 * 2 * 2 * 64 * 2  # layers, keys and values, heads, dimensions, bfloat16


@pytest.fixture(scope="module")
def shorter(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of the model's two layers, with the same vocabulary."""
    folder = tmp_path_factory.mktemp("shorter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / "base" / name, folder / name)
    config = json.loads((small / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(small / "base" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}, folder / "model.safetensors"
    )
    return folder


def settings_of(small: Path, speculation: dict[str, Any] | None = None, **engine: Any) -> Settings:
    mapping = {EXPERTS: "int8", "model.layers.*.mlp.experts.{0-7}.*": "int3"}
    mixed = {"sources": {name: str(small / name) for name in ("int3", "int8")}, "weight_mapping": mapping}
    return build_settings(
        {
            "model": {"base_path": str(small / "base"), "mixed_precision": mixed},
            "inference": {"max_seq_length": 128, "max_batch_size": 16},
            "engine": engine,
            "speculation": speculation or {},
        }
    )


def kinds(shorter: Path) -> dict[str, dict[str, Any]]:
    return {
        "ngram": {"kind": "ngram", "min_match": 1},
        "self": {"kind": "self"},
        "draft": {"kind": "draft", "draft": str(shorter), "num_tokens": 3},
    }


def run(deployment: Deployment, count: int = 16) -> list[Generation]:
    prompts = [deployment.tokenizer.encode(TEXTS[index % 4] + " and" * (index // 4)) for index in range(count)]
    params = [
        SamplingParams(
            max_new_tokens=8 + index, do_sample=index % 2 == 1, temperature=0.8, seed=index, ignore_eos=True,
            logprobs=1, repetition_penalty=1.1 if index % 8 == 7 else 1.0,
        )
        for index in range(count)
    ]  # fmt: skip
    return deployment.engine.generate(prompts, params)


@pytest.fixture(scope="module")
def expected(small: Path) -> Iterator[list[list[Generation]]]:
    """Without guesses, with the configured weights and with others."""
    deployment = open_deployment(settings_of(small))
    answers = [run(deployment)]
    deployment.update_weight_mapping({EXPERTS: "base"})
    answers.append(run(deployment))
    yield answers
    deployment.close()


def check(answers: list[Generation], expected: list[Generation]) -> None:
    for one, other in zip(answers, expected, strict=True):
        assert (one.token_ids, one.text, one.logprobs) == (other.token_ids, other.text, other.logprobs)


def check_estimate(settings: Settings, deployment: Deployment) -> None:
    """What was estimated for a draft is what it takes, as near as bf16 is coded."""
    described = (deployment.model_info()["speculation"] or {}).get("draft") or {}
    taken = described.get("weights_bytes", 0) + described.get("kv_cache_bytes", 0)
    assert estimate(settings).draft_bytes == pytest.approx(taken, rel=0.01)


@pytest.mark.parametrize(("kind", "is_adaptive"), [("ngram", False), ("self", True), ("draft", False)])
def test_answers_and_statistics_are_the_same(
    small: Path, shorter: Path, expected: list[list[Generation]], kind: str, is_adaptive: bool
) -> None:
    """16 together, in so few blocks that they preempt each other, with shared beginnings and a re-map between."""
    speculation = kinds(shorter)[kind] | {"adaptive": is_adaptive}
    deployment = open_deployment(
        settings_of(small, speculation, block_size=4, kv_cache_bytes=128 * TOKEN_BYTES, max_step_tokens=96)
    )
    try:
        answers = run(deployment)
        check(answers, expected[0])
        reading, statistics = deployment.engine.meter.read(), deployment.statistics
        assert reading.speculation is not None and statistics is not None
        assert reading.counts.num_prefix_hit_tokens > 0 and reading.speculation.num_accepted > 0
        # How many are guessed where it has to pay depends on times, and on that when requests end.
        assert is_adaptive or reading.counts.num_preemptions > 0
        assert is_adaptive or sum(reading.speculation.accepted_at) == reading.speculation.num_accepted
        deployment.update_weight_mapping({EXPERTS: "base"})
        check(run(deployment), expected[1])
        status = deployment.engine.status()
        assert status.num_free_blocks == status.num_blocks
        described = deployment.model_info()["speculation"]
        assert described["kind"] == kind and 0 < described["acceptance"] <= 1
        if kind == "self":
            # The experts in int8 and later in bf16 are there in int3 for the draft; all else is the model's own.
            assert described["draft"]["shared_bytes"] > described["draft"]["weights_bytes"] > 0
    finally:
        deployment.close()


def test_a_draft_takes_no_memory_for_what_the_model_has_got_meanwhile(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(small, kinds(small)["self"])
    deployment = open_deployment(settings)
    check_estimate(settings, deployment)
    speculator, lowest = deployment.engine.speculator, {EXPERTS: "int3"}
    assert speculator is not None and isinstance(speculator.proposer, DraftProposer)
    try:
        for mapping, is_lowest in (({"model.layers.0.mlp.experts.{8-11}.*": "int3"}, False), (lowest, True)):
            deployment.update_weight_mapping(mapping)
            draft, version = speculator.proposer.version, deployment.version
            shared = [slot for slot, key in draft.keys.items() if version.keys[slot] == key]
            assert all(draft[slot] is version[slot] for slot in shared)
            assert (len(shared) == len(draft.keys)) == is_lowest
        described = deployment.model_info()["speculation"]["draft"]
        assert (described["weights_bytes"], described["shared_bytes"]) == (0, deployment.version.nbytes)
        deployment.update_weight_mapping({EXPERTS: "int8"})
        assert speculator.proposer.version.nbytes < deployment.version.nbytes

        def fail(*parts: Any) -> None:
            raise MemoryError

        monkeypatch.setattr("amalgam.runtime.speculation.build_own_draft", fail)
        assert deployment.update_weight_mapping({EXPERTS: "base"}).version == deployment.version_id
        assert speculator.proposer.version is deployment.version
        assert {answer.error for answer in run(deployment, 2)} == {None}
    finally:
        deployment.close()


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_draft_that_cannot_be_compiled_ends_no_change(
    small: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    """The model's own weights take its place; if they cannot either, it keeps what it has."""
    deployment = open_deployment(settings_of(small, kinds(small)["self"]))
    speculator, tried = deployment.engine.speculator, list[WeightVersion]()
    assert speculator is not None and isinstance(speculator.proposer, DraftProposer)
    before, set_version = speculator.proposer.version, DraftProposer.set_version

    def fail(proposer: DraftProposer, version: WeightVersion) -> None:
        tried.append(version)
        if len(tried) <= num_failures:
            raise RuntimeError("it cannot be compiled")
        set_version(proposer, version)

    monkeypatch.setattr(DraftProposer, "set_version", fail)
    try:
        result = deployment.update_weight_mapping({EXPERTS: "base"})
        assert result.version == deployment.version_id and deployment.remaps[-1].error is None
        assert tried[0].nbytes < deployment.version.nbytes and tried[1:] == [deployment.version]
        assert speculator.proposer.version is (deployment.version if num_failures == 1 else before)
        assert {answer.error for answer in run(deployment, 2)} == {None}
    finally:
        deployment.close()


def test_experts_are_counted_for_tokens_that_stay(small: Path, shorter: Path) -> None:
    tallies = []
    for speculation in ({}, kinds(shorter)["draft"] | {"adaptive": False}):
        deployment = open_deployment(settings_of(small, speculation, prefix_cache=False))
        try:
            check_estimate(deployment.settings, deployment)
            run(deployment, 8)
            assert deployment.statistics is not None
            tallies.append(deployment.statistics.saved_set().total)
        finally:
            deployment.close()
    assert tallies[0].counts.tolist() == tallies[1].counts.tolist()
    assert tallies[0].num_tokens.tolist() == tallies[1].num_tokens.tolist()


def test_a_request_may_have_no_guesses(small: Path) -> None:
    deployment = open_deployment(settings_of(small, {"kind": "ngram", "min_match": 1, "adaptive": False}))
    try:
        prompt = deployment.tokenizer.encode(TEXTS[3])
        for speculate in (False, True):
            deployment.engine.generate(
                [prompt], SamplingParams(max_new_tokens=20, do_sample=False, speculate=speculate)
            )
            counts = deployment.engine.meter.read().speculation
            assert counts is not None and (counts.num_proposed > 0) == speculate
    finally:
        deployment.close()


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """None may be read: what is wrong is said before."""
    monkeypatch.setattr(ModelLoader, "build", None)


@pytest.mark.usefixtures("no_weights")
def test_a_draft_that_cannot_guess_is_refused(small: Path, shorter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shorter, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[500:502]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with raises(ConfigError, str(other), min(vocab[first], vocab[second])):
        open_deployment(settings_of(small, {"kind": "draft", "draft": str(other)}))
    larger = Settings.model_validate(
        {
            "model": {"base_path": str(shorter)},
            "speculation": {"kind": "draft", "draft": str(small / "base")},
        }
    )
    with raises(ConfigError, str(small / "base"), "parameters"):
        open_deployment(larger)


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_has_nothing_lower_is_no_draft_of_itself(small: Path) -> None:
    alone = build_settings({"model": {"base_path": str(small / "base")}, "speculation": {"kind": "self"}})
    with raises(ConfigError, "self"):
        open_deployment(alone)
    with raises(ConfigError, "int8"):
        lowest = settings_of(small, {"kind": "self", "source": "int8"}).model_dump()
        lowest["model"]["mixed_precision"]["weight_mapping"] = {EXPERTS: "int3"}
        open_deployment(build_settings(lowest))


@pytest.mark.parametrize(
    "speculation",
    [
        {"kind": "draft"},
        {"draft": "a"},
        {"kind": "ngram", "draft": "a"},
        {"kind": "ngram", "kv_cache_bytes": 2**30},
        {"kind": "draft", "draft": "a", "source": "b"},
    ],
)
def test_settings_that_do_not_go_together_are_refused(speculation: dict[str, Any]) -> None:
    with raises(ConfigError, "speculation.kind"):
        open_deployment(build_settings({"model": {"base_path": "unused"}, "speculation": speculation}))
