"""Grids of experts in the dashboard, and what is told of one expert or of one token."""

from __future__ import annotations

import math
import re

import httpx
import pytest

from amalgam.config.statistics import StatisticsSettings
from amalgam.experts.tracker import ExpertTracker
from tests.server.browser import Page
from tests.server.conftest import serving, wait_until_ready
from tests.server.dashboard.looking import COLORS_OF_CELL, FEW, assert_clean
from tests.server.fakes import fake_settings
from tests.server.large import LABELS, TOP_K, LargeDeployment, count_tokens


@pytest.mark.usefixtures("without_charts")
def test_clicks_on_the_heatmap(page: Page, demo_url: str) -> None:
    page.open(demo_url + "/dashboard")
    page.click_cell("usage", 2, 5)
    page.wait("return document.querySelector('#expert-card h3')?.textContent === 'Layer 2 · Expert 5'")
    stats = httpx.get(demo_url + "/expert_stats", timeout=60).json()["expert_stats"]
    [row] = [row for row in stats if (row["layer_id"], row["expert_id"]) == (2, 5)]
    assert f"{row['activation_count']:,}" in page.text("#expert-card .facts")
    assert page.text("#expert-card tbody").count("int4") == 6  # source and format of three projections

    values = "return document.getElementById('usage').grid.data"
    by_count = page.run(values + ".colors.join()")
    page.choose("#usage-phase", "prompt")
    page.wait(values + ".colors.join() !== arguments[0]", by_count)
    page.choose("#usage-phase", "all")
    page.choose("#usage-measure", "gate_mass")
    page.choose("#usage-window", "5")
    page.wait("return !document.querySelector('#usage .panel-error')")
    page.choose("#usage-order", "use")
    page.wait(values + ".order !== null")
    page.choose("#usage-window", "")
    page.choose("#usage-label", "<i>code</i>")
    page.wait("return document.querySelector('#usage-label').value === '<i>code</i>'")

    page.choose("#usage-measure", "count")
    page.choose("#usage-view", "difference")
    page.choose("#usage-a", "label:宋词")
    page.choose("#usage-b", "label:prose")
    page.wait("return document.querySelector('#usage .figures').textContent.includes('divergence')")
    assert "share of the layer's use in A minus that in B" in page.text("#usage .panel-head p")
    chips = page.run("return [...document.querySelectorAll('#usage-busiest b')].map((node) => node.textContent)")
    assert all(re.fullmatch(r"[+-]\d+(\.\d)? pp", chip) for chip in chips), chips  # points, not per cent
    divergence = httpx.get(
        demo_url + "/experts/compare", params={"a": "label:宋词", "b": "label:prose"}, timeout=60
    ).json()
    mean = divergence["jensen_shannon"]["mean"]
    assert mean > 0.05  # the domains use different experts
    page.wait(f"return document.querySelector('#usage .figures').textContent.includes('{mean:.3g}')")
    page.choose("#usage-view", "use")
    page.wait("return document.querySelector('#usage .panel-head p').textContent.includes('even share')")
    assert_clean(page, demo_url)


