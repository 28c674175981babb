"""The dashboard as a whole: every panel, both languages, both themes, any screen."""

from __future__ import annotations

import re

import pytest

from tests.server.browser import Page
from tests.server.conftest import serving
from tests.server.dashboard.looking import (
    CUT_TEXTS,
    FEW,
    LEGEND_IS_WHOLE,
    NAMELESS_FIELDS,
    UPDATE_OFTEN,
    WORST_EXPERT_COLOR,
    WORST_TONE,
    WRITTEN_TIMES,
    assert_clean,
    show_everything,
)
from tests.server.fakes import fake_settings
from tests.server.large import LABELS, NUM_EXPERTS, NUM_LAYERS, LargeDeployment
from tests.server.readable import UNREADABLE


def test_every_panel_is_fed_and_can_be_read_and_none_moves_when_a_cell_is_clicked(page: Page, demo_url: str) -> None:
    page.open(demo_url + "/dashboard")
    show_everything(page)
    assert page.text("#model") == "demo"
    page.wait(lambda: page.text("#status span") == "healthy")
    page.wait("return document.querySelectorAll('#serving .tile').length === 6")
    assert page.count("#usage-busiest button") == 12
    assert page.count("#hint-list li[data-severity]") == int(page.text("#hint-count")) > 0
    assert page.text("#memory-body").count("int4") == 2  # as a format and as a source
    page.wait("return document.querySelector('[data-chart=throughput]').data[0].y.length > 0")
    assert page.count("#analysis .tile") == 3
    assert page.count("#coactivation tbody tr") > 0
    places = "return [...document.querySelectorAll('.panel')].map((panel) => panel.offsetTop).join()"
    before = page.run(places)
    page.click_cell("usage", 2, 5)
    page.wait("return document.querySelector('#expert-card h3') !== null")
    assert page.run(places) == before

    # Contrast of at least 4.5:1 for all text, on the colours of experts too.
    page.click("#trace-run")
    page.wait("return document.querySelectorAll('#trace-tokens .chip').length > 0")
    for theme in ("light", "dark"):
        page.emulate(is_dark=theme == "dark")
        page.wait("return document.documentElement.dataset.theme === arguments[0]", theme)
        assert page.run(UNREADABLE) == [], theme
        assert page.driver.execute_async_script(WORST_EXPERT_COLOR) >= 4.5, theme
        assert page.run(WORST_TONE) >= 4.5, theme
    assert page.run(NAMELESS_FIELDS) == []
    assert_clean(page, demo_url)


def test_languages_themes_and_a_telephone(page: Page, demo_url: str) -> None:
    page.open(demo_url + "/dashboard")
    assert page.text("#usage h2") == "Expert use"
    page.click("#language")
    assert page.text("#usage h2") == "专家使用"
    page.click("#theme")
    assert page.run("return document.documentElement.dataset.theme") == "dark"
    page.open(demo_url + "/dashboard")  # both are remembered
    assert page.text("#usage h2") == "专家使用"
    assert page.run("return document.documentElement.dataset.theme") == "dark"
    page.emulate(360, 800, is_mobile=True)
    show_everything(page)
    assert page.run("return document.documentElement.scrollWidth") <= 360
    for _ in range(2):  # in both languages
        page.click("#language")
        assert page.run(CUT_TEXTS) == []
    assert (
        page.run("return document.querySelector('#versions td:nth-child(6)').offsetWidth") >= 150
    )  # words, no letters
    page.wait(LEGEND_IS_WHOLE)
    page.click_cell("usage", 1, 1)
    page.wait("return document.querySelector('#expert-card h3')?.textContent === '第 1 层 · 专家 1'")
    now, before = page.driver.execute_async_script(WRITTEN_TIMES)
    assert re.fullmatch(r"[\d:]+", now) and before.startswith("2001年9月9日 ")
    for path in ("/docs", "/experts/report"):
        page.driver.get(demo_url + path)
        assert page.run("return document.documentElement.scrollWidth") <= 360
    assert_clean(page, demo_url)


@pytest.mark.usefixtures("without_charts")
def test_the_browser_chooses_the_language(page: Page, demo_url: str) -> None:
    """Other tests here have one that prefers English."""
    page.emulate(is_dark=True, language="zh-CN")
    page.open(demo_url + "/dashboard")
    assert page.text("#usage h2") == "专家使用"
    assert page.run("return document.documentElement.dataset.theme") == "dark"


