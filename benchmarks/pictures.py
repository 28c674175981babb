"""The pictures of the dashboard in docs/images: a demo server after some traffic, in headless Chromium.

Run from the repository's root beside a fresh `make serve`, as `python -m benchmarks.pictures`. Names two versions of
the server's weights and tries one of them; both names are taken away at the end.
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.demo_traffic import send
from examples.test_client import DEFAULT_BASE_URL, MixedPrecisionAPIClient
from tests.server.browser import Page, open_browser

EXPERTS = "model.layers.*.mlp.experts.*"
PLANS: dict[str, dict[str, Any]] = {
    "small": {"rules": [{"pattern": EXPERTS, "source": "int4"}]},
    "wide-start": {"weight_mapping": {"model.layers.{0,1}.mlp.experts.*": "base"}},
}
GAP = 8  # pixels around what is shown
RECT = """
    const rects = arguments[0].map((id) => document.getElementById(id).getBoundingClientRect());
    const [left, top] = [Math.min(...rects.map((r) => r.left)), Math.min(...rects.map((r) => r.top))];
    const [right, bottom] = [Math.max(...rects.map((r) => r.right)), Math.max(...rects.map((r) => r.bottom))];
    return {x: left + scrollX, y: top + scrollY, width: right - left, height: bottom - top};
"""


def show_use(page: Page) -> None:
    """Serving figures, the heatmap, and its busiest expert."""
    page.show("#serving")
    page.wait("return document.querySelector('[data-chart=load] .main-svg') !== null")
    page.click_cell("usage", 5, 0)
    page.wait("return document.querySelector('#expert-card tbody td') !== null")
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 0, "y": 0})  # and no tip


def show_difference(page: Page) -> None:
    """Verse against code."""
    page.choose("#usage-view", "difference")
    for side, domain in (("a", "verse"), ("b", "code")):
        page.choose(f"#usage-{side}", f"label:{domain}")
    page.wait("return document.querySelector('#usage').textContent.match(/ pp|个百分点/)")


def show_analysis(page: Page) -> None:
    """Concentration, co-activation, drift."""
    page.show("#coactivation")
    page.wait("return document.getElementById('coactivation').grid.data !== null")
    page.wait("return document.querySelector('[data-chart=lorenz] .main-svg') !== null")


def show_precision(page: Page) -> None:
    """An expert that is hot and narrow, staged, with what the change would be; and a text's tokens."""
    page.show("#precision")
    page.wait("return !document.querySelector('#select-hot-narrow').textContent.includes('(0)')")
    page.click("#select-hot-narrow")
    page.choose("#stage-source", "fp8")
    page.click("#stage-add")
    page.wait("return document.querySelector('#stage-size') !== null")
    page.click("#trace-run")
    page.wait("return document.querySelectorAll('#trace-tokens .chip').length > 0")


def show_versions(page: Page) -> None:
    """Versions with names, and in what the current one and one of them differ."""
    page.show("#weights")
    page.wait("return document.querySelectorAll('.name-tag').length === 2")
    page.choose(
        "#difference-after", page.run("return document.querySelector('#versions tbody tr:last-child').dataset.version")
    )
    page.wait("return document.querySelector('#difference td') !== null")


def show_trials(page: Page) -> None:
    """A canary that runs, and what would begin a shadow."""
    page.show("#trials")
    page.wait("return document.querySelectorAll('#trial-canary .tile').length === 3")
    page.wait("return document.querySelector('#shadow-begin').checkVisibility()")


SHOTS: dict[str, tuple[Callable[[Page], None], tuple[str, ...]]] = {
    "dashboard": (show_use, ("serving", "usage", "expert", "hints")),
    "dashboard-difference": (show_difference, ("usage",)),
    "dashboard-analysis": (show_analysis, ("analysis", "coactivation", "drift")),
    "dashboard-precision": (show_precision, ("precision", "stage", "inspector")),
    "dashboard-weights": (show_versions, ("weights",)),
    "dashboard-trials": (show_trials, ("trials",)),
}


def take(page: Page, panels: tuple[str, ...], path: Path) -> None:
    """A picture of some panels that lie beside each other."""
    rect = page.run(RECT, list(panels))
    clip = {
        "x": rect["x"] - GAP, "y": rect["y"] - GAP, "width": rect["width"] + 2 * GAP,
        "height": rect["height"] + 2 * GAP, "scale": 1,
    }  # fmt: skip
    fields = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    path.write_bytes(base64.b64decode(page.driver.execute_cdp_cmd("Page.captureScreenshot", fields)["data"]))
    print(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the pictures; default: all")
    parser.add_argument("--rounds", type=int, default=12, help="of the traffic before (default: %(default)s)")
    parser.add_argument("--base-url", default=DEFAULT_BASE_URL, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("docs/images"), help="default: %(default)s")
    parser.add_argument("--dark", action="store_true", help="the dark theme")
    parser.add_argument("--language", default="en", help="en or zh (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(SHOTS):
        parser.error(f"no such pictures: {', '.join(sorted(unknown))}; there are {', '.join(SHOTS)}")
    client = MixedPrecisionAPIClient(arguments.base_url)
    for name, plan in PLANS.items():
        client.call("PUT", f"/weights/named/{name}", plan)
    client.call("PUT", "/weights/canary", {"weights": "small", "share": 0.5, "max_slowdown": 1.5})
    send(client, arguments.rounds, 64)
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as page:
        page.emulate(is_dark=arguments.dark, language=arguments.language)
        page.open(f"{client.base_url}/dashboard")
        page.run("document.querySelector('header').hidden = true")  # which lies over what is scrolled below it
        for name in arguments.names or SHOTS:
            show, panels = SHOTS[name]
            show(page)
            take(page, panels, arguments.folder / f"{name}.png")
    client.call("DELETE", "/weights/canary")
    for name in PLANS:
        client.call("DELETE", f"/weights/named/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
