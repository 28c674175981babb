"""What the dashboard says where something is missing: figures, experts, the server."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from amalgam.config.statistics import StatisticsSettings
from amalgam.experts.tracker import ExpertTracker
from amalgam.server.dashboard import events
from tests.server.browser import Page
from tests.server.conftest import serving, wait_until_ready
from tests.server.dashboard.looking import COLORS_OF_BLANK, FEW, NEED_STATISTICS, STALENESS, assert_clean
from tests.server.fakes import FakeDeployment, fake_settings
from tests.server.large import LargeDeployment


@pytest.mark.usefixtures("without_charts")
def test_what_is_not_known_is_not_drawn(page: Page) -> None:
    """A server that has counted nothing yet, in a model small enough for its cells to be seen one by one."""
    deployment = LargeDeployment(4, 8)
    deployment.tracker = ExpertTracker(range(4), 8, 2, StatisticsSettings())
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        for panel in ("usage", "coactivation"):
            page.show(f"#{panel}")
            page.wait("return document.querySelector(`#${arguments[0]} .grid-note`)?.checkVisibility()", panel)
            assert page.text(f"#{panel} .grid-note").startswith("Nothing counted yet.")
            inner, *edges = page.run(COLORS_OF_BLANK, panel)
            assert all(edge != inner for edge in edges), panel
        page.show("#analysis")
        page.wait("return document.querySelector('#analysis .note') !== null")
        assert not page.run("return document.querySelector('[data-chart=lorenz]').checkVisibility()")
        assert page.count("#analysis .tile") == 0
        page.click_cell("usage", 1, 2)
        page.wait("return document.querySelector('#expert-card .facts') !== null")
        assert "of 8" not in page.text("#expert-card .facts")  # no rank among equals
        page.choose("#usage-view", "difference")
        page.wait("return document.querySelector('#usage .grid-note').textContent.includes('nothing to compare')")
        assert page.count("#usage-busiest button") == 0

        # What runs is told of the time between two looks, as the tokens are.
        deployment.engine.step_seconds = 0.02
        httpx.post(url + "/generate", json={"prompt": "a", "max_new_tokens": 5}, timeout=60).raise_for_status()
        tiles = "[...document.querySelectorAll('#serving .tile')]"
        page.wait(f"return {tiles}.find((tile) => /^Running/.test(tile.textContent))?.textContent.includes('peak 1 ·')")
        assert_clean(page, url)


@pytest.mark.parametrize(
    ("num_experts", "reasons"),
    [
        (0, ("This model has no experts.", "此模型没有专家。")),
        (
            8,
            (
                "The use of experts is not counted here: statistics.enabled is off.",
                "此处不统计专家的使用：statistics.enabled 未开启。",
            ),
        ),
    ],
    ids=["dense", "statistics off"],
)
@pytest.mark.usefixtures("without_charts")
def test_a_server_that_counts_no_experts(page: Page, num_experts: int, reasons: tuple[str, str]) -> None:
    deployment = FakeDeployment(num_experts=num_experts)
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        explained = "return document.querySelector(`#${arguments[0]} .panel-empty`)?.checkVisibility()"
        for panel in NEED_STATISTICS:
            page.show(f"#{panel}")
            page.wait(explained, panel)
            assert page.text(f"#{panel} .panel-empty") == reasons[0]
        assert page.count(".panel-empty") == len(NEED_STATISTICS)
        assert not page.run("return document.querySelector('#stage-add').checkVisibility()")
        httpx.post(
            url + "/update_weight_mapping", json={"weight_mapping": {"a": "base"}}, timeout=60
        ).raise_for_status()
        page.wait("return !document.querySelector('#stage-undo').disabled")
        page.click("#stage-undo")
        page.wait("return document.querySelector('#stage-outcome').textContent.startsWith('Undone. Version 3 is live')")
        page.show("#serving")
        page.wait("return document.querySelectorAll('#serving .tile').length === 6")
        assert "bf16" in page.text("#memory-body")
        page.run("arguments[0].value = '5'", page.show("#play-max"))
        page.click("#play-start")
        page.wait("return document.querySelector('#play-figures').textContent.includes('5 generated tokens')")
        assert page.count(".panel-error") == 0
        page.click("#language")
        assert {page.text(f"#{panel} .panel-empty") for panel in NEED_STATISTICS} == {reasons[1]}
        assert_clean(page, url)
    assert [item.wants_trace for item in deployment.engine.observations] == [False]


@pytest.mark.usefixtures("without_charts")
def test_the_page_says_when_the_server_is_gone(page: Page) -> None:
    with serving(fake_settings(port=0), lambda: LargeDeployment(*FEW)) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        page.wait(lambda: page.run(STALENESS) == ["healthy", "false", 1, ""])
    page.wait("return document.querySelector('#status').dataset.status === 'disconnected'")

    def is_told() -> bool:
        _, is_stale, opacity, words = page.run(STALENESS)
        return is_stale == "true" and opacity < 0.7 and words.startswith("figures of ")

    page.wait(is_told)
    for width in (1440, 1200, 900, 390):
        page.emulate(width, 844)
        cut = "return [...document.querySelector('header').children].map((node) => node.getBoundingClientRect().right)"
        assert max(page.run(cut)) <= width


@pytest.mark.usefixtures("without_charts")
def test_another_process_is_noticed_however_long_it_has_been_up(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    describe, deployment = events.describe_event, LargeDeployment(*FEW)
    process = {"started_at": 1.0, "uptime": 10.0}
    monkeypatch.setattr(events, "INTERVAL_SECONDS", 0.3)
    monkeypatch.setattr(events, "describe_event", lambda service: describe(service) | process)
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        page.show("#memory")
        page.wait("return document.querySelector('#memory-body').textContent.includes('int4')")
        info = deployment.model_info()
        info["precisions"] = {"int2": info["precisions"]["int4"]}
        monkeypatch.setattr(deployment, "model_info", lambda: info)
        process.update(started_at=2.0, uptime=20.0)
        page.wait("return document.querySelector('#memory-body').textContent.includes('int2')")
        assert_clean(page, url)


@pytest.mark.usefixtures("without_charts")
def test_the_page_says_when_the_server_is_silent(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stays open, and nothing comes; later the server is well again."""
    may_go_on, describe = threading.Event(), events.describe_event
    may_go_on.set()

    def held_describe(service: Any) -> dict[str, Any]:
        may_go_on.wait()
        return describe(service)

    monkeypatch.setattr(events, "INTERVAL_SECONDS", 0.3)
    monkeypatch.setattr(events, "describe_event", held_describe)
    with serving(fake_settings(port=0), FakeDeployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        page.wait("return document.querySelector('#status').dataset.status === 'healthy'")
        may_go_on.clear()
        try:
            page.wait(lambda: page.run(STALENESS)[:2] == ["disconnected", "true"])
            assert httpx.get(url + "/health", timeout=60).status_code == 200
        finally:
            may_go_on.set()
        page.wait(lambda: page.run(STALENESS)[:2] == ["healthy", "false"])


@pytest.mark.usefixtures("without_charts")
def test_the_page_says_that_it_needs_a_key(page: Page) -> None:
    with serving(fake_settings(port=0, api_keys="sk-user", admin_key="sk-admin"), FakeDeployment) as url:
        wait_until_ready(url)
        for key in ("", "sk-user"):
            page.driver.get(url + "/dashboard")
            page.wait("return document.querySelector('#key-input') !== null")
            if key:
                page.driver.find_element("css selector", "#key-input").send_keys(key, Keys.ENTER)
                page.wait("return document.querySelector('#key-refused') !== null")
            page.click("#key-dialog button")
            page.wait("return document.querySelector('#status').dataset.status === 'locked'")
            assert page.text("#locked span") == "The dashboard needs the server's admin key."
            assert page.count("#key-dialog") == 0
        page.click("#locked button")
        page.driver.find_element("css selector", "#key-input").send_keys("sk-admin", Keys.ENTER)
        page.wait("return document.documentElement.dataset.loaded === 'true'")
        page.wait(lambda: page.run(STALENESS)[:2] == ["healthy", "false"])
        assert not page.run("return document.querySelector('#locked').checkVisibility()")