@pytest.mark.usefixtures("without_charts")
def test_nothing_stays_in_the_other_language(page: Page, demo_url: str) -> None:
    page.open(demo_url + "/dashboard")
    page.run("arguments[0].value = '3'", page.show("#play-max"))
    page.click("#play-start")
    page.wait("return document.querySelector('#play-figures').textContent.includes('3 generated tokens')")
    page.click("#trace-run")
    page.wait("return document.querySelectorAll('#trace-tokens .chip').length > 0")
    page.show("#coactivation")
    page.wait("return document.getElementById('coactivation').grid.data !== null")
    page.click_cell("usage", 1, 2)
    page.wait("return document.querySelector('#expert-card tbody td[title^=pattern]') !== null")
    assert "weight halves every 5 min" in page.text("#expert-card")
    label = "return document.querySelector(`#${arguments[0]} .grid-overlay`).getAttribute('aria-label')"
    assert "experts by" in page.run(label, "coactivation") and "tokens." in page.run(label, "inspector")
    assert page.run("return document.querySelector('#usage .short').getAttribute('aria-label')") == "Minutes"
    assert page.text("#usage .tip strong") == "Layer 1 · Expert 2"

    page.run("document.getElementById('language').click()")  # without the pointer, which would leave the grid
    assert page.text("#usage .tip strong") == "第 1 层 · 专家 2"
    assert "生成 3 词元" in page.text("#play-figures")
    assert "experts" not in page.run(label, "coactivation") + page.run(label, "inspector")
    assert page.run("return document.querySelector('#usage .short').getAttribute('aria-label')") == "分钟"
    assert page.count("#expert-card tbody td[title^=模式]") == 3
    assert_clean(page, demo_url)


def test_a_large_grid_stays_fluid_and_hostile_names_inert(page: Page, large_url: str) -> None:
    page.open(large_url + "/dashboard")
    show_everything(page)
    page.click_cell("usage", NUM_LAYERS - 1, NUM_EXPERTS - 1)
    page.wait("return document.querySelector('#expert-card h3')?.textContent.includes('127')")
    for select, name in (("#usage-order", "usage-update"), ("#precision-hot", "precision-update")):
        page.show(select)
        durations = page.driver.execute_async_script(UPDATE_OFTEN, select, name)
        assert len(durations) >= 4  # benchmarks/dashboard.py says how long they take

    page.choose("#usage-view", "difference")
    page.choose("#usage-a", f"label:{LABELS[0]}")
    page.wait("return document.querySelector('#usage .figures').textContent.includes('divergence')")
    page.click("#trace-run")
    page.wait("return document.querySelectorAll('#trace-tokens .chip').length > 0")
    page.click_cell("precision", 0, 1)
    page.click("#stage-add")
    page.wait("return document.querySelectorAll('#stage-list tbody tr').length === 1")
    assert page.count("img") == 1  # the page's own
    assert page.run("return window.hacked ?? null") is None
    assert "<img src=x" in page.text("#model")
    assert "<img src=x" in page.text("#stage-list")
    assert "<img src=x" in page.text("#memory-body")
    assert_clean(page, large_url)


@pytest.mark.usefixtures("without_charts")
def test_the_dashboard_asks_for_the_admin_key_and_its_links_carry_it(page: Page) -> None:
    with serving(fake_settings(port=0, api_keys="user", admin_key="root"), lambda: LargeDeployment(*FEW)) as url:
        page.driver.get(url + "/dashboard")
        for key in ("user", "root"):
            page.wait("return document.querySelector('#key-input')?.value === ''")
            page.driver.find_element("css selector", "#key-input").send_keys(key)
            page.click("#key-ok")
        page.wait("return document.documentElement.dataset.loaded === 'true'")
        page.run("window.saved = []; HTMLAnchorElement.prototype.click = function () { saved.push(this.download); }")
        page.click("#stage-save")
        click = "document.querySelector(arguments[0]).dispatchEvent(new MouseEvent('click', {cancelable: true}))"
        page.run(click, "a[href='experts/heatmap.png']")
        page.wait("return saved.length === 2")
        assert set(page.run("return saved")) == {"weight_mapping.yaml", "heatmap.png"}
        page.run("sessionStorage.clear()")