@pytest.mark.usefixtures("without_charts")
def test_the_precision_map_marks_what_the_hints_name(page: Page, large_url: str) -> None:
    hints = httpx.get(large_url + "/experts/hints", timeout=60).json()["hints"]
    counts = {hint["kind"]: hint["figures"].get("num_experts", hint["figures"].get("num_found")) for hint in hints}
    page.open(large_url + "/dashboard")
    page.show("#precision")
    text = "return document.querySelector(arguments[0]).textContent === arguments[1]"
    page.wait(text, "#select-hot-narrow", f"Select hot and narrow ({counts['hot_narrow']})")
    page.wait(text, "#select-cold-wide", f"Select cold and wide ({counts['cold_wide']})")
    assert page.text("#staged-count") == "staged (0)"
    page.click("#select-hot-narrow")
    page.choose("#stage-source", "source-8")
    page.click("#stage-add")
    page.wait("return document.querySelector('#staged-count').textContent !== 'staged (0)'")
    outlines = page.run("return document.getElementById('precision').grid.data.outlines")
    [hot, _, staged, _] = [{tuple(cell) for cell in outline["cells"]} for outline in outlines]
    assert len({outline["style"] for outline in outlines}) == 4  # none is told apart by its colour alone
    assert page.text("#selected-count") == "selected (0)"
    assert staged and staged <= hot  # the rest have that source already
    assert page.text("#staged-count") == f"staged ({len(staged)})"

    # A staged cell shows both: red at its edge, the mark of staging within; that of selecting lies around it.
    row, column = min(staged)
    colors = page.run(COLORS_OF_CELL, "precision", row, column)

    def is_nearer(color: str, this: str, that: str) -> bool:  # lines between two pixels are blended
        return math.dist(colors[color], colors[this]) < math.dist(colors[color], colors[that])

    assert is_nearer("edge", "hot", "staged") and is_nearer("inner", "staged", "hot")


@pytest.mark.usefixtures("without_charts")
def test_the_precision_map_follows_the_traffic(page: Page) -> None:
    """An open page marks what has become hot since."""
    deployment = LargeDeployment(*FEW)
    deployment.tracker = ExpertTracker(range(FEW[0]), FEW[1], TOP_K, StatisticsSettings())
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        page.choose("#precision-hot", "1.25")
        hot = "return document.querySelector('#precision .swatch.hot').parentNode.textContent"
        page.wait(f"{hot} === 'hot and narrow (0)'")
        count_tokens(deployment.tracker, *FEW, num_tokens=50)
        grid, precision = (httpx.get(f"{url}/experts/{name}", timeout=60).json() for name in ("grid", "precision_map"))
        marked = sum(
            value * len(row) >= 1.25 * sum(row) and is_narrow
            for row, narrow in zip(grid["values"], precision["is_narrow"], strict=True)
            for value, is_narrow in zip(row, narrow, strict=True)
        )
        assert marked > 0
        page.wait(f"{hot} === arguments[0]", f"hot and narrow ({marked})")


@pytest.mark.usefixtures("without_charts")
def test_a_hint_shows_the_comparison_that_it_speaks_of(page: Page, demo_url: str) -> None:
    page.open(demo_url + "/dashboard")
    page.show("#hints")
    page.wait("return document.querySelector('#hint-list [data-kind=domain]') !== null")
    [hint, *_] = [
        hint for hint in httpx.get(demo_url + "/experts/hints", timeout=60).json()["hints"] if hint["kind"] == "domain"
    ]
    page.choose("#usage-measure", "gate_mass")
    page.click("#hint-list [data-kind=domain] button")
    said = f"divergence {hint['figures']['jensen_shannon']:.3g} bits"
    page.wait("return document.querySelector('#usage .figures').textContent.includes(arguments[0])", said)
    chosen = "return ['a', 'b'].map((side) => document.querySelector(`#usage-${side}`).value)"
    assert page.run(chosen) == [hint["compare"]["a"], hint["compare"]["b"]]

    page.choose("#usage-measure", "gate_mass")
    page.choose("#usage-phase", "generated")
    query = {**hint["compare"], "measure": "gate_mass", "phase": "generated"}
    mean = httpx.get(demo_url + "/experts/compare", params=query, timeout=60).json()["jensen_shannon"]["mean"]
    said = f"divergence {mean:.3g} bits"
    page.wait("return document.querySelector('#usage .figures').textContent.includes(arguments[0])", said)
    assert_clean(page, demo_url)


