"""What tests of the dashboard look at: scripts to run in the page, and what holds for all of it."""

from __future__ import annotations

from tests.server.browser import Page
from tests.server.readable import CONTRAST

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
WORST_TONE = f"""
    {CONTRAST}
    const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
    const tones = ["--text", "--muted", "--good", "--bad", "--warn"];
    const worst = (tone) => Math.min(...["--panel", "--raised"].map((ground) => contrast(color(tone), color(ground))));
    return Math.min(...tones.map(worst));
"""
NAMELESS_FIELDS = """
    return [...document.querySelectorAll("input, select, textarea")]
        .filter((node) => !node.labels.length && !node.getAttribute("aria-label")).map((node) => node.outerHTML);
"""
CUT_TEXTS = """
    return [...document.querySelectorAll(".tile span, .tile b, .tile small")]
        .filter((node) => node.checkVisibility() && node.scrollWidth > node.clientWidth)
        .map((node) => node.textContent);
"""
LEGEND_IS_WHOLE = """
    const chart = document.querySelector("[data-chart=load]");
    const { bottom } = chart.querySelector(".legend .bg").getBoundingClientRect();
    return [...chart.querySelectorAll(".legendtext")].every((text) => text.getBoundingClientRect().bottom <= bottom);
"""
WRITTEN_TIMES = """
    const done = arguments[0];
    import(new URL("format.js", document.querySelector("script[type=module]").src)).then((format) => {
        done([Date.now() / 1000, 1e9].map(format.clock));
    });
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
