"""Changes of weights that the dashboard makes, follows and takes back."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
import torch

from amalgam.composition.loader import ModelLoader
from amalgam.config.reading import load_settings
from tests.server.browser import Page
from tests.server.conftest import serving, wait_until_ready
from tests.server.dashboard.looking import assert_clean
from tests.server.fakes import fake_settings
from tests.server.test_changes import HeldDeployment, held


@pytest.mark.usefixtures("without_charts")
def test_a_staged_change_goes_live_and_is_taken_back(page: Page, demo_url: str, tmp_path: Path) -> None:
    page.open(demo_url + "/dashboard")
    version = httpx.get(demo_url + "/", timeout=60).json()["weight_version"]
    before = httpx.get(demo_url + "/experts/precision_map", timeout=60).json()["sources"]
    assert page.run("return document.querySelector('#stage-undo').disabled")
    page.click_cell("precision", 1, 4)
    page.click_cell("precision", 3, 9, shift=True)
    page.wait("return document.querySelector('#stage-count').textContent === '2 experts selected'")
    page.choose("#stage-source", "base")  # nothing comes from there yet
    page.click("#stage-add")
    page.wait("return document.querySelectorAll('#stage-list tbody tr').length === 2")
    page.wait(
        "return /^Expert weights: .+ → about .+ \\(\\+.+%\\)$/.test(document.querySelector('#stage-size')?.textContent)"
    )
    told = (
        r"^6 weights would change: [\d.]+ KiB to read, at most [\d.]+ KiB of memory \(.+ available\), about .+ m?s\.$"
    )
    assert re.match(told, page.text("#stage-plan p:last-child"))
    page.type("#stage-name", "no name")  # the server tells before it is asked to
    page.wait("return document.querySelector('#stage-plan .bad')?.textContent.includes('no name')")
    page.type("#stage-name", "")
    page.wait("return document.querySelector('#stage-size') !== null")
    page.click("#stage-apply")
    page.wait("return document.querySelector('#stage-outcome').textContent.includes('6 weights changed')")
    assert httpx.get(demo_url + "/", timeout=60).json()["weight_version"] == version + 1
    sources = httpx.get(demo_url + "/experts/precision_map", timeout=60).json()["sources"]
    assert sources[1][4] == sources[3][9] == ["base"] * 3
    page.wait("return document.querySelector('#version').textContent === arguments[0]", f"weights v{version + 1}")
    page.wait("return document.querySelector('#remap-body').textContent.includes(arguments[0])", f"v{version + 1}")
    page.show("#serving")
    page.wait("return document.querySelector('[data-chart=throughput]').layout?.shapes?.length > 0")
    num_marks = page.run("return document.querySelector('[data-chart=throughput]').layout.shapes.length")

    # A restart would forget it, and the page says so; the file that it offers would not.
    page.wait("return document.querySelector('#stage-kept').textContent.includes('a restart undoes it')")
    saved = tmp_path / "saved.yaml"
    saved.write_bytes(httpx.get(page.run("return document.querySelector('#stage-save').href"), timeout=60).content)
    [choices] = [
        ModelLoader(s.model, s.inference, torch.device("cpu"), 1).choose() for s in [load_settings(saved, {}, {})]
    ]
    names = httpx.get(demo_url + "/experts/precision_map", timeout=60).json()["names"]
    for row, sources_of_row in zip(names, sources, strict=True):
        for expert, sources_of_expert in zip(row, sources_of_row, strict=True):
            assert [choices[name].source for name in expert] == sources_of_expert

    page.click("#stage-undo")
    page.wait("return document.querySelector('#stage-outcome').textContent.includes('6 weights changed back')")
    assert httpx.get(demo_url + "/", timeout=60).json()["weight_version"] == version + 2
    assert httpx.get(demo_url + "/experts/precision_map", timeout=60).json()["sources"] == before
    page.wait("return document.querySelector('#stage-kept').textContent.startsWith('As configured')")
    assert page.run("return document.querySelector('#stage-undo').disabled")

    # A version beside the current one: its name may be long, and no request has moved to it.
    name = "n" * 64
    page.click_cell("precision", 1, 4)
    page.wait("return document.querySelector('#stage-count').textContent === '1 expert selected'")
    ticks = "for (const box of document.querySelectorAll('#stage .boxes input')) box.click()"
    page.run(ticks)
    page.click("#stage-add")
    assert page.text("#stage-outcome") == "No projection is ticked."
    assert page.text("#stage-count") == "1 expert selected"
    page.run(ticks)
    page.click("#stage-add")
    page.type("#stage-name", name)
    page.wait("return document.querySelector('#stage-size') !== null")
    for width in (360, 1440):
        page.emulate(width, 900)
        assert page.run("return document.documentElement.scrollWidth") <= width
        inside = (
            "return document.querySelector('#stage').contains(document.elementFromPoint(arguments[0], arguments[1]))"
        )
        edges = "const box = arguments[0].getBoundingClientRect(); return [box.right - 2, box.top + 8]"
        assert page.run(inside, *page.run(edges, page.show("#stage-apply")))
    page.click("#stage-apply")
    page.wait("return document.querySelector('#stage-outcome').textContent.includes(arguments[0])", name)
    page.emulate(360, 900)
    assert page.run("return document.documentElement.scrollWidth") <= 360
    page.wait("return document.querySelector('#remap-body').textContent.includes(arguments[0])", name)
    layout = "document.querySelector('[data-chart=throughput]').layout"
    page.show("#serving")
    page.wait(f"return {layout}.shapes.length === arguments[0]", num_marks + 1)  # that of the undone change
    assert page.run(f"return {layout}.annotations.at(-1).text").endswith(f" … v{version + 2}")  # both in one label
    httpx.delete(f"{demo_url}/weights/named/{name}", timeout=60).raise_for_status()
    assert_clean(page, demo_url, refused="422")


@pytest.mark.usefixtures("without_charts")
def test_versions_are_kept_compared_and_gone_back_to(page: Page, demo_url: str) -> None:
    first = httpx.get(demo_url + "/", timeout=60).json()["weight_version"]
    page.open(demo_url + "/dashboard")
    page.show("#weights")
    row = "#versions tr[data-version='{}'] {}"
    states = "return document.querySelector(arguments[0])?.textContent.includes(arguments[1])"
    page.wait(states, row.format(first, "td:nth-child(2)"), "current")
    page.click(row.format(first, "button"))  # pins it
    page.wait(states, row.format(first, "td:nth-child(2)"), "current, pinned")
    page.click_cell("precision", 2, 7)
    page.click_cell("precision", 2, 8, shift=True)
    page.choose("#stage-source", "base")
    page.click("#stage-add")
    page.wait(states, "#stage-list tbody", "7–8int4 → base6")
    mapping = {"model.layers.2.mlp.experts.7.*": "base"}
    changed = httpx.post(demo_url + "/update_weight_mapping", json={"weight_mapping": mapping}, timeout=60)
    second = changed.raise_for_status().json()["weight_version"]
    page.wait(
        "return document.querySelector('#stage-list td:nth-child(2)').textContent === '8'"
    )  # 7 is as it was to be
    page.show("#weights")
    page.wait(states, row.format(second, "td:nth-child(2)"), "current")
    page.wait(states, row.format(first, "td:nth-child(2)"), "pinned")
    page.choose("#difference-before", str(first))
    page.choose("#difference-after", str(second))
    page.wait(states, "#difference tbody td:nth-child(2)", "int4 → base")
    assert page.text("#difference tbody td:nth-child(1)") == "3"

    # The first one gets a name, if it is one.
    page.choose("#name-version", str(first))
    for name, selector, told in (("a/b", "#weights-outcome", "a/b"), ("plain", "#versions .name-tag", "“plain”")):
        page.type("#name-input", name)
        page.click("#name-give")
        page.wait(states, selector, told)
    page.wait("return document.querySelector('#name-input').value === ''")
    assert page.text("#weights-outcome") == ""

    # A shadow of it begins and ends.
    page.show("#trials")
    page.wait("return document.querySelector('#shadow-weights').textContent === arguments[0]", f"v{first} · plain")
    page.type("#shadow-share", "200")
    page.click("#shadow-begin")
    page.wait(states, "#trials .panel-error", "share, % is 200. Allowed: at most 100.")
    page.type("#shadow-share", "20")
    page.click("#shadow-begin")
    page.wait("return document.querySelectorAll('#trial-shadow .tile').length === 3")
    assert "20%" in page.text("#trial-shadow")
    report = httpx.get(demo_url + "/weights/shadow", timeout=60).json()
    assert (report["candidate"], report["share"], report["automatic"]) == (first, 0.2, False)
    page.wait(states, "#trial-shadow .note", "Undecided. Requests so far: 0; needed: 50.")
    page.click("#language")
    assert page.text("#trial-shadow .note") == "未定。 目前请求：0；需要：50。"
    page.click("#language")
    page.wait("return !document.querySelector('#shadow-begin').checkVisibility()")
    page.run("[...document.querySelectorAll('#trial-shadow button')].at(-1).click()")
    page.wait("return document.querySelector('#shadow-begin').checkVisibility()")

    page.click(row.format(first, "td:last-child button"))  # goes back to it
    page.wait(states, row.format(first, "td:nth-child(2)"), "current, pinned")
    assert httpx.get(demo_url + "/", timeout=60).json()["weight_version"] == first
    page.click(row.format(first, ".name-tag button"))
    page.click(row.format(first, "td:last-child button"))
    page.wait("return !document.querySelector(arguments[0]).textContent.match(/pinned|plain/)", row.format(first, ""))

    # The files are read again once it has been seen what that changes.
    page.click("#reload")
    page.wait(states, "#reload-plan", "No weight would change.")
    page.click("#reload-apply")
    page.wait(states, "#remap-body", "Files read anew")
    assert_clean(page, demo_url, refused="422")


@pytest.mark.usefixtures("without_charts")
def test_a_change_is_followed_and_cancelled(page: Page) -> None:
    deployment = HeldDeployment()
    with serving(fake_settings(port=0), lambda: deployment) as url, held(deployment, after=3):
        wait_until_ready(url)
        page.open(url + "/dashboard")
        page.show("#weights")
        body = {"weight_mapping": {"a": "int4", "<b>": "fp8"}}
        change = httpx.post(url + "/weights/changes", json=body, timeout=60).json()
        page.wait("return document.querySelector('#change progress')?.value === 0.75")
        assert "Rules" in page.text("#change") and "3 of 4 weights" in page.text("#change")
        page.click("#change-cancel")
        page.wait("return document.querySelector('#change').hidden")
        page.wait("return document.querySelector('#weights-outcome').textContent.includes('cancelled')")
        assert httpx.get(f"{url}/weights/changes/{change['id']}", timeout=60).json()["state"] == "cancelled"
        page.show("#remaps")
        page.wait("return document.querySelectorAll('#remap-body td.warn').length === 1")
        assert page.complaints == []
