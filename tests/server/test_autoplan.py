"""What is told of plans that follow the traffic, and the switch that freezes them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from amalgam.cli import main
from amalgam.config.settings import Settings
from amalgam.errors import RequestError
from amalgam.evaluation.confidence import Interval
from amalgam.planning.following import Decision, Drift, Shadowed
from amalgam.runtime.autoplan import Point
from amalgam.server.http.keys import Needs
from amalgam.server.permissions import needs_of
from tests.conftest import DEMO
from tests.server.browser import Page
from tests.server.fakes import FakeDeployment

AT = 1_790_000_000.0
POINTS = [
    Point(AT + 60 * minute, 4000, 0.001 * minute, None if minute < 3 else 0.004 * (minute - 3), 10**7, divergence)
    for minute, divergence in enumerate((None, None, 0.011, None, None, None, None, None, 0.019, 0.012))
]
MEASURED = Shadowed("base", 8000, 60, Interval(0.019), Interval(0.012), Interval(-0.37, -0.45, -0.28), 2.5)
DECISIONS = [
    Decision(AT, "few_tokens", "100 tokens in the short window, 2048 are needed.", Drift(100, None, None)),
    Decision(AT + 480, "no_memory", "<b>weights</b> would take more.", Drift(4000, 0.01, 0.02), 10**7, 31, 0.4),
    Decision(AT + 540, "committed", "KL 0.012.", Drift(4000, 0.01, 0.024), 10**7, 31, 0.4, MEASURED, 3),
]


class FakeAutoplan:
    """Explains expert 1 of layer 0."""

    def __init__(self) -> None:
        self.is_frozen = False

    def describe(self) -> dict[str, Any]:
        return {
            "frozen": self.is_frozen,
            "limits": {"drift": 0.02, "max_swaps_per_hour": 4},
            "swaps_in_last_hour": 1,
            "points": [vars(point) for point in POINTS],
            "decisions": [decision.as_json() for decision in DECISIONS],
        }

    def set_frozen(self, is_frozen: bool) -> None:
        self.is_frozen = is_frozen

    def explain(self, layer_id: int, expert_id: int) -> dict[str, Any]:
        if (layer_id, expert_id) != (0, 1):
            raise RequestError(f"Layer {layer_id} has no expert {expert_id}.")
        return {"layer_id": 0, "expert_id": 1, "projections": []}


def test_it_is_off_unless_wanted(client: httpx.Client) -> None:
    assert client.get("/autoplan").json() == {"enabled": False}
    for answer in (client.post("/autoplan", json={"frozen": True}), client.get("/explain?layer=0&expert=1")):
        assert answer.status_code == 422 and answer.json()["error"]["type"] == "unsupported"


def test_a_switch_freezes_it(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.autoplan = FakeAutoplan()
    told = client.get("/autoplan").json()
    assert told["enabled"] and not told["frozen"]
    assert told["decisions"][-1]["shadowed"]["difference"] == {"value": -0.37, "low": -0.45, "high": -0.28}
    assert client.post("/autoplan", json={"frozen": True}).json()["frozen"] is True
    assert deployment.autoplan.is_frozen
    assert client.post("/autoplan", json={"frozen": False}).json()["frozen"] is False
    for body in ({}, {"frozen": "yes"}, {"frozen": None}, {"frozen": True, "more": 1}):
        assert client.post("/autoplan", json=body).status_code == 422
    assert not deployment.autoplan.is_frozen


def test_an_expert_is_explained(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.autoplan = FakeAutoplan()
    assert client.get("/explain?layer=0&expert=1").json()["expert_id"] == 1
    for query in ("layer=0&expert=2", "layer=-1&expert=0", "layer=0", "layer=a&expert=0", "layer=0&expert=1&more=1"):
        assert client.get(f"/explain?{query}").status_code == 422, query


@pytest.mark.parametrize("path", ["/autoplan", "/explain"])
def test_both_need_the_admin_key(path: str) -> None:
    assert needs_of(path) is Needs.ADMIN


@pytest.mark.parametrize("flags", [[], ["--autoplan"], ["--planning.autoplan.enabled", "true"]])
def test_a_flag_turns_it_on(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    given: list[Settings] = []
    monkeypatch.setattr("amalgam.server.app.run", lambda settings, load, stopping: given.append(settings) or 0)
    assert main(["serve", "--model", str(DEMO), "--planning.autoplan.budget", "4bpw", *flags]) == 0
    autoplan = given[0].planning.autoplan
    assert autoplan.enabled is bool(flags) and autoplan.budget == "4bpw"


def test_the_panel_tells_decisions_and_freezes(browser: Page, url: str, deployment: FakeDeployment) -> None:
    browser.reset()
    browser.open(url + "/dashboard")
    browser.show("#autoplan")
    browser.wait("return document.querySelector('#autoplan .note') !== null")
    assert "--autoplan" in browser.text("#autoplan .note") and not browser.count("#autoplan tbody tr")

    deployment.autoplan = FakeAutoplan()
    browser.open(url + "/dashboard")
    browser.show("#autoplan")
    browser.wait("return document.querySelector('[data-chart=autoplan] .main-svg') !== null")
    rows = browser.run(
        "return [...document.querySelectorAll('#autoplan-decisions tbody tr')].map((row) => row.innerText)"
    )
    assert len(rows) == 3 and "taken v3" in rows[0] and "0.019 → 0.012" in rows[0]
    assert "<b>weights</b>" in rows[1], "a text, and no markup"
    browser.run("document.querySelector('#autoplan-freeze').click()")
    browser.wait(lambda: deployment.autoplan.is_frozen)
    browser.wait("return document.querySelector('#autoplan .tile b').textContent === 'frozen'")
    assert browser.complaints == []

    def refuse(is_frozen: bool) -> None:
        raise RequestError("It is being closed.")

    deployment.autoplan.set_frozen = refuse
    browser.run("document.querySelector('#autoplan-freeze').click()")
    browser.wait("return document.querySelector('#autoplan .panel-error')?.textContent.includes('being closed')")
    browser.collect()
    assert not any("Uncaught" in complaint for complaint in browser.complaints)
