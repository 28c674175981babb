"""A candidate for the demo model's weights, tried on live requests: canary, shadow, and a version that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.config.reading import load_settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.probation import FailedVersion
from amalgam.engine.request import Generation, Observation
from amalgam.errors import ConflictError, VersionNotFoundError
from amalgam.evaluation.quality import Reference
from amalgam.evaluation.running import Contestant
from amalgam.evaluation.texts import Sample, Window
from amalgam.kernels.backends.cpu.backend import CpuBackend
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.step import StepContext
from amalgam.models.decoder import Decoder
from amalgam.models.weights import WeightVersion
from amalgam.planning.shadow import Comparison, Throttle
from amalgam.planning.trial_plans import CanaryLimits, CanaryPlan, Kind, ShadowLimits, ShadowPlan
from amalgam.runtime import opening
from amalgam.runtime.changes import ChangeRequest
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.trials import shadow as shadows
from amalgam.runtime.trials.canary import Canary
from amalgam.runtime.trials.shadow import Shadow
from amalgam.runtime.trials.trial import TrialState
from tests.conftest import write_demo_config
from tests.errors import is_named, raises

EXPERTS = "model.layers.*.mlp.experts.*"
TEXTS = ["The old man looked at the sea. ", "明月几时有，把酒问青天。", "def main(argv):\n    ", "import os\n"]
CHOSEN = Observation(may_move=True)  # as the server says of a request that asks for no weights


class Follower:
    """In the place of a draft model: it is told which weights are in use."""

    speculator = None

    def __init__(self) -> None:
        self.on_weights: Callable[[WeightVersion], None] = lambda version: None

    def follow(self, loader: object, rules: object, version: WeightVersion, progress: object = None) -> None:
        self.on_weights(version)


@pytest.fixture(scope="module")
def follower() -> Follower:
    return Follower()


@pytest.fixture(scope="module")
def opened(derived: Path, follower: Follower, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    config = write_demo_config(tmp_path_factory.mktemp("trial"), derived)
    limits = {"inference.max_seq_length": 256, "inference.max_batch_size": 8, "engine.rollback_answers": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_speculation", lambda *_: follower)
        deployment = open_deployment(load_settings(config, limits, {}))
    yield deployment
    deployment.close()


@pytest.fixture
def deployment(opened: Deployment) -> Iterator[Deployment]:
    """With `other` as a named plan, which has all experts in fp8; new requests run on what was configured."""
    wait_until(lambda: opened.jobs.running is None)  # a candidate is promoted before its change has ended
    if opened.rules != opened.configured_rules:
        opened.change(ChangeRequest(rules=opened.configured_rules))
    opened.change(ChangeRequest(mapping={EXPERTS: "fp8"}, name="other"))
    yield opened
    for kind, each in (("canary", opened.trials.canary), ("shadow", opened.trials.shadow)):
        if each is not None and each.is_running:
            opened.trials.abort(kind)  # type: ignore[arg-type]


def ask(deployment: Deployment, count: int, key: Callable[[int], str | None] = lambda index: None) -> list[Generation]:
    """Requests as the server sends them."""
    answers = []
    for first in range(0, count, 8):
        indices = range(first, min(first + 8, count))
        versions = [deployment.version_for(None, key(index)) for index in indices]
        for version in dict.fromkeys(versions):
            mine = [index for index, each in zip(indices, versions, strict=True) if each is version]
            prompts = [deployment.tokenizer.encode(TEXTS[index % 4] * (1 + index % 3)) for index in mine]
            params = [SamplingParams(max_new_tokens=6, seed=index, ignore_eos=True) for index in mine]
            answers += deployment.engine.generate(prompts, params, CHOSEN, version=version)
    return answers


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def states(deployment: Deployment) -> dict[int, str]:
    return {live.served.version_id: " ".join(live.states) for live in deployment.versions.live()}


def start(deployment: Deployment, kind: Kind) -> Canary | Shadow:
    if kind == "canary":
        return deployment.trials.start_canary(CanaryPlan("other", 0.0))
    return deployment.trials.start_shadow(ShadowPlan("other", 0.0))


class TestCanary:
    def test_a_share_of_the_requests_runs_on_the_candidate_until_it_is_promoted(self, deployment: Deployment) -> None:
        before, candidate_id = deployment.version_id, deployment.versions.find("other").version_id
        plan = CanaryPlan("other", 0.5, CanaryLimits(min_requests=10, max_error_increase=0.5))
        canary = deployment.trials.start_canary(plan)
        answers = ask(deployment, 48)
        counts = {
            version: sum(answer.usage.version == version for answer in answers) for version in (before, candidate_id)
        }
        assert sum(counts.values()) == 48 and min(counts.values()) >= 10  # 1 in 10,000 has fewer
        report = canary.report()
        assert report["arms"]["candidate"]["requests"] == counts[candidate_id]
        assert report["arms"]["current"]["tokens"] == 6 * counts[before]
        assert report["arms"]["candidate"]["errors"] == 0 and report["arms"]["candidate"]["token_seconds"] > 0
        assert report["verdict"]["outcome"] == "promote", report
        assert "candidate" in states(deployment)[candidate_id]
        result = deployment.trials.promote("canary")
        assert (result.version, deployment.version_id, canary.state) == (
            candidate_id,
            candidate_id,
            TrialState.PROMOTED,
        )
        assert {answer.usage.version for answer in ask(deployment, 4)} == {candidate_id}
        with raises(ConflictError, "canary"):
            deployment.trials.promote("canary")

    def test_requests_of_one_key_stay_together_as_the_share_grows(self, deployment: Deployment) -> None:
        def chosen(share: float) -> set[int]:
            deployment.trials.start_canary(CanaryPlan("other", share))
            current = deployment.version_id
            return {n for n in range(200) if deployment.version_for(None, f"user {n}").version_id != current}

        few, more = chosen(0.2), chosen(0.6)
        assert few == chosen(0.2) and few < more
        assert 15 < len(few) < 75 and 80 < len(more) < 160
        assert not chosen(0.0) and len(chosen(1.0)) == 200

    def test_those_that_ask_for_weights_are_left_out(self, deployment: Deployment) -> None:
        canary = deployment.trials.start_canary(CanaryPlan("other", 1.0))
        prompt, params = [5, 6, 7], SamplingParams(max_new_tokens=2)
        for weights in ("current", "other"):
            deployment.engine.generate([prompt], params, version=deployment.version_for(weights))
        assert [canary.arm("current").num_requests, canary.arm("candidate").num_requests] == [0, 0]

    def test_an_automatic_one_carries_its_verdict_out(self, deployment: Deployment) -> None:
        limits = CanaryLimits(min_requests=10, max_error_increase=0.9)
        canary = deployment.trials.start_canary(CanaryPlan("other", 0.5, limits, is_automatic=True))
        while canary.arm("candidate").num_requests < 10 or canary.arm("current").num_requests < 10:
            ask(deployment, 16)
        wait_until(lambda: not canary.is_running)
        assert (canary.state, deployment.version_id) == (TrialState.PROMOTED, canary.candidate_id)

    def test_another_change_of_the_weights_overtakes_it(self, deployment: Deployment) -> None:
        canary = deployment.trials.start_canary(CanaryPlan("other"))
        result = deployment.update_weight_mapping({"model.layers.0.mlp.experts.3.*": "base"})
        assert canary.state is TrialState.OVERTAKEN and str(result.version) in canary.reason
        assert "candidate" not in states(deployment)[canary.candidate_id]

    def test_a_change_while_it_starts_overtakes_it_too(
        self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add = deployment.versions.add_candidate

        def add_and_change(candidate: ServedWeights) -> None:
            add(candidate)
            deployment.change(ChangeRequest(mapping={EXPERTS: "int4"}))

        monkeypatch.setattr(deployment.versions, "add_candidate", add_and_change)
        canary = deployment.trials.start_canary(CanaryPlan("other", 1.0))
        assert canary.state is TrialState.OVERTAKEN
        assert "candidate" not in states(deployment)[canary.candidate_id]

    @pytest.mark.parametrize("kind", ["canary", "shadow"])
    def test_a_candidate_that_fails_while_it_starts_fails_its_trial(
        self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch, kind: Kind
    ) -> None:
        add_candidate = deployment.versions.add_candidate

        def fail_at_once(candidate: ServedWeights) -> None:
            add_candidate(candidate)
            deployment.trials.version_failed(FailedVersion(candidate.version, deployment.version, "NaN", 0, 0))

        monkeypatch.setattr(deployment.versions, "add_candidate", fail_at_once)
        trial = start(deployment, kind)
        assert (trial.state, trial.reason) == (TrialState.FAILED, "NaN")
        assert deployment.trials.report(kind)["state"] == "failed"
        assert states(deployment)[trial.candidate_id] == "named"

    @pytest.mark.parametrize("kind", ["canary", "shadow"])
    @pytest.mark.parametrize("is_candidate", [False, True])
    def test_a_trial_that_cannot_be_started_leaves_the_one_before(
        self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch, kind: Kind, is_candidate: bool
    ) -> None:
        add_candidate = deployment.versions.add_candidate

        def fail(candidate: ServedWeights) -> None:
            if is_candidate:
                add_candidate(candidate)
            raise ConflictError("64 weight versions are kept.")

        before = start(deployment, kind)
        deployment.trials.abort(kind)
        monkeypatch.setattr(deployment.versions, "add_candidate", fail)
        with raises(ConflictError, 64):
            start(deployment, kind)
        assert deployment.trials.report(kind)["started"] == before.started_at
        assert states(deployment)[before.candidate_id] == "named"
        with raises(ConflictError, kind):
            deployment.trials.abort(kind)

    def test_what_is_no_candidate_is_refused(self, deployment: Deployment) -> None:
        with raises(ConflictError, deployment.version_id):
            deployment.trials.start_canary(CanaryPlan("current"))
        with raises(VersionNotFoundError, "nobody"):
            deployment.trials.start_shadow(ShadowPlan("nobody"))
        deployment.trials.start_canary(CanaryPlan("other"))
        deployment.change(ChangeRequest(mapping={EXPERTS: "base"}, name="third"))
        with raises(ConflictError, "canary"):
            deployment.trials.start_canary(CanaryPlan("third"))


class TestShadow:
    def test_both_are_compared_on_what_the_current_weights_have_answered(self, deployment: Deployment) -> None:
        limits = ShadowLimits(min_requests=12, max_divergence=5.0, min_agreement=0.0)
        shadow = deployment.trials.start_shadow(ShadowPlan("other", 1.0, limits, max_requests=12, max_share=1.0))
        answers = ask(deployment, 16)
        assert {answer.usage.version for answer in answers} == {deployment.version_id}
        wait_until(lambda: shadow.num_requests == 12)
        report = shadow.report()
        figures = report["figures"]
        assert (figures["num_requests"], figures["num_tokens"]) == (12, 72)
        divergence = figures["divergence"]
        assert 0 < divergence["low"] <= divergence["value"] <= divergence["high"]
        assert 0 <= figures["agreement"]["value"] <= 1 and figures["token_time"]["ratio"]["value"] > 0
        assert report["verdict"]["outcome"] == "promote", report
        strict = replace(shadow.plan, limits=ShadowLimits(max_divergence=1e-9))
        shadow.plan = strict
        assert shadow.verdict().outcome == "reject"

    @pytest.mark.parametrize("hindrance", [ConflictError("Another change is under way."), RuntimeError("broken")])
    def test_a_verdict_that_could_not_be_carried_out_is_carried_out_later(
        self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch, hindrance: Exception
    ) -> None:
        change, hindered = deployment.change, list[ChangeRequest]()

        def hinder(request: ChangeRequest) -> object:
            hindered.append(request)
            if len(hindered) == 1:
                raise hindrance
            return change(request)

        monkeypatch.setattr(deployment, "change", hinder)
        monkeypatch.setattr(shadows, "CHECK_SECONDS", 0.01)
        limits = ShadowLimits(min_requests=12, max_divergence=5.0, min_agreement=0.0)
        plan = ShadowPlan("other", 1.0, limits, max_requests=12, max_share=1.0, is_automatic=True)
        shadow = deployment.trials.start_shadow(plan)
        ask(deployment, 16)
        wait_until(lambda: not shadow.is_running)
        assert shadow.state is TrialState.PROMOTED and deployment.version_id == shadow.candidate_id

    def test_nan_in_both_tells_nothing_of_the_candidate(
        self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shadow = deployment.trials.start_shadow(ShadowPlan("other", 1.0, max_share=1.0))
        compare, compared = Comparison.add, list[bool]()

        def compare_broken(comparison: Comparison, token_ids: Sequence[int], num_prompt_tokens: int) -> bool:
            with monkeypatch.context() as patched:
                break_version(patched, shadow.candidate_id)
                break_version(patched, shadow.now_id)
                compared.append(compare(comparison, token_ids, num_prompt_tokens))
                return compared[-1]

        monkeypatch.setattr(Comparison, "add", compare_broken)
        ask(deployment, 1)
        wait_until(lambda: compared != [])
        assert compared == [False]
        assert shadow.is_running and shadow.num_requests == 0

    def test_nan_in_the_candidate_rejects_it(self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
        shadow = deployment.trials.start_shadow(ShadowPlan("other", 1.0, max_share=1.0))
        break_version(monkeypatch, shadow.candidate_id)
        answers = ask(deployment, 4)
        assert all(answer.error is None for answer in answers)
        wait_until(lambda: not shadow.is_running)
        assert shadow.state is TrialState.FAILED and shadow.verdict().outcome == "reject"
        wait_until(lambda: "candidate" not in states(deployment)[shadow.candidate_id])


class TestRollback:
    def test_new_weights_that_compute_nan_are_left_and_nobody_notices(
        self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = deployment.version_id
        break_version(monkeypatch, deployment.versions.find("other").version_id)
        result = deployment.change(ChangeRequest(version="other"))
        assert states(deployment)[before] == "fallback"
        answers = ask(deployment, 8)
        assert {(answer.error, answer.usage.version) for answer in answers} == {(None, before)}
        assert deployment.version_id == deployment.engine.version.version_id == before
        wait_until(lambda: deployment.remaps[-1].error is not None)
        record = deployment.remaps[-1]
        assert (record.version, record.previous_version) == (before, result.version)
        assert record.error is not None and is_named("NaN", record.error)
        wait_until(lambda: deployment.jobs.read()[-1].kind == "failed_version")
        assert deployment.jobs.read()[-1].error == record.error

    def test_what_follows_the_weights_in_use_ends_with_those_before_if_the_new_ones_fail_at_once(
        self, deployment: Deployment, follower: Follower, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, followed = deployment.version_id, list[int]()
        break_version(monkeypatch, deployment.versions.find("other").version_id)

        def follow(version: WeightVersion) -> None:
            if version.version_id != before:  # the change is still at it
                ask(deployment, 4)
                assert deployment.version_id == before
            followed.append(version.version_id)

        monkeypatch.setattr(follower, "on_weights", follow)
        result = deployment.change(ChangeRequest(version="other"))
        wait_until(lambda: deployment.jobs.read()[-1].kind == "failed_version" and len(followed) == 2)
        assert followed == [result.version, before]
        last = [record for record in deployment.remaps if record.rules is not None and record.name is None][-1]
        assert (last.version, last.rules) == (before, deployment.rules)  # a restart goes on with these

    def test_the_weights_before_are_kept_until_new_ones_have_answered(self, deployment: Deployment) -> None:
        before = deployment.version_id
        deployment.change(ChangeRequest(version="other"))
        assert states(deployment)[before] == "fallback"
        ask(deployment, 3)
        wait_until(lambda: before not in states(deployment))

    def test_a_canary_that_computes_nan_fails_and_its_requests_are_answered(
        self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        canary = deployment.trials.start_canary(CanaryPlan("other", 1.0))
        break_version(monkeypatch, canary.candidate_id)
        answers = ask(deployment, 8)
        assert {(answer.error, answer.usage.version) for answer in answers} == {(None, deployment.version_id)}
        assert canary.state is TrialState.FAILED and canary.report()["verdict"]["outcome"] == "reject"
        assert deployment.version_for().version_id == deployment.version_id


def break_version(monkeypatch: pytest.MonkeyPatch, version_id: int) -> None:
    """From now on it computes NaN, wherever it is compiled."""
    compile_version = Decoder.compile

    class Broken:
        def __init__(self, compiled: object) -> None:
            self._compiled = compiled

        def __getattr__(self, name: str) -> object:
            return getattr(self._compiled, name)

        def run(self, context: object) -> torch.Tensor:
            return self._compiled.run(context).fill_(torch.nan)  # type: ignore[attr-defined, no-any-return]

        def head(self, hidden: torch.Tensor) -> torch.Tensor:
            return self._compiled.head(hidden).fill_(torch.nan)  # type: ignore[attr-defined, no-any-return]

    def compiled(decoder: Decoder, version: WeightVersion) -> object:
        found = compile_version(decoder, version)
        return Broken(found) if version.version_id == version_id else found

    monkeypatch.setattr(Decoder, "compile", compiled)


def test_a_comparison_says_what_an_evaluation_of_the_same_tokens_says(deployment: Deployment) -> None:
    """Both plans on one text: prompt and answer in chunks there, as a whole here."""
    now, candidate = deployment.versions.current, deployment.versions.find("other")
    token_ids = deployment.tokenizer.encode(TEXTS[0] * 6)
    comparison = Comparison(
        now.loader,
        torch.bfloat16,
        now.version,
        candidate.version,
        256,
        Throttle(1.0, lambda: None, lambda seconds: None),
    )
    comparison.add(token_ids, 1)
    found = comparison.read()
    decoder = Decoder(now.loader.spec, 256, torch.bfloat16, now.loader.device)
    plans = [Contestant("a plan", now.loader, decoder, served.version) for served in (now, candidate)]
    scale = Reference(plans[0], Sample((Window("text", 0, tuple(token_ids), 0.0),), "texts"))
    own, other = scale.figures(), scale.figures(plans[1])
    assert found is not None and found.num_tokens == len(token_ids) - 1
    assert found.divergence.value == pytest.approx(other.divergence.mean(), rel=1e-6)
    assert found.agreement.value == pytest.approx(other.agrees.mean())
    assert found.perplexity_candidate.value == pytest.approx(float(torch.tensor(other.loss).mean().exp()), rel=1e-6)
    assert found.perplexity_now.value == pytest.approx(float(torch.tensor(own.loss).mean().exp()), rel=1e-6)


def test_all_requests_are_compared_over_one_cache_whose_recordings_are_made_before_anything_is_timed(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noting:
        """Notes the caches that steps run over, and with how many tokens."""

        def __init__(self, compiled: Any, steps: list[tuple[int, int]]) -> None:
            self._compiled, self._steps = compiled, steps

        def __getattr__(self, name: str) -> Any:
            return getattr(self._compiled, name)

        def run(self, step: StepContext) -> torch.Tensor:
            self._steps.append((id(step.kv), sum(len(sequence.token_ids) for sequence in step.sequences)))
            return self._compiled.run(step)  # type: ignore[no-any-return]

    steps: list[tuple[int, int]] = []
    compile_version = Decoder.compile
    monkeypatch.setattr(Decoder, "compile", lambda *given: Noting(compile_version(*given), steps))
    now, candidate = deployment.versions.current, deployment.versions.find("other")
    throttle = Throttle(1.0, lambda: None, lambda seconds: None)
    comparison = Comparison(now.loader, torch.bfloat16, now.version, candidate.version, 64, throttle)
    for length in (12, 30, 7):
        assert comparison.add(range(5, 5 + length), 4)
    assert [count for _, count in steps[:2]] == [1, 1]
    assert len(steps) == 2 + 3 * 2 * 5 and len({kv for kv, _ in steps}) == 1


def test_nan_of_one_request_reaches_no_other(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        """Leaves NaN in the cache and in what the head reads."""

        def __init__(self, compiled: Any) -> None:
            self._compiled = compiled

        def __getattr__(self, name: str) -> Any:
            return getattr(self._compiled, name)

        def run(self, step: StepContext) -> torch.Tensor:
            found: torch.Tensor = self._compiled.run(step)
            for layer in step.kv.layers:
                layer.values.fill_(torch.nan)
            return found

        def hidden(self) -> torch.Tensor:
            return torch.full_like(self._compiled.hidden(), torch.nan)

    now, candidate = deployment.versions.current, deployment.versions.find("other")
    throttle = Throttle(1.0, lambda: None, lambda seconds: None)
    comparison = Comparison(now.loader, torch.bfloat16, now.version, candidate.version, 64, throttle)
    assert comparison.add(range(5, 35), 4)
    with monkeypatch.context() as patch:
        compile_version = Decoder.compile
        patch.setattr(Decoder, "compile", lambda *given: Failing(compile_version(*given)))
        assert not comparison.add(range(5, 35), 4)
    assert comparison.add(range(5, 35), 4) and comparison.num_requests == 2


def test_no_version_is_compiled_in_the_step_thread(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes longer than a step: all requests would wait for it."""
    compiling, stepping = set[int](), set[int]()

    def noting(seen: set[int], function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            seen.add(threading.get_ident())
            return function(*arguments)

        return noted

    for backend in (CpuBackend, ReferenceBackend):
        monkeypatch.setattr(backend, "compile", noting(compiling, backend.compile))
    monkeypatch.setattr(Decoder, "forward", noting(stepping, Decoder.forward))
    deployment.change(ChangeRequest(mapping={EXPERTS: "base"}))  # on probation beside the one before
    ask(deployment, 4)
    deployment.trials.start_canary(CanaryPlan("other", 1.0))
    ask(deployment, 4)
    deployment.change(ChangeRequest(mapping={f"{EXPERTS}.up_proj.*": "fp8"}, name="third"))
    ask(deployment, 4)
    deployment.trials.promote("canary")
    ask(deployment, 4)
    deployment.versions.remove_name("third")
    assert compiling and stepping and not compiling & stepping
