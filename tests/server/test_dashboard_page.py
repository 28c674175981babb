"""The dashboard in a browser: with the demo model behind it, and with the statistics of a large one."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from amalgam.composition.loader import ModelLoader
from amalgam.config.reading import load_settings
from amalgam.config.settings import StatisticsSettings, build_settings
from amalgam.experts.tracker import ExpertTracker
from amalgam.runtime.opening import open_deployment
from amalgam.server.dashboard import events, pages
from amalgam.server.web.files import PageFile
from tests.conftest import DEMO
from tests.server.browser import Page
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.fakes import FakeDeployment, fake_settings
from tests.server.large import LABELS, NUM_EXPERTS, NUM_LAYERS, LargeDeployment
from tests.server.test_changes import HeldDeployment, held

DOMAINS = {
    "prose": ["It was a dark night, and", "The old captain looked at the sea"],
    "宋词": ["床前明月光，", "明月几时有，"],
    "<i>code</i>": ["def fibonacci(n):\n", "import os\n\nclass Path:"],
}
FEW = (6, 16)  # layers and experts of a layer
PANELS = (
    *("serving", "usage", "expert", "hints", "precision", "stage", "inspector", "analysis", "coactivation", "drift"),
    *("autoplan", "weights", "trials", "memory", "remaps", "playground"),
)
COLORS_OF_CELL = """
    const grid = document.getElementById(arguments[0]).grid;
    const context = grid.overlay.getContext("2d");
    const [x, y] = [grid.x(grid.place(arguments[1], arguments[2])), grid.y(arguments[1]) + grid.size.cellHeight / 2];
    const at = (dx) => [...context.getImageData(Math.round(x + dx), Math.round(y), 1, 1).data].slice(0, 3);
    const paint = document.createElement("canvas").getContext("2d");
    const color = (name) => {
        paint.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
        paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    return {edge: at(0), inner: at(1), hot: color("--hot"), staged: color("--staged")};
"""
COLORS_OF_BLANK = """
    const grid = document.getElementById(arguments[0]).grid;
    const copy = document.createElement("canvas");
    Object.assign(copy, {width: grid.base.width, height: grid.base.height});
    const context = copy.getContext("2d", {willReadFrequently: true});
    context.drawImage(grid.base, 0, 0);
    const at = (x, y) => context.getImageData(Math.round(x), Math.round(y), 1, 1).data.join();
    const [x, y] = [grid.x(1), grid.y(1)];
    const {cellWidth, cellHeight} = grid.size;
    return [
        at(x + cellWidth / 2, y + cellHeight / 2),
        at(x + 1, y + cellHeight / 2), at(x + cellWidth / 2, y + 1),
    ];
"""
STALENESS = """
    return [
        document.querySelector("#status").dataset.status, document.documentElement.dataset.stale,
        Number(getComputedStyle(document.querySelector("#serving .panel-body")).opacity),
        document.querySelector("#stale").textContent,
    ];
"""
CONTRAST = """
    const rgb = (color) => {
        const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        paint.fillStyle = color;
        paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = (color) => {
        const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = rgb(color).map((value) => linear(value / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (one, other) => {
        const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    };
"""
UNREADABLE = f"""
    {CONTRAST}
    const background = (node) => {{
        for (; node; node = node.parentElement) {{
            const style = getComputedStyle(node);
            if (node.classList.contains("route")) return style.getPropertyValue("--color");
            if (!/^rgba\\(.*, 0\\)$/.test(style.backgroundColor)) return style.backgroundColor;
        }}
    }};
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    while (texts.nextNode()) {{
        const node = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !node.checkVisibility()) continue;
        if (node.closest("svg, script, noscript, :disabled")) continue;
        const ratio = contrast(getComputedStyle(node).color, background(node));
        const text = texts.currentNode.data.slice(0, 20);
        if (ratio < 4.5) found.push(`${{node.className || node.tagName}} "${{text}}": ${{ratio.toFixed(2)}}`);
    }}
    return [...new Set(found)];
"""
WORST_EXPERT_COLOR = f"""
    const done = arguments[0];
    {CONTRAST}
    import(new URL("theme.js", document.querySelector("script[type=module]").src)).then((theme) => {{
        const text = getComputedStyle(document.body).color;
        let worst = Infinity;
        for (let expert = 0; expert < 128; expert += 1) {{
            for (const strength of [0, 0.25, 0.5, 0.75, 1]) {{
                worst = Math.min(worst, contrast(theme.toCss(theme.expertColor(expert, strength)), text));
            }}
        }}
        done(worst);
    }});
"""
NEED_STATISTICS = tuple(
    name
    for name in PANELS
    if name not in ("serving", "autoplan", "weights", "trials", "memory", "remaps", "playground")
)
UPDATE_OFTEN = """
    const [selector, name, done] = arguments;
    const select = document.querySelector(selector);
    performance.clearMeasures(name);
    const update = () => {
        const entries = performance.getEntriesByName(name);
        if (entries.length >= 4) return done(entries.map((entry) => entry.duration));
        select.selectedIndex = 1 - select.selectedIndex;
        select.dispatchEvent(new Event("change"));
        setTimeout(update, 100);
    };
    select.selectedIndex = 0;
    update();
"""


@pytest.fixture(scope="module")
def demo_url(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the demo model in three precisions, after some traffic in three domains."""
    settings = build_settings(
        {
            "model": {
                "name": "demo",
                "base_path": str(DEMO),
                "mixed_precision": {
                    "fp8_path": str(derived / "fp8"),
                    "int4_path": str(derived / "int4"),
                    "weight_mapping": {
                        "model.layers.*.mlp.experts.*": "int4",
                        "model.layers.*.mlp.experts.{0-3}.*": "fp8",
                    },
                },
            },
            "inference": {"device_map": "cpu", "max_seq_length": 256},
            "engine": {"num_threads": 1},
            "statistics": {"pair_sampling": 1},
            "server": {"port": 0, "export_dir": str(tmp_path_factory.mktemp("exports"))},
        }
    )
    with serving(settings, lambda: open_deployment(settings)) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200, 60)
        bodies = [
            {"prompt": prompt, "max_new_tokens": 40, "domain": domain, "seed": seed}
            for domain, prompts in DOMAINS.items()
            for prompt in prompts
            for seed in range(3)
        ]
        with ThreadPoolExecutor(6) as pool:
            codes = list(pool.map(lambda body: client.post("/generate", json=body).status_code, bodies))
        assert set(codes) == {200}
        yield url


@pytest.fixture(scope="module")
def large_url() -> Iterator[str]:
    deployment = LargeDeployment()
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        yield url


@pytest.fixture
def page(browser: Page) -> Page:
    browser.reset()
    return browser


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at no chart: to load plotly.js and to draw takes longer than all else of a page."""
    script = b"window.Plotly = { react: async (node, data, layout) => { Object.assign(node, { data, layout }); } };"
    files = {**pages.files(), pages.PLOTLY: PageFile(script, "text/javascript; charset=utf-8")}
    monkeypatch.setattr(pages, "files", lambda: files)


def show_everything(page: Page) -> None:
    """Scroll past every panel, and wait until each has its figures."""
    for panel in PANELS:
        page.show(f"#{panel}")
        page.wait("return !document.querySelector('#' + arguments[0] + ' .panel-error')", panel)
    for chart in ("throughput", "load", "lorenz"):
        page.show(f"[data-chart={chart}]")
        page.wait("return document.querySelector(`[data-chart=${arguments[0]}] .main-svg`) !== null", chart)
    for grid in ("usage", "precision", "coactivation"):
        page.show(f"#{grid}")
        page.wait("return document.getElementById(arguments[0]).grid.data !== null", grid)
    assert page.count(".panel") == len(PANELS)


def assert_clean(page: Page, url: str, refused: str = "of nothing") -> None:
    """Nobody else was asked, and the browser complained of nothing but answers with the status `refused`."""
    assert page.strangers(url) == set()
    assert [complaint for complaint in page.complaints if f"a status of {refused}" not in complaint] == []
    assert page.addresses


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
    assert_clean(page, demo_url)


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
    assert "share of the layer's use in A less that in B" in page.text("#usage .panel-head p")
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


def test_drift_is_explained_until_there_is_some(page: Page, demo_url: str) -> None:
    page.open(demo_url + "/dashboard")
    page.show("#drift")
    page.wait("return document.querySelector('#drift .figures').textContent.includes('nothing to compare')")
    assert page.run("return document.querySelector('#drift-reference').value") == "before:5"
    assert not page.run("return document.querySelector('[data-chart=drift]').checkVisibility()")
    page.choose("#drift-reference", "label:prose")
    page.wait("return document.querySelector('[data-chart=drift] .main-svg')?.checkVisibility()")
    assert "divergence" in page.text("#drift .figures")
    assert_clean(page, demo_url)


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

    # A restart would forget it, and the page says so; the file that it offers would not.
    page.wait("return document.querySelector('#stage-kept').textContent.includes('a restart forgets it')")
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
    page.wait("return document.querySelector('#stage-kept').textContent.startsWith('As the server was started')")
    assert page.run("return document.querySelector('#stage-undo').disabled")
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
    mapping = {"model.layers.2.mlp.experts.7.*": "base"}
    httpx.post(demo_url + "/update_weight_mapping", json={"weight_mapping": mapping}, timeout=60).raise_for_status()
    page.wait(states, row.format(first + 1, "td:nth-child(2)"), "current")
    page.wait(states, row.format(first, "td:nth-child(2)"), "pinned")
    page.choose("#difference-before", str(first))
    page.choose("#difference-after", str(first + 1))
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
    page.wait(states, "#trials .panel-error", "share")
    page.type("#shadow-share", "20")
    page.click("#shadow-begin")
    page.wait("return document.querySelectorAll('#trial-shadow .tile').length === 3")
    assert "20%" in page.text("#trial-shadow")
    report = httpx.get(demo_url + "/weights/shadow", timeout=60).json()
    assert (report["candidate"], report["share"], report["automatic"]) == (first, 0.2, False)
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


@pytest.mark.usefixtures("without_charts")
def test_the_playground_streams_and_tells_errors(page: Page, demo_url: str) -> None:
    page.open(demo_url + "/dashboard")
    page.run("arguments[0].value = '12'", page.show("#play-max"))
    page.run("arguments[0].value = 'prose'", page.show("#play-domain"))
    page.click("#play-start")
    page.wait("return document.querySelector('#play-figures').textContent.includes('12 generated tokens')")
    assert "tokens/s" in page.text("#play-figures")
    assert len(page.text("#play-output")) > len("It was a dark night, and") + 5
    page.wait("return document.getElementById('playground').grid.data !== null")

    page.choose("#play-mode", "chat")
    for turn in (1, 2):
        page.run("arguments[0].value = 'Tell me of the sea'", page.show("#play-prompt"))
        page.click("#play-start")
        page.wait("return document.querySelectorAll('#play-output .assistant').length === arguments[0]", turn)
        page.wait("return document.querySelector('#play-figures').textContent.includes('first after')")
    assert page.text("#play-output").count("Tell me of the sea") == 2
    assert_clean(page, demo_url)
    page.choose("#play-mode", "text")
    page.run("arguments[0].value = 'A text'", page.show("#play-prompt"))
    page.run("arguments[0].value = '0'", page.show("#play-max"))
    page.click("#play-start")
    page.wait("return document.querySelector('#playground .panel-error')?.textContent.includes('max_new_tokens')")


@pytest.mark.usefixtures("without_charts")
def test_a_long_answer_leaves_the_page_usable(page: Page) -> None:
    """What is there is not written again for each token, and one can stop in the middle."""
    deployment = FakeDeployment()
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        page.run("arguments[0].value = '4000'", page.show("#play-max"))
        page.run(
            """
            window.removed = 0;
            new MutationObserver((records) => {
                for (const record of records) window.removed += record.removedNodes.length;
            }).observe(document.querySelector("#play-output"), {childList: true, subtree: true});
            """
        )
        page.click("#play-start")
        page.wait("return document.querySelector('#play-figures').textContent.includes('4,000 generated tokens')")
        expected = "It was a dark night, and" + "".join(f"w{index} " for index in range(4000))
        assert page.text("#play-output") == expected + page.text("#play-output .cut")
        assert page.run("return window.removed") < 20  # when it begins and when it ends
        assert page.run("return document.querySelector('#play-output .cut').dataset.reason") == "length"

        page.run("arguments[0].value = '1000000'", page.show("#play-max"))
        page.click("#play-start")
        page.wait("return document.querySelector('#play-output').textContent.includes(' w500 ')")
        page.click("#play-start")
        wait_until(lambda: not deployment.engine.running)
        page.wait("return document.querySelector('#play-output .cut')?.dataset.reason === 'cancelled'")
        assert page.text("#play-start") == "Generate"
        assert_clean(page, url)


@pytest.mark.usefixtures("without_charts")
def test_enter_sends_in_a_chat(page: Page) -> None:
    press = """
        const field = document.querySelector("#play-prompt");
        const event = new KeyboardEvent("keydown", {key: "Enter", cancelable: true, bubbles: true, ...arguments[0]});
        field.value = arguments[1];
        return field.dispatchEvent(event);  // false: it was taken
    """
    deployment = FakeDeployment()
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        assert page.run("return document.querySelector('#play-max').placeholder") == "server default 512"
        assert page.run(press, {}, "a text") is True  # one that is continued may have several lines
        page.choose("#play-mode", "chat")
        for keys in ({"shiftKey": True}, {"isComposing": True}, {"keyCode": 229}):
            assert page.run(press, keys, "ni hao") is True
        assert deployment.engine.num_submitted == 0
        assert page.run(press, {}, "Hello") is False
        page.wait("return document.querySelector('#play-figures').textContent.includes(arguments[0])", "512 generated")
        assert page.run("return document.querySelector('#play-output .assistant .cut').dataset.reason") == "length"
        page.run("arguments[0].value = '3'", page.show("#play-max"))
        assert page.run(press, {}, "And again") is False  # marks of the page are no part of the conversation
        page.wait("return document.querySelector('#play-figures').textContent.includes('3 generated tokens')")
        assert page.count("#play-output .user") == page.count("#play-output .cut") == 2
        assert page.count("#playground .panel-error") == 0
        assert_clean(page, url)


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


@pytest.mark.usefixtures("without_charts")
def test_the_playground_stops(page: Page) -> None:
    deployment = LargeDeployment(*FEW)
    captions = {
        "text": "in this answer and its prompt",
        "chat": "in this answer alone, without the conversation before it",
    }
    with serving(fake_settings(port=0), lambda: deployment) as url:
        wait_until_ready(url)
        page.open(url + "/dashboard")
        for mode, caption in captions.items():
            deployment.engine.held_at = 5  # the answer does not end before it is stopped
            page.choose("#play-mode", mode)
            page.run("arguments[0].value = 'Hello'", page.show("#play-prompt"))
            page.click("#play-start")
            page.wait("return document.querySelector('#play-output').textContent.includes('w4')")
            assert page.text("#play-start") == "Stop"
            assert len(deployment.engine.running) == 1
            page.click("#play-start")
            wait_until(lambda: not deployment.engine.running)
            page.wait("return document.querySelector('#play-figures').textContent.includes('stopped')")
            assert page.text("#play-start") == "Generate"
            assert "w4" in page.text("#play-output")
            deployment.engine.held_at = None
            page.wait("return document.querySelector('#play-used').textContent.includes(arguments[0])", caption)
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
    show_everything(page)
    page.emulate(390, 844, is_mobile=True)
    show_everything(page)
    assert page.run("return document.documentElement.scrollWidth") <= 390
    page.click_cell("usage", 1, 1)
    page.wait("return document.querySelector('#expert-card h3')?.textContent === '第 1 层 · 专家 1'")
    assert_clean(page, demo_url)


@pytest.mark.parametrize(("language", "title"), [("zh-CN", "专家使用"), ("en", "Expert use")])
@pytest.mark.usefixtures("without_charts")
def test_the_browser_chooses_the_language(page: Page, large_url: str, language: str, title: str) -> None:
    page.emulate(is_dark=True, language=language)
    page.open(large_url + "/dashboard")
    assert page.text("#usage h2") == title
    assert page.run("return document.documentElement.dataset.theme") == "dark"


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
def test_the_precision_map_follows_the_traffic(page: Page, demo_url: str) -> None:
    """An open page marks what has become hot since. Last, because it forgets the traffic that other tests look at."""
    httpx.post(demo_url + "/reset_expert_stats", timeout=60)
    page.open(demo_url + "/dashboard")
    page.choose("#precision-hot", "1.25")
    hot = "return document.querySelector('#precision .swatch.hot').parentNode.textContent"
    page.wait(f"{hot} === 'hot and narrow (0)'")
    body = {"prompt": "It was a dark night, and", "max_new_tokens": 48, "seed": 1}
    httpx.post(demo_url + "/generate", json=body, timeout=60).raise_for_status()
    page.wait(f"{hot} !== 'hot and narrow (0)'")
    grid, precision = (httpx.get(f"{demo_url}/experts/{name}", timeout=60).json() for name in ("grid", "precision_map"))
    marked = sum(
        value * len(row) >= 1.25 * sum(row) and is_narrow
        for row, narrow in zip(grid["values"], precision["is_narrow"], strict=True)
        for value, is_narrow in zip(row, narrow, strict=True)
    )
    page.wait(f"{hot} === arguments[0]", f"hot and narrow ({marked})")


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
