"""A candidate for the weights over HTTP: what starts and ends a trial, its report, its metrics and its panel."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import httpx
import pytest

from amalgam.errors import ConflictError
from amalgam.evaluation.confidence import Interval
from amalgam.planning.trial_plans import CanaryPlan, Kind, ShadowPlan
from amalgam.planning.trials import Arm, Check
from amalgam.server.http.keys import Needs
from amalgam.server.permissions import needs_of
from tests.server.browser import Page
from tests.server.conftest import serving, wait_until_ready
from tests.server.fakes import FakeDeployment, fake_settings

ARMS = {
    "current": Arm(900, 1, 9000, (0.05,), (0.01,)),
    "candidate": Arm(100, 0, 1000, (0.06,), (0.012,)),
}
CHECKS = {
    "canary": [Check("error_increase", Interval(-0.001, -0.006, 0.036), 0.05)],
    "shadow": [
        Check("divergence", Interval(0.07, 0.06, 0.08), 0.05),
        Check("agreement", Interval(0.93, 0.89, 0.96), 0.9, is_most=False),
    ],
}
TIMES = {"now": 0.004, "candidate": 0.003, "ratio": asdict(Interval(0.75, 0.7, 0.8))}
FIGURES: dict[str, dict[str, Any]] = {
    "canary": {
        "arms": {name: arm.as_json() for name, arm in ARMS.items()},
        "slowdown": asdict(Interval(1.2, 1.1, 1.3)),
    },
    "shadow": {
        "requests": 60,
        "left_out": 2,
        "figures": {
            "prompt_time": TIMES,
            "token_time": TIMES,
            "perplexity_now": asdict(Interval(4.0)),
            "perplexity_candidate": asdict(Interval(4.4)),
        },
    },
}
VERDICTS = {"canary": ("promote", "within <b>limits</b>"), "shadow": ("reject", "divergence is beyond the limit")}


class FakeTrial:
    def __init__(self, kind: Kind, plan: CanaryPlan | ShadowPlan) -> None:
        self.kind, self.plan, self.state = kind, plan, "running"

    @property
    def is_running(self) -> bool:
        return self.state == "running"

    def arm(self, which: str) -> Arm:
        return ARMS[which]

    def compared(self) -> Any:
        return None

    def report(self) -> dict[str, Any]:
        outcome, reason = VERDICTS[self.kind]
        return {
            "state": self.state,
            "reason": "",
            "current": 1,
            "candidate": 2,
            "weights": self.plan.weights,
            "share": self.plan.share,
            "automatic": self.plan.is_automatic,
            "limits": asdict(self.plan.limits),
            **FIGURES[self.kind],
            "checks": [check.as_json() for check in CHECKS[self.kind]],
            "verdict": {"outcome": outcome, "reason": reason},
        }


class Trials:
    """One canary and one shadow that have shown something."""

    def __init__(self) -> None:
        self.canary: FakeTrial | None = None
        self.shadow: FakeTrial | None = None
        self.num_failed_versions = 3
        self.ended: deque[tuple[str, str]] = deque()

    def start_canary(self, plan: CanaryPlan) -> FakeTrial:
        self.canary = FakeTrial("canary", plan)
        return self.canary

    def start_shadow(self, plan: ShadowPlan) -> FakeTrial:
        self.shadow = FakeTrial("shadow", plan)
        return self.shadow

    def report(self, kind: Kind) -> dict[str, Any]:
        trial = getattr(self, kind)
        return {"state": "none"} if trial is None else trial.report()

    def abort(self, kind: Kind) -> dict[str, Any]:
        trial = getattr(self, kind)
        if trial is None:
            raise ConflictError(f"There is no {kind}.")
        self.ended.append((kind, "aborted"))
        trial.state = "aborted"
        return self.report(kind)


@pytest.fixture(scope="module")
def deployment() -> FakeDeployment:
    return FakeDeployment()


@pytest.fixture(scope="module")
def client(deployment: FakeDeployment) -> Iterator[httpx.Client]:
    with serving(fake_settings(port=0), lambda: deployment) as base_url:
        wait_until_ready(base_url)
        with httpx.Client(base_url=base_url, timeout=60) as client:
            yield client


@pytest.fixture
def trials(deployment: FakeDeployment) -> Trials:
    deployment.trials = Trials()
    return deployment.trials  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_a_trial_is_started_reported_and_ended(client: httpx.Client, trials: Trials, kind: Kind) -> None:
    path = f"/weights/{kind}"
    assert client.get(path).json() == {"state": "none"}
    assert client.delete(path).status_code == 409
    answer = client.put(path, json={"weights": "plan", "share": 0.25, "min_requests": 7, "automatic": True})
    assert answer.status_code == 200, answer.text
    plan = getattr(trials, kind).plan
    assert (plan.weights, plan.share, plan.limits.min_requests, plan.is_automatic) == ("plan", 0.25, 7, True)
    told = client.get(path).json()
    assert told["verdict"]["outcome"] == VERDICTS[kind][0]
    assert told["checks"][0]["outcome"] == {"canary": "pass", "shadow": "fail"}[kind]
    assert client.delete(path).json()["state"] == "aborted"


@pytest.mark.parametrize(
    "body",
    [
        {}, {"weights": ""}, {"weights": True}, {"weights": "p", "share": 1.5}, {"weights": "p", "share": "0.5"},
        {"weights": "p", "min_requests": 0}, {"weights": "p", "max_slowdown": -1}, {"weights": "p", "unknown": 1},
        {"weights": 0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_what_cannot_be_tried_is_refused(
    client: httpx.Client, trials: Trials, kind: Kind, body: dict[str, Any]
) -> None:
    answer = client.put(f"/weights/{kind}", json=body)
    assert answer.status_code == 422 and getattr(trials, kind) is None


@pytest.mark.parametrize("path", ["/weights/canary", "/weights/shadow/promote"])
def test_it_needs_the_admin_key(path: str) -> None:
    assert needs_of(path) is Needs.ADMIN


def test_the_metrics_tell(client: httpx.Client, trials: Trials) -> None:
    trials.start_canary(CanaryPlan("plan", 0.25))
    lines = client.get("/metrics").text.splitlines()
    assert "amalgam_canary_share 0.25" in lines
    assert 'amalgam_canary_requests{result="error",weights="current"} 1.0' in lines
    assert 'amalgam_canary_requests{result="ok",weights="candidate"} 100.0' in lines
    assert "amalgam_weight_versions_failed_total 3.0" in lines


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "user": "u"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "user": "u"}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 16, "prompt_cache_key": "u"}),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "metadata": {"user_id": "u"}},
        ),
    ],
)
def test_requests_of_a_user_or_a_session_are_told_apart(
    client: httpx.Client, deployment: FakeDeployment, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    keys = []

    def version_for(weights: str | int | None = None, key: str | None = None) -> Any:
        keys.append(key)
        return deployment.version

    monkeypatch.setattr(deployment, "version_for", version_for)
    for headers in ({}, {"X-Amalgam-Session": "s"}):
        assert client.post(path, json={"model": "fake"} | body, headers=headers).status_code == 200
    assert keys == ["u", "s"]


def test_a_panel_shows_both_and_ends_them(browser: Page, client: httpx.Client, trials: Trials) -> None:
    page = browser
    page.reset()
    page.open(f"{client.base_url}/dashboard".replace("//dashboard", "/dashboard"))
    page.show("#trials")
    page.wait("return document.querySelectorAll('#trials .note').length === 2")
    assert page.count("#trials form:not([hidden])") == 0  # there is no other version
    trials.start_canary(CanaryPlan("plan", 0.25))
    trials.start_shadow(ShadowPlan("plan"))
    page.wait("return document.querySelectorAll('#trials .tile').length === 6")
    assert "Promote. Within the limits: Increase of failed requests." in page.text("#trial-canary")
    assert "25%" in page.text("#trial-canary")
    assert "Reject. Beyond the limit: KL divergence" in page.text("#trial-shadow")
    assert "≤ 0.05" in page.text("#trial-shadow")
    page.run("[...document.querySelectorAll('#trial-shadow button')].at(-1).click()")
    page.wait(lambda: list(trials.ended) == [("shadow", "aborted")])
    page.wait("return document.querySelector('#trial-shadow button') === null")