@pytest.mark.usefixtures("without_charts")
def test_drift_is_explained_until_there_is_some(page: Page) -> None:
    with serving(fake_settings(port=0), lambda: LargeDeployment(*FEW)) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        page.show("#drift")
        page.wait("return document.querySelector('#drift .figures').textContent.includes('nothing to compare')")
        assert page.run("return document.querySelector('#drift-reference').value") == "before:5"
        assert not page.run("return document.querySelector('[data-chart=drift]').checkVisibility()")
        page.choose("#drift-reference", f"label:{LABELS[1]}")
        page.wait("return document.querySelector('[data-chart=drift]').checkVisibility()")
        page.wait("return document.querySelector('[data-chart=drift]').data?.length > 0")
        assert "divergence" in page.text("#drift .figures")
        assert_clean(page, url)


@pytest.mark.usefixtures("without_charts")
def test_windows_are_those_that_the_server_keeps(page: Page) -> None:
    deployment = LargeDeployment(*FEW)
    deployment.tracker.settings = StatisticsSettings(history_minutes=3)
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        page.show("#usage")
        options = "return [...document.querySelector(arguments[0]).options].map((option) => option.value)"
        page.wait("return document.querySelector('#usage-window').options.length > 2")
        assert page.run(options, "#usage-window") == ["", "1", "3", "other"]
        assert page.run("return document.querySelector('#usage .short').max") == "3"
        page.show("#drift")
        page.wait("return document.querySelector('#drift-now').value === 'minutes:3'")
        sides = page.run(options, "#drift-now")
        assert sides[:5] == ["all", "minutes:1", "before:1", "minutes:3", "before:3"]
        assert set(sides[5:]) == {f"{kind}:{label}" for kind in ("label", "rest") for label in LABELS}
        for side in sides:
            assert httpx.get(url + "/experts/compare", params={"a": side}, timeout=60).status_code == 200, side
        assert_clean(page, url)


@pytest.mark.usefixtures("without_charts")
def test_tokens_and_their_experts(page: Page, demo_url: str) -> None:
    """A character is one chip however many tokens it takes: bytes of one code point, code points of one emoji."""
    text = "The moon 明月 銀😀👩\u200d🚀e\u0301 🇨🇭"
    trace = httpx.post(demo_url + "/experts/trace", json={"text": text}, timeout=60).json()
    parts = [bytes.fromhex(token["bytes"]) if "bytes" in token else token["text"].encode() for token in trace["tokens"]]
    assert b"".join(parts) == text.encode()
    page.open(demo_url + "/dashboard")
    page.run("arguments[0].value = arguments[1]", page.show("#trace-text"), text)
    page.click("#trace-run")
    page.wait("return document.querySelectorAll('#trace-tokens .chip').length > 0")
    chips = page.run(
        "return [...document.querySelectorAll('#trace-tokens .chip')].map(chip => "
        "[chip.querySelector('.chip-text').textContent, chip.title, chip.querySelectorAll('small').length])"
    )
    assert "".join(shown for shown, _, _ in chips) == text.replace(" ", "·")
    characters = {shown.strip("·"): (title, num_tokens) for shown, title, num_tokens in chips}
    assert {"銀", "😀", "👩\u200d🚀", "🇨🇭"} < characters.keys()
    assert sum(num_tokens for _, _, num_tokens in chips) == len(trace["tokens"]) > len(chips)
    assert all(len(re.findall(r"\d+", title.partition("·")[0])) == num_tokens for _, title, num_tokens in chips)
    page.click("#trace-tokens .chip:last-child")
    pieces = characters["🇨🇭"][1]
    assert page.count("#trace-detail .piece") == pieces > 1
    page.click("#trace-detail .piece:last-child")
    shown = page.run(
        "return [...document.querySelectorAll('#trace-detail .routes')]"
        ".map(row => [...row.querySelectorAll('b')].map(item => Number(item.textContent)))"
    )
    assert [sorted(row) for row in shown] == [sorted(row) for row in trace["experts"][-1]]
    page.click("#trace-detail .route")
    page.wait("return document.querySelector('#expert-card h3') !== null")
    assert_clean(page, demo_url)
